"""flora-train evaluate with other data and other settings: results of their own, which say what was
changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_train import evaluate
from flora_train.cli import main
from flora_train.config.errors import UserError
from tests.e2e.conftest import Launch


@pytest.fixture(scope="module")
def run(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    done = launch(f"recipe={recipe}", f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"prompt": "ab"[i % 2], "completion": "cdefgh"[i % 3 :]} for i in range(17)]
    file = tmp_path / "other.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of a run's own results and adapters."""
    paths = [path for name in ("eval", "adapters") for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in paths}


@pytest.mark.parametrize("split", ["validation", "test"])
def test_other_rows_of_one_task_are_evaluated_and_named(
    run: Path, other_rows: Path, split: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(run)
    assert main(["evaluate", str(run), f"tasks.letters.{split}={other_rows}"]) == 0
    out, err = capsys.readouterr()
    assert "held-out bits per byte" in out
    assert "note: tasks.letters: gives other examples than the run was trained on" in err
    assert files_of(run) == before
    report = evaluate(str(run), [f"tasks.letters.{split}={other_rows}"])
    examples = {result.task: result.examples for result in report.results}
    own = {
        result["task"]: result["examples"]
        for result in json.loads((run / "eval" / "report.json").read_text())["results"]
    }
    assert examples == {**own, "letters": 17}
    assert f"Evaluated with tasks.letters.{split}={other_rows}." in report.facts.origin_differences
    assert any("tasks.letters: gives other examples" in line for line in report.not_measured)
    assert str(other_rows) in report.facts.config
    recorded = json.loads((run / "run.json").read_text())["allowed"][-1]
    assert (recorded["command"], recorded["differences"][0]) == (
        "evaluate",
        f"Evaluated with tasks.letters.{split}={other_rows}.",
    )


def test_other_settings_have_a_report_of_their_own(run: Path, other_rows: Path) -> None:
    before = files_of(run)
    wide, narrow = (evaluate(str(run), [f"evaluation.confidence={level}"]) for level in (0.99, 0.6))
    assert [report.results[0].confidence for report in (wide, narrow)] == [0.99, 0.6]
    assert wide.results[0].base.loss == narrow.results[0].base.loss
    assert files_of(run) == before
    folders = sorted(path.name for path in run.glob("eval-*") if (path / "report.html").exists())
    assert len(folders) >= 2
    patterns = json.loads((run / "run.json").read_text())["files"]["names"]
    assert all(f"{name}/report.html" in patterns for name in folders)


@pytest.mark.parametrize(
    ("word", "line"),
    [
        (
            "training.steps=3",
            (
                "training: cannot be changed for a run that is trained: "
                "give evaluation.KEY=VALUE or tasks.TASK.KEY="
            ),
        ),
        (
            "tasks.leters.validation=x",
            "tasks.leters: the run has no such task; there are digits or letters. Did you mean 'letters'?",
        ),
        ("evaluation.intervall=3", "evaluation.intervall: unknown key"),
        ("evaluation=3", "evaluation = 3: must hold keys: give evaluation.KEY=VALUE"),
        (
            "tasks.letters.validation=nowhere.jsonl",
            "tasks.letters.validation = 'nowhere.jsonl': no such file",
        ),
    ],
)
def test_a_wrong_change_is_one_clear_error(
    run: Path, word: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), word]) == 2
    assert line in capsys.readouterr().err


def test_other_rows_of_a_task_that_was_not_named_are_still_refused(
    run: Path, recipe: Path, other_rows: Path
) -> None:
    file = recipe.parent / "digits.jsonl"
    content = file.read_text()
    try:
        file.write_text(content.replace("0", "1"))
        with pytest.raises(UserError, match=r"tasks\.digits: gives other examples"):
            evaluate(str(run), [f"tasks.letters.validation={other_rows}"])
    finally:
        file.write_text(content)
