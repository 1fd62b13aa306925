"""Reading of run.json: damaged keys are named, values of other versions are ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.runtime.run_files import RunFiles


def run_with(folder: Path, content: dict[str, Any]) -> RunFiles:
    run = RunFiles(folder)
    run.run_json.write_text(json.dumps(content))
    return run


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({}, "finished"),
        ({"finished": "yes"}, "finished"),
        ({"finished": 1}, "finished"),
        ({"finished": True, "started": 3}, "started"),
        ({"finished": True, "training": []}, "training"),
        ({"finished": True, "training": None}, "training"),
        ({"finished": True, "training": {"seconds": 3}}, "training.seconds"),
        ({"finished": True, "ended": 3}, "ended"),
        ({"finished": True, "ended": {"joined": 3}}, "ended.joined"),
        ({"finished": True, "ended": {"joined": {"letters": "x"}}}, "ended.joined.letters"),
        ({"finished": True, "ended": {"identity": "x"}}, "ended.identity"),
    ],
)
def test_a_damaged_key_is_named_in_one_line(tmp_path: Path, content: dict[str, Any], key: str) -> None:
    run = run_with(tmp_path, content)
    for read in (run.facts, lambda: run.update_run_json(finished=True)):
        with pytest.raises(UserError) as raised:
            read()
        assert f"{run.run_json}: is damaged ({key}: " in str(raised.value)
        assert "\n" not in str(raised.value)
    assert json.loads(run.run_json.read_text()) == content


def test_values_of_other_versions_are_ignored(tmp_path: Path) -> None:
    other = {"base": {"weights": 1}, "data": 3, "tokenizer": [], "base_dtype": {}, "allowed": "all"}
    info = run_with(tmp_path, {"finished": False, **other, "metrics_size": "9", "new": {"key": 1}}).facts()
    assert (info.base, info.data, info.tokenizer, info.base_dtype, info.allowed) == (None,) * 5
    assert info.metrics_size is None
    assert info.ended is None


def test_a_task_whose_record_is_damaged_does_not_hide_the_others(tmp_path: Path) -> None:
    counts = {"rows": 5, "examples": 5, "tokens": 70}
    data = {"letters": {"sha256": "a", "train": counts, "validation": "x"}, "digits": 3}
    info = run_with(tmp_path, {"finished": False, "data": data}).facts()
    assert info.data is not None
    assert info.data["digits"] is None
    letters = info.data["letters"]
    assert letters is not None
    assert letters.train is not None
    assert (letters.sha256, letters.train.model_dump(), letters.validation) == ("a", counts, None)


def test_an_update_keeps_keys_that_are_not_known(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"finished": False, "new": {"key": [1, None]}})
    run.update_run_json(finished=True)
    assert json.loads(run.run_json.read_text()) == {"finished": True, "new": {"key": [1, None]}}
