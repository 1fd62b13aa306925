"""Programming problems: MultiPL-E's prompt files, those of the hub, and the starter problems.

problem.py  one problem: prompt, tests, stop tokens; turns a completion into a program
starter.py  the starter problems, rendered in every language from one table
suites.py   the suites that evaluation.problems names
"""
