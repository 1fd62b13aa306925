"""Runs of labelled texts: words of a verbalizer beside other tasks, from files to the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_train.cli import main
from flora_train.commands.evaluate import evaluate_run
from flora_train.evaluation.report.files import read_report
from flora_train.evaluation.report.types import Report
from flora_train.runtime.run_folder import RunFolder
from tests.e2e.chat_base import save_chat_base, write_recipe, write_rows


def films(count: int) -> list[dict[str, Any]]:
    """A third of the films are bad, which most of their letters tell."""
    rows = []
    for i in range(count):
        is_bad = i % 3 == 0
        letter = "b" if is_bad else "g"
        rows.append({"text": f"{4 * letter}{i % 7}", "label": "neg" if is_bad else "pos"})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_chat_base(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def recipe(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    train = write_rows(folder / "films.jsonl", films(60))
    tasks = {
        "words": {
            "train": train,
            "test": write_rows(folder / "held.jsonl", films(15)),
            "label": "label",
            "prompt": "{text}:",
            "verbalizer": {"neg": "no", "pos": "ok"},
            "metrics": ["tests.own_metrics:share", "perplexity"],
            "select_by": "accuracy",
        },
        "text": {"train": train, "text": "text"},
    }
    evaluation = {"interval": 20, "max_new_tokens": 8, "bootstrap_samples": 100}
    training = {"steps": 60, "tokens_per_step": 800, "tokens_per_microbatch": 800, "max_length": 64}
    return write_recipe(folder, base, tasks, name="words", training=training, evaluation=evaluation)


@pytest.fixture(scope="module")
def run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(["train", f"recipe={recipe}", f"output_dir={out}"]) == 0
    return out


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    return read_report(RunFolder(run))


def test_the_report_has_figures_of_labels_for_base_and_adapters(report: Report) -> None:
    figures = {figure.figure: figure for figure in report.figures if figure.task == "words"}
    assert {"accuracy", "balanced_accuracy", "macro_f1", "weighted_f1", "mcc", "auroc"} <= figures.keys()
    accuracy = figures["accuracy"]
    assert accuracy.examples == 15
    assert list(accuracy.by_family) == ["base", "flora", "lora"]
    majority = accuracy.baselines[0]
    assert (majority.name, majority.value.value) == ("majority label", pytest.approx(10 / 15))
    assert not any(figure.task == "text" for figure in report.figures)


def test_adapters_learn_the_words_of_labels(report: Report) -> None:
    figures = {figure.figure: figure for figure in report.figures}
    for family in ("flora", "lora"):
        assert figures["accuracy"].by_family[family].value.value == 1.0
        assert figures["auroc"].by_family[family].value.value == 1.0
    matrices = {matrix.family: matrix for matrix in report.confusions if matrix.task == "words"}
    assert matrices["lora"].labels == ("neg", "pos")
    assert [list(row) for row in matrices["lora"].counts] == [[5, 0], [0, 10]]


def test_other_test_rows_can_be_evaluated_later(run: Path, report: Report, tmp_path: Path) -> None:
    other = write_rows(tmp_path / "other.jsonl", films(6))
    later = evaluate_run(run, [f"tasks.words.test={other}"])
    figures = {figure.figure: figure for figure in later.figures}
    assert figures["accuracy"].examples == 6
    assert figures["accuracy"].by_family["lora"].value.value == 1.0
    bits = {result.task: result.base.bits_per_byte.value for result in report.results}
    others = {result.task: result for result in later.results}
    assert others["text"].base.bits_per_byte.value == bits["text"]
    assert others["words"].base.bits_per_byte.value != bits["words"]


def test_all_results_of_words_are_those_of_test_rows(report: Report) -> None:
    """Also bits per byte and perplexity."""
    (result,) = [result for result in report.results if result.task == "words"]
    assert result.examples == 15
    figures = {figure.figure: figure for figure in report.figures if figure.task == "words"}
    assert {figure.examples for figure in figures.values()} == {15}
    assert figures["perplexity"].by_family["lora"].value.value == pytest.approx(
        result.by_family["lora"].perplexity
    )


def test_a_function_of_the_users_own_is_called_with_labels(report: Report) -> None:
    figures = {figure.figure: figure for figure in report.figures if figure.task == "words"}
    own, known = figures["tests.own_metrics:share"], figures["accuracy"]
    assert own.by_family == known.by_family
    assert own.to_base == known.to_base
    assert own.baselines[0].value.value == pytest.approx(10 / 15)


def test_the_best_state_has_the_highest_accuracy_of_words(run: Path, report: Report) -> None:
    records = RunFolder(run).read_metrics("evaluation")
    assert [record["step"] for record in records] == [20, 40, 60]
    for adapter in report.adapters:
        if adapter.task == "words":
            accuracies = [record["adapters"][adapter.name]["accuracy"] for record in records]
            assert adapter.selected_step == 20 * (1 + accuracies.index(max(accuracies)))  # type: ignore[type-var]


BAD = [
    ({"verbalizer": {"neg": "no", "pos": "no"}}, "tasks.words.verbalizer", "the same word 'no'"),
    (
        {"verbalizer": {"neg": "no", "pos": "nope"}},
        "tasks.words.verbalizer",
        "begins with the tokens of 'no'",
    ),
    ({"verbalizer": {"neg": "no", "other": "yes"}}, "tasks.words.label", "films.jsonl, row 2"),
    ({"metrics": "rouge_l"}, "tasks.words.metrics", "is of text that is written"),
    ({"metrics": "my:f", "max_new_tokens": 4}, "tasks.words.max_new_tokens", "requires metrics of answers"),
    ({"regression": True}, "tasks.words.verbalizer", "remove one of them"),
    ({"labels": ["neg", "pos", "mixed"]}, "tasks.words.verbalizer", "no word for the label 'mixed'"),
]


@pytest.mark.parametrize(("change", "key", "message"), BAD)
def test_bad_words_are_an_error_before_the_model_is_loaded(
    change: dict[str, Any], key: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_chat_base(tmp_path / "model")
    (base / "model.safetensors").unlink()
    task = {
        "train": write_rows(tmp_path / "films.jsonl", films(20)),
        "label": "label",
        "prompt": "{text}:",
        "verbalizer": {"neg": "no", "pos": "ok"},
        **change,
    }
    recipe = write_recipe(tmp_path, base, {"words": task})
    assert main(["train", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}"]) == 2
    shown = capsys.readouterr().err
    assert key in shown
    assert message in shown
