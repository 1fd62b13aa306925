"""Does generated code do what was asked? Programs of many languages, run in a sandbox, judged by their own tests.

languages.py  how each language is compiled and run, and what its words mean (eval/languages.yaml)
sandbox.py    what a program may touch
process.py    one command within limits, its output drained
execute.py    programs to verdicts: many at once, timeouts again on a quiet machine
pass_at_k.py  verdicts to pass@k
"""
