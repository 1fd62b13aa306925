"""Whole runs on embeddings: pairs and triplets beside text and on an encoder, processes and kills."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from flora_train.cli import main
from tests.e2e.conftest import Launch
from tests.e2e.test_resume import Kill, kill_after
from tests.embedding_runs import (
    ADAPTERS,
    PAIRS,
    TRIPLETS,
    save_tiny_encoder,
    triplet,
    write_recipe,
    write_rows,
)

__all__ = ["kill_after"]


@pytest.fixture(scope="module")
def recipes(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> dict[str, Path]:
    """Kind of base -> a recipe of pairs and triplets, on a decoder with a task of text beside them."""
    of_decoder = {
        "pairs": {**PAIRS, "pooling": "mean"},
        "triplets": {**TRIPLETS, "pooling": "last", "symmetric": True},
        "text": {"text": "text"},
    }
    of_encoder = {
        "pairs": {**PAIRS, "pooling": "mean", "symmetric": True},
        "triplets": {**TRIPLETS, "pooling": "cls", "temperature": 0.1},
    }
    folders = [tmp_path_factory.mktemp(name) for name in ("decoder", "encoder")]
    encoder = save_tiny_encoder(tmp_path_factory.mktemp("model") / "bert")
    adapters = {name: dict(entry) for name, entry in ADAPTERS.items()}
    adapters["flora"]["lr"] = 0.3  # its weights are small
    adapters["ia3"] |= {"target_modules": ["key", "value"], "feedforward_modules": []}
    return {
        "decoder": write_recipe(folders[0], checkpoint, of_decoder, ADAPTERS),
        "encoder": write_recipe(folders[1], encoder, of_encoder, adapters),
    }


@pytest.fixture(scope="module")
def finished(
    recipes: dict[str, Path], launch: Launch, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    runs = {}
    for kind, recipe in recipes.items():
        runs[kind] = tmp_path_factory.mktemp("finished") / kind
        done = launch(f"recipe={recipe}", f"output_dir={runs[kind]}")
        assert done.returncode == 0, done.stderr
    return runs


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def adapters_of(run: Path) -> dict[str, bytes]:
    files = sorted((run / "adapters").glob("*/adapter_model.safetensors"))
    return {file.parent.name: file.read_bytes() for file in files}


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_pairs_and_triplets_are_learnt_and_reported(kind: str, finished: dict[str, Path]) -> None:
    run = finished[kind]
    first, *_, last = records(run, "step")
    for name in ("pairs-lora", "triplets-lora", "pairs-flora", "triplets-flora"):
        assert last["adapters"][name]["loss"] < first["adapters"][name]["loss"], name
    evaluated = records(run, "evaluation")[-1]["adapters"]["pairs-lora"]
    assert set(evaluated) == {"loss", "recall_at_1", "mrr"}
    report = json.loads((run / "eval" / "report.json").read_text())
    figures = {(figure["task"], figure["figure"]): figure for figure in report["figures"]}
    assert set(figures) == {
        (task, name) for task in ("pairs", "triplets") for name in ("recall_at_1", "mrr", "contrastive_loss")
    }
    recall = figures["pairs", "recall_at_1"]
    assert [row["family"] for row in recall["contenders"]] == ["base", "lora", "flora", "pure", "ia3"]
    for row in recall["contenders"]:
        assert 0 <= row["value"]["low"] <= row["value"]["value"] <= row["value"]["high"] <= 1
    assert recall["examples"] == 20
    assert recall["setting"] == "mean pooling, 20 candidates"
    assert figures["triplets", "mrr"]["setting"].endswith("pooling, 40 candidates")
    assert [result["task"] for result in report["results"]] == ["text"] * (kind == "decoder")
    page = (run / "eval" / "report.html").read_text()
    assert "Recall at 1, higher is better." in page
    assert ("Held-out results" in page) == (kind == "decoder")


def test_two_processes_equal_one(
    recipes: dict[str, Path], finished: dict[str, Path], launch: Launch, tmp_path: Path
) -> None:
    for kind, recipe in recipes.items():
        two = tmp_path / kind
        done = launch(f"recipe={recipe}", f"output_dir={two}", processes=2)
        assert done.returncode == 0, done.stderr
        assert largest_difference(finished[kind], two) <= 1e-6
        figures = [json.loads((run / "eval" / "report.json").read_text()) for run in (finished[kind], two)]
        values = [[row["contenders"][1]["value"]["value"] for row in one["figures"]] for one in figures]
        assert values[0] == pytest.approx(values[1], abs=1e-4)


def test_two_processes_that_divide_the_base_equal_one(
    recipes: dict[str, Path], finished: dict[str, Path], launch: Launch, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    done = launch(f"recipe={recipes['decoder']}", f"output_dir={two}", "model.fsdp=true", processes=2)
    assert done.returncode == 0, done.stderr
    assert largest_difference(finished["decoder"], two) <= 1e-6


def largest_difference(run: Path, other: Path) -> float:
    differences = []
    for name in adapters_of(run):
        file = f"adapters/{name}/adapter_model.safetensors"
        left, right = load_file(run / file), load_file(other / file)
        differences += [float((left[key] - right[key]).abs().max()) for key in left]
    return max(differences)


def test_a_killed_run_resumes_to_the_same_bytes(
    recipes: dict[str, Path], launch: Launch, kill_after: Kill, tmp_path: Path
) -> None:
    words = (f"recipe={recipes['decoder']}", "training.steps=60", "evaluation.interval=20")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert launch(*words, f"output_dir={whole}").returncode == 0
    kill_after(9, parts, *words, f"output_dir={parts}", "resume=true")
    last = launch(*words, f"output_dir={parts}", "resume=true")
    assert last.returncode == 0, last.stderr
    assert "resuming after step" in last.stderr
    assert adapters_of(parts) == adapters_of(whole)


def test_an_adapter_begins_with_an_exported_one(
    recipes: dict[str, Path], finished: dict[str, Path], launch: Launch, tmp_path: Path
) -> None:
    """Its names are those of the model's body."""
    for kind, recipe in recipes.items():
        run = tmp_path / kind
        source = f"adapters.lora.init_from={finished[kind]}/adapters/pairs-lora"
        others = [f"adapters.{name}=null" for name in ("flora", "pure", "ia3")]
        words = [*others, "adapters.lora.rank=null", source, "training.steps=3", "evaluation.interval=2"]
        done = launch(f"recipe={recipe}", f"output_dir={run}", *words)
        assert done.returncode == 0, done.stderr
        before = records(run, "evaluation")[0]
        after = records(finished[kind], "evaluation")[-1]
        report = json.loads((finished[kind] / "eval" / "report.json").read_text())
        selected = {row["name"]: row["selected_step"] for row in report["adapters"]}
        if selected["pairs-lora"] == after["step"]:
            loss = after["adapters"]["pairs-lora"]["loss"]
            assert before["adapters"]["pairs-lora"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_a_plan_measures_embeddings(
    recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, recipe in recipes.items():
        assert main(["plan", f"recipe={recipe}", f"output_dir={tmp_path / kind}"]) == 0
        assert "activations of a micro-batch" in capsys.readouterr().out


def test_data_shows_the_texts_of_a_row(
    recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"recipe={recipes['decoder']}", f"output_dir={tmp_path / 'run'}", "--task", "triplets"]
    assert main(["data", *words, "--examples", "1"]) == 0
    out = capsys.readouterr().out
    for name, begin in (("anchor", "find: where is"), ("positive", "in the"), ("negative", "in the")):
        letters = " ".join(begin)  # which are the tokens
        assert re.search(rf"{name}, \d+ tokens\n\| {letters}", out), out
    assert "learnt tokens" not in out


@pytest.fixture
def refuse(
    recipes: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Any:
    """Train on these rows with these settings; returns the problems."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def refuse(kind: str, task: str, rows: list[dict[str, Any]] | None, *words: str) -> str:
        names = {"decoder": ("pairs", "triplets", "text"), "encoder": ("pairs", "triplets")}[kind]
        others = [f"tasks.{name}=null" for name in names if name != task]
        words = (f"recipe={recipes[kind]}", f"output_dir={tmp_path / 'run'}", *others, *words)
        if rows is not None:
            words += (f"tasks.{task}.train={write_rows(tmp_path / 'rows.jsonl', rows)}",)
        assert main(["train", *words]) == 2
        return capfd.readouterr().err

    return refuse


ROWS = [triplet(number) for number in range(20)]


def without(row: dict[str, str], column: str) -> dict[str, str]:
    return {name: value for name, value in row.items() if name != column}


def test_bad_rows_are_named_with_file_and_number(refuse: Any) -> None:
    missing = [*ROWS[:3], without(ROWS[3], "answer"), *ROWS[4:]]
    told = refuse("decoder", "pairs", missing)
    assert "tasks.pairs.positive = 'answer': has no 'answer' in rows.jsonl, row 4" in told
    same = [*ROWS[:16], {**ROWS[16], "answer": ROWS[16]["question"]}, *ROWS[17:]]
    told = refuse("decoder", "pairs", same)
    assert "tasks.pairs.positive = 'answer': is the same text as anchor in rows.jsonl, row 17" in told
    for lacking in (without(ROWS[7], "wrong"), {**ROWS[7], "wrong": None}, {**ROWS[7], "wrong": " "}):
        told = refuse("decoder", "triplets", [*ROWS[:7], lacking, *ROWS[8:]])
        assert re.search(r"tasks.triplets.negative = 'wrong': .* in rows.jsonl, row 8, and all rows", told)
    equal = [*ROWS[:2], {**ROWS[2], "wrong": ROWS[2]["answer"]}, *ROWS[3:]]
    told = refuse("decoder", "triplets", equal)
    assert "tasks.triplets.negative = 'wrong': is the same text as positive in rows.jsonl, row 3" in told
    nested = [*ROWS[:2], {**ROWS[2], "answer": ["a", "b"]}, *ROWS[3:]]
    assert "rows.jsonl, row 3: column 'answer' holds a list" in refuse("decoder", "pairs", nested)
    absent = [without(row, "question") for row in ROWS]
    told = refuse("decoder", "pairs", absent)
    assert "tasks.pairs.anchor = 'question': 'question' is not a column of the training rows" in told


def test_blank_rows_are_left_out_and_counted(
    recipes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So are, on a tokenizer of lower case, texts that differ in their case only."""
    rows = [*ROWS, {**ROWS[0], "question": "  "}, {**ROWS[1], "answer": ""}]
    cased = {**ROWS[2], "answer": ROWS[2]["question"].upper()}
    for kind, left_out in (("decoder", 2), ("encoder", 3)):
        file = write_rows(tmp_path / f"{kind}.jsonl", [*rows, cased])
        words = [f"recipe={recipes[kind]}", f"output_dir={tmp_path / 'run'}", f"tasks.pairs.train={file}"]
        assert main(["data", *words, "--task", "pairs"]) == 0
        out = capsys.readouterr().out
        assert re.search(rf"left out: without text to learn +{left_out} ", out), out
        assert re.search(rf"pairs +{23 - left_out} +20\n", out), out


@pytest.mark.parametrize(
    ("task", "words", "problem"),
    [
        ("pairs", ["tasks.pairs.temperature=0"], "tasks.pairs.temperature = 0: must be at least 0.0001"),
        ("pairs", ["tasks.pairs.temperature=-1"], "tasks.pairs.temperature = -1: must be at least 0.0001"),
        ("pairs", ["tasks.pairs.pooling=max"], "tasks.pairs.pooling = 'max'"),
        ("pairs", ["tasks.pairs.pooling=cls"], "tasks.pairs.pooling = 'cls': is the first token, which in a"),
        (
            "pairs",
            ["tasks.pairs.positive=question"],
            "tasks.pairs.positive = 'question': is the same as",
        ),
        ("pairs", ["tasks.pairs.positive=null"], "tasks.pairs.positive: is missing, and anchor is given"),
        ("pairs", ["tasks.pairs.packing=true"], "tasks.pairs.packing = True: has no meaning for embeddings"),
        ("pairs", ["tasks.pairs.truncation=split"], "tasks.pairs.truncation = 'split': cannot divide texts"),
        ("pairs", ["tasks.pairs.text=text"], "tasks.pairs.text = 'text': has no meaning for embeddings"),
        ("pairs", ["tasks.pairs.objective=dpo"], "tasks.pairs.anchor = 'question': makes this a task of emb"),
        ("pairs", ["tasks.pairs.sample_prompts=[a]"], "tasks.pairs.sample_prompts"),
        ("text", ["tasks.text.negative=wrong"], "tasks.text.negative = 'wrong': belongs to tasks of embed"),
        ("text", ["tasks.text.pooling=mean"], "tasks.text.pooling = 'mean': belongs to tasks of embeddings"),
        ("pairs", ["training.max_length=0"], "training.max_length = 0"),
        (
            "pairs",
            ["mixture.examples_per_draw=1"],
            "mixture.examples_per_draw = 1: is too small for the embeddings of tasks.pairs",
        ),
        (
            "triplets",
            ["mixture.examples_per_draw=1"],
            "mixture.examples_per_draw = 1: is too small for the embeddings of tasks.triplets",
        ),
        (
            "pairs",
            ["training.tokens_per_microbatch=200"],
            "training.tokens_per_microbatch = 200: cannot hold a draw of 4 examples of task 'pairs'",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(
    refuse: Any, task: str, words: list[str], problem: str
) -> None:
    assert problem in refuse("decoder", task, None, *words)


def test_one_held_out_pair_is_refused(refuse: Any) -> None:
    told = refuse("decoder", "pairs", ROWS[:8], "tasks.pairs.validation=null")
    assert "tasks.pairs.validation: has one pair" in told


def test_triplets_can_be_drawn_one_at_a_time(
    recipes: dict[str, Path], launch: Launch, tmp_path: Path
) -> None:
    """Each has a negative of its own."""
    words = ["tasks.triplets.symmetric=false", "tasks.pairs=null", "mixture.examples_per_draw=1"]
    others = [f"adapters.{name}=null" for name in ("flora", "pure", "ia3")]
    run = tmp_path / "run"
    done = launch(f"recipe={recipes['decoder']}", f"output_dir={run}", *words, *others)
    assert done.returncode == 0, done.stderr
    first, *_, last = records(run, "step")
    assert last["adapters"]["triplets-lora"]["loss"] < first["adapters"]["triplets-lora"]["loss"]
