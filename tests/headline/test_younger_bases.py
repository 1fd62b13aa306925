"""recipe=multipl_e on younger bases by their names on the hub: `model.path=NAME` and nothing else for the
model, against a hub on loopback, with tiny models in their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bases import LAYOUTS, save_base
from tests.headline.runs import CODE_SIZES, done, hub_environment, launched
from tests.hub_server import Hub

FEW = ("training.steps=4", "evaluation.max_problems=1", "evaluation.num_samples=1")


@pytest.mark.headline
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_key_chooses_the_base(name: str, code_hub: Hub, tmp_path: Path) -> None:
    layout, run = LAYOUTS[name], tmp_path / "run"
    code_hub.add_folder(layout.path, save_base(name, tmp_path / "base"), "model")
    environment = hub_environment(code_hub.url, tmp_path / "home")
    words = launched("multipl_e", run, f"model.path={layout.path}", *CODE_SIZES, *FEW)
    finished = done(words, environment, timeout=900)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((run / "eval" / "report.json").read_text(encoding="utf-8"))
    assert len(report["results"]) == 9
    (suite,) = report["code"]
    assert suite["suite"] == "multipl-e"
    configs = sorted((run / "adapters").glob("*/adapter_config.json"))
    assert len(configs) == 27
    for file in configs:
        config = json.loads(file.read_text(encoding="utf-8"))
        assert config["base_model_name_or_path"] == layout.path
        assert sorted(config["target_modules"]) == list(layout.query_key)
