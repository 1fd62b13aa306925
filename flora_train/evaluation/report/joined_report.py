"""A report in which families of one method on different tasks have one name, and therefore one column."""

from __future__ import annotations

from typing import Any

from flora_train.evaluation.joined_families import joined_families
from flora_train.evaluation.report.formatting import listed
from flora_train.evaluation.report.types import Report

NAMES_OF_FAMILIES = ("family", "first", "second")
"""Keys whose value is the name of a family."""


def with_joined_families(report: Report) -> Report:
    """The report as it is shown. Names of adapters stay as they are."""
    names = _names(report)
    if not names:
        return report
    content = report.model_dump(mode="json")
    for part in ("adapters", "results", "code", "speech", "preferences", "figures", "confusions"):
        if part in content:
            content[part] = _renamed(content[part], names)
    for sample in content["completions"]:
        texts = sample["completions"].items()
        sample["completions"] = {names.get(family, family): text for family, text in texts}
    return Report.model_validate(content)


def note_on_joined_families(report: Report) -> str | None:
    """The sentence on families that are shown under another name; None if there are none."""
    renamed = [f"{family} as {name}" for family, name in _names(report).items() if family != name]
    if not renamed:
        return None
    return f"Families of one method that have no task in common are shown together: {listed(renamed)}."


def _names(report: Report) -> dict[str, str]:
    return joined_families(
        (adapter.family, adapter.task, (adapter.method, adapter.variant, adapter.lr))
        for adapter in report.adapters
    )


def _renamed(content: Any, names: dict[str, str]) -> Any:
    """JSON content with other names of families."""
    if isinstance(content, list):
        return [_renamed(item, names) for item in content]
    if not isinstance(content, dict):
        return content
    renamed = {}
    for key, value in content.items():
        if key in NAMES_OF_FAMILIES and isinstance(value, str):
            renamed[key] = names.get(value, value)
        else:
            renamed[key] = _renamed(value, names)
    return renamed
