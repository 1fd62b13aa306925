"""Execution of generated programs in a sandbox, in many languages, with verdicts from the programs' own
tests.

languages.py         how each language is compiled and run (eval/languages.yaml)
sandbox.py           what a program can access
sandbox_paths.py     where its files are, and which of the user's paths are hidden from it
seccomp.py           system calls that the kernel denies it
memory_limit.py      the memory that all its processes hold together
toolchain_cache.py   what a language compiles once for all its programs
process.py           one command within limits, its output captured
execute.py           programs to verdicts: many at once, timed-out ones again alone
verdicts.py          verdict files
completion_proof.py  proof that a passing program ran its checks
early_exit.py        words that end a program early, where no proof is possible
"""
