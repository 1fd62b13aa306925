"""Options of paging: defaults, places where slots are given, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flora_train.config.errors import UserError
from flora_train.config.load import load_config, save_config, validate

RAW: dict[str, Any] = {
    "name": "run",
    "model": {"path": "unused"},
    "tasks": {"a": {"train": "a.jsonl"}},
    "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
    "training": {"steps": 4},
}


def test_slots_are_given_beside_the_adapters() -> None:
    config = validate({**RAW, "adapters": {**RAW["adapters"], "device_slots": 4}})
    assert config.paging.device_slots == 4
    assert list(config.adapters) == ["lora"]
    with pytest.raises(UserError, match=r"device_slots = 0: must be at least 1, or must be auto"):
        validate({**RAW, "adapters": {**RAW["adapters"], "device_slots": 0}})
    with pytest.raises(UserError, match=r"adapters\.device_slots = 4.*the same setting"):
        validate({**RAW, "adapters": {**RAW["adapters"], "device_slots": 4}, "paging": {"device_slots": 5}})


def test_the_command_line_wins_over_a_recipe_and_over_a_saved_configuration(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**RAW, "adapters": {**RAW["adapters"], "device_slots": 4}}))
    assert load_config([f"recipe={recipe}"]).paging.device_slots == 4
    for word in ("adapters.device_slots=9", "paging.device_slots=9"):
        assert load_config([f"recipe={recipe}", word]).paging.device_slots == 9
    save_config(load_config([f"recipe={recipe}"]), tmp_path / "config.yaml")
    assert (
        load_config([f"recipe={tmp_path / 'config.yaml'}", "adapters.device_slots=auto"]).paging.device_slots
        == "auto"
    )


def test_a_folder_for_pages_needs_pages_on_disk() -> None:
    with pytest.raises(UserError, match=r"paging\.folder = 'x': requires paging\.host=disk"):
        validate({**RAW, "paging": {"folder": "x"}})
