"""The member of each row is kept beside its tokens, also where documents are divided or packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.load import validate
from flora_train.data.task import Task, load_tasks
from flora_train.training.gate_goals import members_of_example
from tests.unit.config.helpers import refusal
from tests.unit.data.conftest import byte_tokenizer

ROWS = [
    {"text": language[0] * length, "language": language}
    for language, length in [("lua", 3), ("perl", 2), ("lua", 30), ("go", 5)] * 4
]


def load(folder: Path, rows: list[dict[str, Any]], *, over: tuple[str, ...] = (), **task: Any) -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gates = over or ("a/perl", "a/go", "a/lua")
    config = validate(
        {
            "name": "small",
            "model": {"path": "unused"},
            "tasks": {"mixed": {"train": str(folder / "rows.jsonl"), "task_id": "language", **task}},
            "adapters": {"gate": {"method": "meteora", "lr": 1e-3, "over": list(gates)}},
            "training": {"steps": 2, "max_length": 12, "tokens_per_step": 200},
        }
    )
    return load_tasks(config, byte_tokenizer(), folder / "cache")["mixed"]


@pytest.mark.parametrize("packing", [False, True])
def test_every_document_keeps_the_member_of_its_row(packing: bool, tmp_path: Path) -> None:
    task = load(tmp_path, ROWS, truncation="split", packing=packing)
    assert task.members == ("go", "lua", "perl")
    tokenizer, seen = byte_tokenizer(), set()
    for split in (task.train, task.validation):
        for example in range(len(split)):
            members = members_of_example(split, example)
            documents = split.documents(example)
            for member, (tokens, _) in zip(members, documents, strict=True):
                letters = set(tokenizer.decode(tokens, skip_special_tokens=True))
                assert letters <= {task.members[member][0]}
                seen.add(task.members[member])
    assert task.train.is_packed == packing
    assert seen == {"go", "lua", "perl"}


def test_names_of_no_member_and_missing_columns_are_refused(tmp_path: Path) -> None:
    (problem,) = refusal(lambda: load(tmp_path, ROWS, over=("a/perl", "a/lua")))
    assert (problem.key, problem.value) == ("tasks.mixed.task_id", "go")
    assert "of column language (rows.jsonl, row 4) is no member of the gate; they are" in problem.hint
    rows = [{"text": row["text"]} for row in ROWS]
    (problem,) = refusal(lambda: load(tmp_path, rows))
    assert (problem.key, problem.value) == ("tasks.mixed.task_id", "language")
    assert "is no column of the training rows" in problem.hint
