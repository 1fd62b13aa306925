"""The checks before a run as rows of `flora-train doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flora_train.config.errors import Problem, UserError
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import print_plain
from flora_train.prerequisites import find_missing, raise_missing
from flora_train.prerequisites.alternatives import what_runs_instead

OF_DIAGNOSIS = "model.quantization"
"""A problem that doctor raises itself, after its diagnosis."""


@contextmanager
def checked_recipe(config: RunConfig) -> Iterator[None]:
    """Print what a recipe needs and has, before a context in which its base model is diagnosed.

    Raises UserError with all that is missing if the base model cannot be loaded, and else after the
    diagnosis, in one line.
    """
    findings, needs = find_missing(config)
    problems = [problem for problem in findings.problems if problem.key != OF_DIAGNOSIS]
    rows = [*findings.rows, *(("note", note) for note in findings.notes)]
    if not findings.lacks_base:
        rows += [("missing", str(problem)) for problem in problems]
    print_plain(*(f"{heading:11} {state}" for heading, state in rows))
    if findings.lacks_base:
        raise_missing(config, findings, needs)
    yield
    if problems:
        advice = what_runs_instead(config, needs) if findings.suggests_smaller else None
        hint = f"lacks what the {len(problems)} rows `missing` say"
        raise UserError(Problem("recipe", config.name, hint), advice=advice)
