"""What becomes of a program? Many languages, run in a sandbox, judged by their own tests.

languages.py   how each language is compiled and run, and what its words mean (eval/languages.yaml)
sandbox.py     what a program may touch
prepared.py    what a language compiles once for all its programs
process.py     one command within limits, its output drained
execute.py     programs to verdicts: many at once, timeouts again on a quiet machine
verdicts.py    verdicts on disk
suspicious.py  passes that ended before their tests
"""
