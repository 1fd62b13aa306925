"""A run neither deletes what it reads nor reads what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.runtime.run_folder import RunFolder


def config_of(
    folder: Path, train: Any = "rows.jsonl", model: str = "base", overwrite: bool = True, **adapter: Any
) -> RunConfig:
    return validate(
        {
            "name": "test",
            "output_dir": str(folder),
            "overwrite": overwrite,
            "model": {"path": model},
            "tasks": {"a": {"train": train}},
            "adapters": {"lora": {"method": "lora", "lr": 1e-3, **adapter}},
            "training": {"steps": 5},
        }
    )


def test_a_run_is_not_replaced_by_one_that_reads_from_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.claim(config_of(folder.path))
    (tmp_path / "link").symlink_to(folder.path)
    inputs: list[tuple[str, dict[str, Any]]] = [
        ("model.path", {"model": str(folder.path / "merged" / "a-lora")}),
        ("tasks.a.train", {"train": str(folder.path / "rows.jsonl")}),
        ("tasks.a.train", {"train": str(tmp_path / "link" / "*.jsonl")}),
        ("tasks.a.train", {"train": {"folder": str(folder.path), "glob": "*.py"}}),
        ("adapters.lora.init_from", {"init_from": str(folder.path / "adapters" / "{task}-lora")}),
    ]
    for key, change in inputs:
        with pytest.raises(UserError, match=rf"{key} = .*: is in the run that overwrite=true would delete"):
            folder.status(config_of(folder.path, **change))
    assert folder.status(config_of(folder.path)) == "new"


def test_run_folder_inside_a_data_pattern_is_refused(tmp_path: Path) -> None:
    for train in (
        {"folder": str(tmp_path)},
        {"folder": str(tmp_path), "glob": "**/*.json"},
        f"{tmp_path}/**/*.jsonl",
    ):
        folder = RunFolder(tmp_path / "outputs" / "run")
        with pytest.raises(UserError, match="would match the run's own files"):
            folder.status(config_of(folder.path, train=train))
    for train in (
        {"folder": str(tmp_path), "glob": "**/*.py"},
        f"{tmp_path}/*.jsonl",
        {"folder": str(tmp_path / "data")},
    ):
        assert folder.status(config_of(folder.path, train=train)) == "new"


def test_a_run_does_not_begin_inside_another_run(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").claim(config_of(tmp_path / "run"))
    for inner in (tmp_path / "run" / "adapters" / "a-lora", tmp_path / "run" / "x" / "y"):
        with pytest.raises(UserError, match="is inside the run folder"):
            RunFolder(inner).status(config_of(inner))
        assert not inner.exists()


def test_a_linked_run_folder_is_replaced_behind_the_link(tmp_path: Path) -> None:
    RunFolder(tmp_path / "real").claim(config_of(tmp_path / "real"))
    (tmp_path / "real" / "metrics.jsonl").touch()
    (tmp_path / "real" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    RunFolder(tmp_path / "link").claim(config_of(tmp_path / "link"))
    assert sorted(path.name for path in (tmp_path / "real").iterdir()) == [
        ".lock",
        "config.yaml",
        "notes.txt",
        "run.json",
    ]
    (tmp_path / "real" / "adapters").symlink_to(tmp_path)
    with pytest.raises(UserError, match="adapters in it is a link to another folder"):
        RunFolder(tmp_path / "link").claim(config_of(tmp_path / "link"))


def test_a_pattern_of_one_level_does_not_find_the_runs_own_files_either(tmp_path: Path) -> None:
    run = tmp_path / "outputs" / "run"
    for train in (
        f"{tmp_path}/outputs/*/*.jsonl",
        f"{tmp_path}/*/run/metrics.jsonl",
        {"folder": str(run), "glob": "eval/*.json"},
    ):
        with pytest.raises(UserError, match="would match the run's own files"):
            RunFolder(run).status(config_of(run, train=train))
    for train in (
        f"{tmp_path}/*/*.jsonl",
        f"{tmp_path}/outputs/other/*.jsonl",
        f"{tmp_path}/outputs/*/rows-*.jsonl",
    ):
        assert RunFolder(run).status(config_of(run, train=train)) == "new"
