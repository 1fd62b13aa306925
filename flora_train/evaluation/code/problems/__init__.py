"""What is asked? Problems of MultiPL-E's prompt files, of the hub, and our own.

problem.py  one problem: prompt, tests, stop tokens; a completion becomes a program
starter.py  our own easy ones, written out in every language from one table
suites.py   what evaluation.problems means
"""
