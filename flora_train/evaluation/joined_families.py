"""Families of one method on different tasks, such as `flora` and `flora_rank4`, and their common name."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

FamilyOnTask = tuple[str, str, Hashable]
"""Family, task, and what must be equal in families that are shown together."""


def joined_families(adapters: Iterable[FamilyOnTask]) -> dict[str, str]:
    """Family -> the name under which it is shown, for families that are shown together.

    They are alike, no task has two of them, and one of them has a name that the others begin with.
    """
    tasks_of: dict[Hashable, dict[str, list[str]]] = {}
    for family, task, settings in dict.fromkeys(adapters):
        tasks_of.setdefault(settings, {}).setdefault(family, []).append(task)
    joined: dict[str, str] = {}
    for families in tasks_of.values():
        common = min(families, key=len)
        is_begin = all(family.startswith(common) for family in families)
        if len(families) > 1 and is_begin and _are_disjoint(families):
            joined |= dict.fromkeys(families, common)
    return joined


def _are_disjoint(tasks_of: Mapping[str, Iterable[str]]) -> bool:
    """Whether no task has two of the families."""
    tasks = [task for tasks in tasks_of.values() for task in tasks]
    return len(tasks) == len(set(tasks))
