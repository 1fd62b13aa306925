"""Evaluation of generated code: from adapters to pass@k.

problems/            the programming problems
contenders.py        base model, adapters and PEFT adapters that solve them
generate.py          completions of all contenders, mixed in one batch
completion_log.py    the journal of completions; completion_files.py: completions from other sources
programs/            completions become programs, and programs verdicts
scores.py            pass@k with intervals and differences; summary.py: the results of a suite
wins_and_losses.py   problems that an adapter wins over the base or loses to it
evaluate.py          all of these in order
"""
