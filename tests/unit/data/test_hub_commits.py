"""The commits of the hub repositories that a run reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flora_train.config.load import validate
from flora_train.data.hub_commits import resolve_commits
from tests.hub_server import Hub, serve
from tests.hub_server.client import use_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("code", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text('{"content": "x"}\n', encoding="utf-8")
    with serve() as hub:
        for name in ("code", "other"):
            hub.add_folder(f"me/{name}", tmp_path / name, "dataset")
        use_hub(monkeypatch, hub, tmp_path / "cache")
        yield hub


def test_only_what_adapters_learn_is_asked_for_and_each_repository_once(hub: Hub) -> None:
    def task(name: str) -> dict[str, object]:
        return {"train": {"hub": name}, "text": "content"}

    config = validate(
        {
            "name": "run",
            "model": {"path": "assets/models/smollm2-135m"},
            "tasks": {"a": task("me/code"), "b": task("me/code"), "c": task("me/other")},
            "adapters": {"lora": {"method": "lora", "lr": 1e-3, "tasks": ["a", "b"]}},
            "training": {"steps": 1},
        }
    )
    commits = resolve_commits(config, {})
    assert list(commits) == ["datasets/me/code@main"]
    asked = [path for _, path in hub.asked if path.startswith("/api/datasets/")]
    assert asked == ["/api/datasets/me/code"]
