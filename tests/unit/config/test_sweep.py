"""A list of values becomes one adapter a value, named by it; what cannot be swept is refused with the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flora_train.config.errors import UserError
from flora_train.config.load import load_config, save_config, validate
from flora_train.config.schema import RunConfig


def raw(adapters: dict[str, Any], **sections: Any) -> dict[str, Any]:
    return {
        "name": "test",
        "model": {"path": "unused"},
        "tasks": {"a": {"train": "unused.jsonl"}, "b": {"train": "unused.jsonl"}},
        "adapters": adapters,
        "training": {"steps": 40},
        **sections,
    }


def config(**adapter: Any) -> RunConfig:
    return validate(raw({"x": {"method": "lora", "lr": 1e-3, **adapter}}))


def test_every_combination_is_an_adapter_named_by_its_values() -> None:
    found = config(lr=[2e-3, 0.015, 1], rank=[1, 16]).adapters
    assert list(found) == [f"x_lr{lr}_rank{rank}" for lr in ("2e-3", "15e-3", "1") for rank in (1, 16)]
    assert [(a.lr, a.rank, a.sweep) for a in found.values()] == [
        (lr, rank, "x") for lr in (2e-3, 0.015, 1) for rank in (1, 16)
    ]
    assert list(config(lr_schedule=["cosine", "linear"]).adapters) == [
        "x_lr_schedulecosine",
        "x_lr_schedulelinear",
    ]


def test_lists_that_are_no_sweep_stay_lists() -> None:
    (adapter,) = config(tasks=["a"], target_modules=["q_proj", "v_proj"]).adapters.values()
    assert (adapter.tasks, adapter.target_modules, adapter.sweep) == (["a"], ["q_proj", "v_proj"], None)


def test_the_command_line_sweeps_and_what_is_saved_is_the_same_run(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(raw({"x": {"method": "flora", "lr": 1e-3}, "y": {"method": "ia3", "lr": 1e-2}}))
    )
    found = load_config([f"recipe={recipe}", "adapters.x.lr=[2e-3,4e-3]", "sweep.strategy=halving"])
    assert list(found.adapters) == ["x_lr2e-3", "x_lr4e-3", "y"]
    save_config(found, tmp_path / "saved.yaml")
    assert load_config([f"recipe={tmp_path / 'saved.yaml'}"]) == found


@pytest.mark.parametrize(
    ("adapters", "sections", "words"),
    [
        (
            {"x": {"method": ["lora", "ia3"], "lr": 1e-3}},
            {},
            r"adapters\.x\.method = .* cannot be swept: a list of values may stand for.* lr, ",
        ),
        ({"x": {"method": "lora", "lr": []}}, {}, r"adapters\.x\.lr = \[\]: is an empty sweep"),
        (
            {"x": {"method": "lora", "lr": [1e-3, 2e-3, 0.001]}},
            {},
            r"adapters\.x\.lr = 0\.001: is in this sweep twice",
        ),
        ({"x": {"method": "lora", "lr": [1e-3, -1]}}, {}, r"adapters\.x_lr-1\.lr = -1: must be more than 0"),
        (
            {"x": {"method": "ia3", "lr": 1e-3, "rank": [1, 2]}},
            {},
            r"adapters\.x_rank1\.rank = 1: has no meaning for method ia3",
        ),
        (
            {n: {"method": "lora", "lr": v} for n, v in (("x", [1e-3, 2e-3]), ("x_lr1e-3", 1.0))},
            {},
            "the name of two adapters",
        ),
        (
            {"x": {"method": "lora", "lr": 1e-3}},
            {"sweep": {"strategy": "halving"}},
            r"sweep\.strategy = 'halving': requires a sweep",
        ),
        (
            {"x": {"method": "lora", "lr": [1, 2]}},
            {"sweep": {"factor": 3}},
            r"sweep\.factor = 3: requires strategy=halving",
        ),
        (
            {"x": {"method": "lora", "lr": [1, 2]}},
            {"sweep": {"strategy": "halving", "rungs": [20, 40]}},
            r"sweep\.rungs = 40: must be smaller than training\.steps = 40",
        ),
        (
            {"x": {"method": "lora", "lr": [1, 2]}},
            {"sweep": {"strategy": "halving", "rungs": [20, 10]}},
            r"sweep\.rungs = \[20, 10\]: must be ascending steps from 1",
        ),
    ],
)
def test_contradicting_sweep_options_are_refused(
    adapters: dict[str, Any], sections: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        validate(raw(adapters, **sections))
