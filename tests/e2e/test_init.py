"""flora-train init: the recipe that it writes for somebody's files runs as it stands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flora_train.cli import main
from flora_train.config.load import load_config
from tests.e2e.conftest import Launch
from tests.speech import save_tiny_whisper, write_clip


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
    assert (config.tasks["support"].prompt, config.tasks["support"].completion) == (
        "{question}",
        "\n{answer}",
    )
    assert 20 <= config.training.steps <= 1000
    done = launch(f"recipe={out}", f"output_dir={files / 'run'}", "training.steps=5")
    assert done.returncode == 0, done.stderr
    assert len(list((files / "run" / "adapters").iterdir())) == 9


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["absent.jsonl"], "source = 'absent.jsonl': no such file"),
        (
            ["other.jsonl"],
            "other.jsonl: has the columns left or right, of which none is known as a prompt or a completion",
        ),
        (
            ["clips.tsv"],
            (
                "clips.tsv: holds clips (path) with transcripts (sentence), and "
                "their language is not known: give --language cs"
            ),
        ),
        (["empty"], "empty: holds no files"),
        (["support.jsonl", "src/support.jsonl"], "would be a second task support"),
        (["support.jsonl", "--out", "support.jsonl"], "out = 'support.jsonl': exists already"),
        (["support.jsonl", "--modle", "x"], "--modle: unknown option"),
    ],
)
def test_files_that_cannot_be_a_task_are_refused_before_anything_is_written(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    line: str,
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


def test_the_run_is_named_after_its_recipe(
    files: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    for words, name in (
        (["--out", "my first.run.yaml"], "my_first_run"),
        ([], "support"),
        (["--name", "x"], "x"),
    ):
        assert main(["init", "support.jsonl", "--model", str(checkpoint), *words]) == 0
        out = words[1] if words[:1] == ["--out"] else f"{name}.yaml"
        assert load_config([f"recipe={out}"]).name == name


def test_a_column_of_customers_makes_a_task_of_each(
    files: Path, checkpoint: Path, launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": f"a {i} b" * 3, "customer": ("good", "bad")[i % 2], "id": i, "day": str(i % 7)}
        for i in range(40)
    ]
    (files / "reviews.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = files / "labels.yaml"
    assert main(["init", str(files / "reviews.jsonl"), "--model", str(checkpoint), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert (
        "40 rows, text is learnt whole; one task for each customer: good 20, bad 20; not used: id, day"
        in shown
    )
    assert "6 adapters" in shown
    assert load_config([f"recipe={out}"]).tasks["reviews"].split_by == "customer"
    done = launch(f"recipe={out}", f"output_dir={files / 'run'}", "training.steps=3")
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (files / "run" / "adapters").iterdir())
    assert names == [
        f"reviews_{label}-{family}" for label in ("bad", "good") for family in ("flora", "ia3", "lora")
    ]


LABELLED: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "reviews": (
        [{"text": f"a {i}", "label": "yes" if i % 3 else "no", "day": f"day {i}"} for i in range(30)],
        {"text": "text", "label": "label"},
        "30 rows, of which label labels text: yes 20, no 10; not used: day",
    ),
    "entailment": (
        [{"premise": f"a {i}", "hypothesis": f"b {i}", "label": i % 3} for i in range(30)],
        {"text": ["premise", "hypothesis"], "label": "label"},
        "30 rows, of which label labels premise and hypothesis: 0 10, 1 10, 2 10",
    ),
    "similarity": (
        [{"sentence1": f"a {i}", "sentence2": f"b {i}", "score": i / 4} for i in range(30)],
        {"text": ["sentence1", "sentence2"], "label": "score", "regression": True},
        "30 rows, score is a number that is predicted from sentence1 and sentence2",
    ),
    "films": (
        [{"description": f"a {i}", "labels": ["war"] * (i % 2) + ["love"] * (i % 3 > 0)} for i in range(30)],
        {"text": "description", "label": "labels", "multi_label": True},
        "with any number of: love 20, war 15",
    ),
    "names": (
        [{"tokens": ["Ann", "sees", "it"], "ner_tags": ["B-PER", "O", "O"]} for _ in range(30)],
        {"text": "tokens", "token_labels": "ner_tags"},
        "30 rows, of which ner_tags labels each of the tokens: O 60, B-PER 30",
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_labelled_texts_become_a_task_of_labels(
    name: str, files: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, keys, description = LABELLED[name]
    source, out = files / f"{name}.jsonl", files / f"{name}.yaml"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert main(["init", str(source), "--model", str(checkpoint), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert description in shown
    assert "3 adapters" in shown
    task = load_config([f"recipe={out}"]).tasks[name]
    assert {key: getattr(task, key) for key in keys} == keys
    assert task.split_by is None
    assert task.has_head


def test_completions_with_a_category_are_no_labelled_texts(
    files: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"a {i}", "completion": "b", "category": "xy"[i % 2]} for i in range(40)]
    (files / "dolly.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = files / "dolly.yaml"
    assert main(["init", str(files / "dolly.jsonl"), "--model", str(checkpoint), "--out", str(out)]) == 0
    task = load_config([f"recipe={out}"]).tasks["dolly"]
    assert (task.split_by, task.is_labelled) == ("category", False)


def test_a_column_that_may_not_hold_labels_is_mentioned_and_splits_nothing(
    files: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"a {i} b" * 3, "kind": ("file", "function")[i % 2]} for i in range(40)]
    (files / "code.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = files / "kinds.yaml"
    assert main(["init", str(files / "code.jsonl"), "--model", str(checkpoint), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "not used: kind; split_by: kind would make a task of each of its 2 values" in shown
    assert "3 adapters" in shown
    assert load_config([f"recipe={out}"]).tasks["code"].split_by is None


def test_folders_of_languages_make_a_speech_task_each(
    files: Path, launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny_whisper(files / "whisper")
    for language in ("en", "cs_CZ"):
        for i in range(12):
            write_clip(files / "voices" / language / f"{i}.wav", 0.3 + 0.1 * (i % 5), seed=i)
        lines = [f"{i}.wav\tone fish {i}" for i in range(12)]
        (files / "voices" / language / "clips.tsv").write_text("path\tsentence\n" + "\n".join(lines) + "\n")
    monkeypatch.chdir(files)
    assert main(["init", str(files / "voices"), "--model", str(model), "--out", "voices.yaml"]) == 0
    assert "12 clips in cs" in capsys.readouterr().out
    config = load_config(["recipe=voices.yaml"])
    languages = {name: task.speech.language for name, task in config.tasks.items() if task.speech is not None}
    assert (config.name, languages) == ("voices", {"cs_CZ": "cs", "en": "en"})
    run = files / "run"
    done = launch(
        f"recipe={files / 'voices.yaml'}",
        f"output_dir={run}",
        "training.steps=2",
        "evaluation.max_new_tokens=8",
    )
    assert done.returncode == 0, done.stderr
    assert len(list((run / "adapters").iterdir())) == 6
    assert main(["init", "voices/en", "--model", str(model), "--out", "one.yaml"]) == 0
    assert list(load_config(["recipe=one.yaml"]).tasks) == ["en"]
    (files / "voices" / "en").rename(files / "voices" / "recordings")
    capsys.readouterr()
    assert main(["init", "voices", "--model", str(model), "--out", "two.yaml"]) == 2
    assert (
        "their language is not known: give --language cs, for example, or a folder that is named by"
        in capsys.readouterr().err
    )


EMBEDDED: dict[str, tuple[list[dict[str, object]], dict[str, object], str]] = {
    "pairs": (
        [{"anchor": f"a {i}", "positive": f"b {i}", "day": f"day {i}"} for i in range(30)],
        {"anchor": "anchor", "positive": "positive", "negative": None},
        "30 pairs, positive belongs to anchor (embeddings); not used: day",
    ),
    "triplets": (
        [{"query": f"a {i}", "positive": f"b {i}", "negative": f"c {i}"} for i in range(30)],
        {"anchor": "query", "positive": "positive", "negative": "negative"},
        "30 triplets, positive belongs to query and negative does not (embeddings)",
    ),
    "paraphrases": (
        [{"sentence1": f"a {i}", "sentence2": f"b {i}"} for i in range(6)],
        {"anchor": "sentence1", "positive": "sentence2", "negative": None},
        "6 pairs, sentence2 belongs to sentence1 (embeddings)",
    ),
    "customers": (
        [{"query": f"a {i}", "passage": f"b {i}", "customer": "xy"[i % 2]} for i in range(24)],
        {"anchor": "query", "positive": "passage", "split_by": "customer"},
        "24 pairs, passage belongs to query (embeddings); one task for each customer: x 12, y 12",
    ),
    "some_negatives": (
        [{"anchor": f"a {i}", "positive": f"b {i}", "negative": "c" * (i % 2)} for i in range(30)],
        {"anchor": "anchor", "positive": "positive", "negative": None},
        "30 pairs, positive belongs to anchor (embeddings); not used: negative",
    ),
}


@pytest.mark.parametrize("name", EMBEDDED)
def test_pairs_and_triplets_become_a_task_of_embeddings(
    name: str, files: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, keys, description = EMBEDDED[name]
    source, out = files / f"{name}.jsonl", files / f"{name}.yaml"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert main(["init", str(source), "--model", str(checkpoint), "--out", str(out)]) == 0
    assert description in capsys.readouterr().out
    config = load_config([f"recipe={out}"])
    task = config.tasks[name]
    assert {key: getattr(task, key) for key in keys} == keys
    assert task.embeds
    assert config.mixture.examples_per_draw == 16
    assert main(["data", f"recipe={out}"]) == 0
    assert "pairs are compared with the others of a draw" in out.read_text()


def test_a_recipe_of_pairs_trains(files: Path, checkpoint: Path, launch: Launch) -> None:
    rows, _, _ = EMBEDDED["triplets"]
    source, out = files / "find.jsonl", files / "find.yaml"
    source.write_text("\n".join(map(json.dumps, rows)))
    assert main(["init", str(source), "--model", str(checkpoint), "--out", str(out)]) == 0
    done = launch(f"recipe={out}", f"output_dir={files / 'found'}", "training.steps=2")
    assert done.returncode == 0, done.stderr
    assert (files / "found" / "adapters" / "find-lora" / "modules.json").exists()


def test_questions_with_answers_and_labelled_pairs_are_no_embeddings(files: Path, checkpoint: Path) -> None:
    cases: dict[str, list[dict[str, object]]] = {
        "answers": [{"question": f"a {i}", "answer": f"b {i}"} for i in range(30)],
        "labelled": [{"sentence1": f"a {i}", "sentence2": f"b {i}", "label": i % 2} for i in range(30)],
    }
    for name, rows in cases.items():
        source, out = files / f"{name}.jsonl", files / f"{name}.yaml"
        source.write_text("\n".join(map(json.dumps, rows)))
        assert main(["init", str(source), "--model", str(checkpoint), "--out", str(out)]) == 0
        assert not load_config([f"recipe={out}"]).tasks[name].embeds
