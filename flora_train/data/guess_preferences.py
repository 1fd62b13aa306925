"""Preferences among the rows of a user's file, by their columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flora_train.data.chat.messages import is_message_list
from flora_train.data.file_rows import Row


@dataclass(frozen=True)
class GuessedPreferences:
    """The keys of a preference task."""

    keys: dict[str, str]
    used: tuple[str, ...]
    """Columns."""
    description: str
    holds_messages: bool


def guess_preferences(rows: Sequence[Row]) -> GuessedPreferences | None:
    """Pairs (chosen, rejected) or completions with a label that is true or false; None for other rows."""
    if not rows:
        return None
    first = rows[0]
    prompt = ("prompt",) if "prompt" in first else ()
    used: tuple[str, ...]
    if {"chosen", "rejected"} <= first.keys():
        used, objective = (*prompt, "chosen", "rejected"), "dpo"
        description = f"{len(rows):,} pairs, chosen is preferred to rejected (dpo; ipo and orpo, too)"
    elif {"completion", "label"} <= first.keys() and all(_is_label(row.get("label")) for row in rows):
        used, objective = (*prompt, "completion", "label"), "kto"
        description = f"{len(rows):,} completions, of which label says whether they are good (kto)"
    else:
        return None
    holds_messages = any(is_message_list(first.get(column)) for column in used)
    return GuessedPreferences({"objective": objective}, used, description, holds_messages)


def _is_label(cell: object) -> bool:
    return isinstance(cell, bool) or str(cell).strip().lower() in ("true", "false")
