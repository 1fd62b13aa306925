"""Adapters that differ in their seed only, and the mean and deviation of their results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.adapter_schema import adapter_name
from flora_train.evaluation.result_model import Interval


@dataclass(frozen=True)
class SeedGroup:
    """The adapters of a task that one setting has, with a seed each."""

    task: str
    family: str
    """The family of the adapters without their seeds, under which their mean is shown."""
    members: tuple[int, ...]
    """Ids of the adapters."""

    @property
    def name(self) -> str:
        """What the adapter would be called without a list of seeds."""
        return adapter_name(self.task, self.family)


def seed_groups(specs: Sequence[AdapterSpec], task: str | None = None) -> list[SeedGroup]:
    """The groups of these adapters, in their order. task: of this task only."""
    members: dict[tuple[str, str], list[int]] = {}
    for adapter, spec in enumerate(specs):
        if spec.seeds_of is not None and task in (None, spec.task):
            members.setdefault((spec.task, spec.seeds_of), []).append(adapter)
    return [SeedGroup(task, family, tuple(ids)) for (task, family), ids in members.items()]


def group_ids(groups: Sequence[SeedGroup], contenders: Iterable[int]) -> dict[int, SeedGroup]:
    """An id for each group whose adapters are all among the contenders; no contender has such an id."""
    present = set(contenders)
    first = max(present, default=0) + 1
    complete = [group for group in groups if present.issuperset(group.members)]
    return dict(enumerate(complete, start=first))


def compared_ids(contenders: Iterable[int], groups: Mapping[int, SeedGroup]) -> list[int]:
    """The contenders that are compared with each other: a group in the place of its first adapter."""
    ids: dict[int, None] = {}
    group_of = {member: i for i, group in groups.items() for member in group.members}
    for contender in contenders:
        ids[group_of.get(contender, contender)] = None
    return list(ids)


def over_seeds(mean: Interval, values: Iterable[float | None]) -> Interval:
    """The interval of a mean over seeds, with their standard deviation. values: of the seeds."""
    return mean.replace(deviation=deviation(values))


def deviation(values: Iterable[float | None]) -> float | None:
    """Standard deviation of a sample (n - 1); None for fewer than two values, or one that is not finite."""
    numbers = [math.nan if value is None else value for value in values]
    if len(numbers) < 2 or not all(map(math.isfinite, numbers)):
        return None
    return stdev(numbers)
