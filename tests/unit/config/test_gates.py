"""Keys of gates over adapters that do not go together are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.load import validate
from tests.unit.config.helpers import faults, small

GATE: dict[str, Any] = {"method": "meteora", "lr": 1e-3, "over": ["a/one", "a/two"]}


def fault(key: str, *, task_id: bool = False, **gate: Any) -> str:
    changes: dict[str, Any] = {"adapters__gate": {**GATE, **gate}}
    if task_id:
        changes["tasks__lua__task_id"] = "language"
    found = faults(**changes)
    assert found.keys() == {key}, found
    return found[key]


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ({"top_k": 3}, "top_k", "is more than the 2 adapters in over: lower it"),
        ({"over": ["a/one", "a/one/"]}, "over", "has a/one/ twice: remove one of them"),
        ({"over": ["a/one", "b/one"]}, "over", "two adapters of the name one, a/one and b/one"),
        ({"over": []}, "over", "at least 1"),
        ({"over": None}, "over", "is required by method meteora"),
        ({"gate_loss": 1.0}, "gate_loss", "requires tasks.lua.task_id"),
        ({"lr_ratio": 4.0}, "lr_ratio", "requires train_members: set it to true"),
        ({"target_modules": ["q_proj"]}, "target_modules", "those of the adapters in over: remove it"),
        ({"init_from": "a/three"}, "init_from", "those of the adapters in over: remove it"),
        ({"rank": 4}, "rank", "has no meaning for method meteora"),
        ({"balance_loss": 1.0}, "balance_loss", "has no meaning for method meteora"),
        ({"experts": 4}, "experts", "has no meaning for method meteora"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_keys_of_a_gate_are_refused(keys: dict[str, Any], key: str, words: str) -> None:
    assert words in fault(f"adapters.gate.{key}", **keys)


def test_keys_of_gates_are_refused_elsewhere() -> None:
    assert "belongs to meteora" in faults(adapters__lora__over=["a/one"])["adapters.lora.over"]
    assert "belongs to meteora" in faults(adapters__lora__gate_loss=1.0)["adapters.lora.gate_loss"]
    unused = faults(tasks__lua__task_id="language")["tasks.lua.task_id"]
    assert "no adapter of method meteora learns this task" in unused
    other = {"tasks__lua__task_id": "language", "adapters__gate": {**GATE, "tasks": ["perl"]}}
    assert "no adapter of method meteora" in faults(**other)["tasks.lua.task_id"]


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({"label": "kind"}, "labels"),
        ({"objective": "dpo"}, "preferences"),
        ({"anchor": "a", "positive": "b"}, "embeddings"),
    ],
)
def test_task_id_belongs_to_texts(keys: dict[str, str], kind: str) -> None:
    task = {"train": "lua.jsonl", "task_id": "language", **keys}
    found = faults(tasks__lua=task, adapters__gate=GATE)
    assert f"has no meaning for {kind}" in found["tasks.lua.task_id"]


def test_a_gate_with_task_id_is_accepted() -> None:
    gate = {**GATE, "gate_loss": 2.0, "top_k": 1, "train_members": True, "lr_ratio": 2.0}
    config = validate(small(tasks__lua__task_id="language", adapters__gate=gate))
    assert config.adapters["gate"].over == ["a/one", "a/two"]
