"""A task is added to a finished run: its adapters are trained, the others' files stay unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Launch

MORE = [{"prompt": "z", "completion": "yxwvutsr"[: 3 + i % 5]} for i in range(40)]


def adapters(run: Path) -> dict[str, bytes]:
    return {file.parent.name: file.read_bytes() for file in (run / "adapters").rglob("*.safetensors")}


def test_a_task_joins_a_finished_run(recipe: Path, launch: Launch, tmp_path: Path) -> None:
    run, rows = tmp_path / "run", tmp_path / "more.jsonl"
    rows.write_text("\n".join(map(json.dumps, MORE)))
    words = [f"recipe={recipe}", f"output_dir={run}", "resume=true"]
    assert launch(*words, processes=2).returncode == 0
    before, kept = adapters(run), json.loads((run / "eval" / "report.json").read_text())
    done = launch(*words, f"tasks.more.train={rows}", processes=2)
    assert done.returncode == 0, done.stderr
    assert "more join after step 12; 6 adapters stay unchanged" in done.stderr
    after, report = adapters(run), json.loads((run / "eval" / "report.json").read_text())
    assert after.keys() - before.keys() == {"more-flora", "more-lora", "more-ia3"}
    assert {name: after[name] for name in before} == before
    now = {result["task"]: result for result in report["results"]}
    assert [result["task"] for result in kept["results"]] == ["letters", "digits"]
    for result in kept["results"]:
        assert now[result["task"]]["contenders"] == result["contenders"]
    targets = {task["name"]: task["target_share"] for task in report["tasks"]}
    assert targets == pytest.approx(
        {"letters": 0.25, "digits": 0.25, "more": 0.5}, abs=0.02
    )  # two had the first half, one the second
    new = {
        contender["family"]: contender["bits_per_byte"]["value"] for contender in now["more"]["contenders"]
    }
    assert new["lora"] < now["more"]["base"]["bits_per_byte"]["value"]
    assert launch(*words, f"tasks.more.train={rows}").returncode == 0  # finished, and kept
    assert adapters(run) == after
    other = launch(*words, f"tasks.more.train={rows}", "adapters.lora.rank=3")
    assert other.returncode != 0
    assert "adapters.lora.rank = 3: was 2 when the run" in other.stderr
    used = launch(*words, f"tasks.more.train={rows}", f"tasks.letters.train={rows}")
    assert used.returncode != 0
    assert "error: tasks.letters.train.files = " in used.stderr
    assert adapters(run) == after
