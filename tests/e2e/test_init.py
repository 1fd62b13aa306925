"""flora-train init: the recipe that it writes for somebody's files runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_train.cli import main
from flora_train.config.load import load_config
from tests.e2e.conftest import Launch


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [{"question": "abc"[i % 3] * 3, "answer": "cab"[i % 3] * (3 + i % 4)} for i in range(60)]
    (tmp_path / "support.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "notes.csv").write_text("text,author\n" + "\n".join(f"abc {i},me" for i in range(40)))
    (tmp_path / "src").mkdir()
    for i in range(30):
        (tmp_path / "src" / f"{i}.py").write_text(f"a = {i}\nb = a + {i}\n")
    (tmp_path / "src" / "other.md").write_text("x")
    return tmp_path


def test_a_recipe_for_files_and_folders_runs_as_it_stands(
    files: Path, checkpoint: Path, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = files / "mine.yaml"
    words = [str(files / name) for name in ("support.jsonl", "notes.csv", "src")]
    assert main(["init", *words, "--model", str(checkpoint), "--out", str(out), "--name", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "60 rows, answer is learnt after question" in shown
    assert "40 rows, text is learnt whole; not used: author" in shown
    assert "40 rows, text is learnt whole; not used: author" in out.read_text()
    assert "30 files .py, learnt whole" in shown
    config = load_config([f"recipe={out}"])
    assert list(config.tasks) == ["support", "notes", "src"]
    assert (config.tasks["support"].prompt, config.tasks["support"].completion) == ("{question}", "\n{answer}")
    assert 20 <= config.training.steps <= 1000
    done = launch(f"recipe={out}", f"output_dir={files / 'run'}", "training.steps=5")
    assert done.returncode == 0, done.stderr
    assert len(list((files / "run" / "adapters").iterdir())) == 9


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["absent.jsonl"], "source = 'absent.jsonl': no such file"),
        (["other.jsonl"], "other.jsonl: has the columns left or right: which is asked and which is learnt cannot be told"),
        (["clips.tsv"], "clips.tsv: holds clips (path) with transcripts (sentence): say in which language, --language cs"),
        (["empty"], "empty: holds no files"),
        (["support.jsonl", "src/support.jsonl"], "would be a second task support"),
        (["support.jsonl", "--out", "support.jsonl"], "out = 'support.jsonl': exists already"),
        (["support.jsonl", "--modle", "x"], "modle: unknown key"),
    ],
)
def test_what_cannot_be_a_task_is_said_before_anything_is_written(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    monkeypatch.chdir(files)
    (files / "other.jsonl").write_text('{"left": "a", "right": "b"}')
    (files / "clips.tsv").write_text("path\tsentence\na.mp3\tahoj\n")
    (files / "empty").mkdir()
    (files / "src" / "support.jsonl").write_text('{"text": "a"}')
    before = sorted(files.rglob("*"))
    assert main(["init", *words]) == 2
    assert line in capsys.readouterr().err
    assert sorted(files.rglob("*")) == before


def test_names_of_columns_and_files_do_not_break_the_recipe(
    files: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"prompt": "a", "completion": "b" * (1 + i % 5), "\x1b[31mnote\u2028": "c"} for i in range(40)]
    (files / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (files / "here").mkdir()
    for i in range(30):
        (files / "here" / f"{i}.[a]").write_text("abc " * 9)
    monkeypatch.chdir(files / "here")
    for source, out in (("../notes.jsonl", files / "columns.yaml"), (".", files / "endings.yaml")):
        assert main(["init", source, "--model", str(checkpoint), "--out", str(out)]) == 0
        assert list(load_config([f"recipe={out}"]).tasks) == ["notes" if source != "." else "here"]
