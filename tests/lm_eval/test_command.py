"""flora-train lm-eval: one pass over the requests, its files, and wrong input before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flora_train import run_context
from flora_train.cli import main
from flora_train.evaluation.harness.generation import Generator
from flora_train.evaluation.harness.scoring import Scorer
from tests.lm_eval.harness import CONTENDERS, our_tables


@pytest.fixture
def without_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model fails the test."""

    def load(*arguments: object, **options: object) -> None:
        pytest.fail("the model is loaded")

    monkeypatch.setattr(run_context, "load_base_model", load)


def complaint(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The only line on standard error."""
    capsys.readouterr()
    assert main(["lm-eval", *words]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "task": (("--tasks", "leters_choice"), "--tasks = 'leters_choice': no task, group or tag of lm_eval"),
    "suggestion": (("--tasks", "leters_choice"), "Did you mean 'letters_choice'?"),
    "file": (("--tasks", "no_such.yaml"), "--tasks = 'no_such.yaml': no such file"),
    "adapter": (("letters-lroa", "--tasks", "letters_choice"), "Did you mean 'letters-lora'?"),
    "output": (("--tasks", "letters_choice", "--output", "."), "--output = '.': is a folder"),
    "output_place": (("--tasks", "letters_choice", "--output", "/proc/x/y.json"), "/proc/x"),
    "template": (("--tasks", "letters_choice", "--apply-chat-template"), "has no chat template"),
    "limit": (("--tasks", "letters_choice", "--limit", "0"), "limit"),
    "examples": (("--tasks", "letters_choice", "--num-fewshot", "-1"), "num_fewshot"),
    "data": (("--tasks", "letters_missing"), "lm_eval cannot prepare these tasks"),
    "column": (("--tasks", "letters_column"), "lm_eval cannot prepare these tasks"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_error_before_the_model_is_loaded(
    case: str, run: Path, task_folder: Path, capsys: pytest.CaptureFixture[str], without_model: None
) -> None:
    words, message = WRONG[case]
    write_wrong_tasks(task_folder)
    assert message in complaint(capsys, str(run), *words, "--include-path", str(task_folder))


def test_a_folder_that_is_no_run_and_a_missing_folder_of_tasks_are_errors(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], without_model: None
) -> None:
    assert "is not a run folder" in complaint(capsys, str(tmp_path), "--tasks", "letters_choice")
    words = ("--tasks", "letters_choice", "--include-path", str(tmp_path / "none"))
    assert "no such folder" in complaint(capsys, str(run), *words)


def test_settings_of_generation_that_leave_no_room_are_an_error(
    run: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (task_folder / "letters_write.yaml").read_text()
    for name, old, new in (
        ("letters_long", "max_gen_toks: 12", "max_gen_toks: 128"),
        ("letters_beams", "max_gen_toks: 12", "max_gen_toks: 12, num_beams: 3"),
    ):
        (task_folder / f"{name}.yaml").write_text(text.replace("letters_write", name).replace(old, new))
    words = (str(run), "--include-path", str(task_folder), "--tasks")
    assert "max_gen_toks = 128 must be at least 1, and less" in complaint(capsys, *words, "letters_long")
    assert "beam_search is not supported" in complaint(capsys, *words, "letters_beams")


def test_all_contenders_are_answered_in_one_pass(
    run: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[tuple[str, int, int]] = []
    score, generate = Scorer.score, Generator.generate

    def scored(self: Scorer, pairs: Any, contenders: Any, **options: Any) -> Any:
        passes.append(("score", len(pairs), len(contenders)))
        return score(self, pairs, contenders, **options)

    def generated(self: Generator, prompts: Any, contenders: Any, **options: Any) -> Any:
        passes.append(("generate", len(prompts), len(contenders)))
        return generate(self, prompts, contenders, **options)

    monkeypatch.setattr(Scorer, "score", scored)
    monkeypatch.setattr(Generator, "generate", generated)
    tables = our_tables(
        capsys,
        str(run),
        "--tasks=letters_choice,letters_write,letters_sampled",
        f"--include-path={task_folder}",
    )
    assert list(tables) == CONTENDERS
    assert passes == [("score", 24 * 4, 4), ("generate", 24 + 24 * 2, 4)]


def test_chosen_adapters_stand_beside_the_base_and_results_are_written(
    run: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    tables = our_tables(
        capsys,
        str(run),
        "letters-lora",
        "--tasks=letters_choice",
        f"--include-path={task_folder}",
        f"--output={output}",
    )
    assert list(tables) == ["base", "letters-lora"]
    written = json.loads(output.read_text())
    assert list(written["contenders"]) == ["base", "letters-lora"]
    assert written["requests"] == 96
    assert written["contenders"]["base"]["n-samples"]["letters_choice"] == {"original": 24, "effective": 24}
    for name, table in tables.items():
        value = written["contenders"][name]["results"]["letters_choice"]["acc,none"]
        assert f"{value:.4f}" in table


def write_wrong_tasks(folder: Path) -> None:
    """Tasks whose data are missing, and whose text names a column that there is not."""
    text = (folder / "letters_choice.yaml").read_text()
    missing = text.replace("letters_choice", "letters_missing").replace("letters.jsonl", "nowhere.jsonl")
    (folder / "letters_missing.yaml").write_text(missing)
    column = text.replace("letters_choice", "letters_column").replace("{{start}}", "{{nothing.at.all}}")
    (folder / "letters_column.yaml").write_text(column)
