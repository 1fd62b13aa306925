"""Does generated code do what was asked? From adapters to pass@k.

problems/          what is asked
contenders.py      who answers: base, adapters, PEFT adapters
solve.py           contenders write completions, mixed in one batch
completion_log.py  completions on disk, with the settings that made them; completions.py: those of others
programs/          completions become programs, and programs verdicts
pass_at_k.py       the estimator; scores.py: with intervals and differences; summary.py: for readers
evaluate.py        all of it, in order
"""
