"""A run whose tasks split_by makes: trained, resumed, and evaluated from its own configuration."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from tests.e2e.conftest import Launch


def test_tasks_made_of_a_column_train_and_the_run_is_kept_when_it_is_resumed(
    recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    rows = []
    for i in range(40):
        rows.append(
            {
                "prompt": "abcd"[i % 4],
                "completion": "abcdabcd"[i % 4 :],
                "kind": "first" if i % 2 else "second one",
            }
        )
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = yaml.safe_load(recipe.read_text())
    content["tasks"] = {"letters": {"train": str(tmp_path / "rows.jsonl"), "split_by": "kind"}}
    content["adapters"]["lora"]["tasks"] = ["letters_first"]
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(content))
    words = [
        f"recipe={tmp_path / 'split.yaml'}",
        f"output_dir={tmp_path / 'run'}",
        "training.steps=3",
        "evaluation.interval=null",
    ]
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run" / "adapters").iterdir()}
    families = {"flora", "ia3"}
    assert names == {
        "letters_first-lora",
        *(f"letters_{part}-{f}" for part in ("first", "second_one") for f in families),
    }
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {name: task["split_value"] for name, task in saved["tasks"].items()} == {
        "letters_first": "first",
        "letters_second_one": "second one",
    }
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = launch(*words, "resume=true")
    assert again.returncode == 0, again.stderr
    assert "finished" in again.stdout + again.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics
