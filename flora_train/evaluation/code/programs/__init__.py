"""What becomes of a program? Many languages, run in a sandbox, judged by their own tests.

languages.py   how each language is compiled and run, and what its words mean (eval/languages.yaml)
sandbox.py     what a program may touch
places.py      where its files lie, and what of the caller it must not see
system_calls.py  calls that the kernel denies it
memory.py      what all its processes hold together
prepared.py    what a language compiles once for all its programs
process.py     one command within limits, its output drained
execute.py     programs to verdicts: many at once, timeouts again on a quiet machine
verdicts.py    verdicts on disk
evidence.py    whether a passing program ran its checks
suspicious.py  words that end a program, where there can be no evidence
"""
