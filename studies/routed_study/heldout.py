"""Held-out losses of a run with one task of several languages, document by document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.data.sources import read_rows
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.types import Report
from flora_train.final_evaluation import heldout_losses
from flora_train.run_context import RunContext, load_run, locked
from flora_train.runtime.run_folder import RunFolder

BASE = "base"
LANGUAGE = "language"
"""Column of the rows."""


class StudyError(Exception):
    """A failure the user can act on; its text is the one line that is printed."""


@dataclass(frozen=True)
class Heldout:
    """Losses of n documents. A method is a family without its seed."""

    languages: tuple[str, ...]
    """[n]."""
    sizes: NDArray[np.int64]
    """[n]: UTF-8 bytes of the learnt text."""
    nats: Mapping[str, Mapping[str, NDArray[np.float64]]]
    """Method -> adapter -> [n], summed over the tokens of a document; the base is a method of one adapter."""
    parameters: Mapping[str, int]
    """Method -> parameters of an adapter."""

    def bits_per_byte(self, method: str, adapter: str) -> float:
        """Of all documents together."""
        return float(self.nats[method][adapter].sum() / np.log(2) / self.sizes.sum())


def read_heldout(run: Path) -> Heldout:
    """The losses of base and adapters of a run, computed again with its best adapters.

    Raises StudyError if the run has other tasks than one of several languages.
    """
    with locked(str(run), alone=False):
        context, _ = load_run(str(run), with_tasks=True)
        (task,) = one_task(context)
        rows = read_rows(context.config.tasks[task].validation, f"tasks.{task}.validation")
        result = heldout_losses(context, context.bank)[task]
    texts = [str(row["text"]) for row in rows]
    languages = tuple(str(row[LANGUAGE]) for row in rows)
    check_order(texts, result.label_bytes)
    nats: dict[str, dict[str, NDArray[np.float64]]] = {BASE: {BASE: result.nats[BASE_ID]}}
    parameters = {BASE: 0}
    for adapter, spec in enumerate(context.bank.specs):
        method = method_of(spec)
        nats.setdefault(method, {})[spec.name] = result.nats[adapter]
        parameters[method] = context.bank.row(adapter).numel()
    return Heldout(languages, result.label_bytes, nats, parameters)


def one_task(context: RunContext) -> Sequence[str]:
    """The name of the run's only task. Raises StudyError if there are others."""
    names = list(context.tasks)
    if len(names) != 1:
        raise StudyError(
            f"the run has {len(names)} tasks, and this study is of one task of several languages"
        )
    return names


def method_of(spec: AdapterSpec) -> str:
    """The family of an adapter without its seed."""
    return spec.seeds_of or spec.family


def check_order(texts: Sequence[str], sizes: NDArray[np.int64]) -> None:
    """Raises StudyError unless example i is row i, whole or cut."""
    written = [len(text.encode()) for text in texts]
    if len(written) != len(sizes) or any(size > all_of for size, all_of in zip(sizes, written, strict=True)):
        raise StudyError("the held-out examples are not the rows of the task's files, one for one")


def largest_difference(heldout: Heldout, report: Report) -> float:
    """Of the bits per byte of all documents in the run's report, to those of these losses."""
    families = {adapter.family: adapter for adapter in report.adapters}
    differences = []
    for contender in report.results[0].contenders:
        facts = families.get(contender.family)
        if facts is None or contender.bits_per_byte.value is None:
            continue
        mine = heldout.bits_per_byte(facts.seeds_of or facts.family, facts.name)
        differences.append(abs(mine - contender.bits_per_byte.value))
    return max(differences, default=float("nan"))


def report_of(run: Path) -> Report:
    """The report of a run."""
    return read_report(RunFolder(run))
