"""Metrics that cannot be computed are refused before training, with one line each."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from flora_train.cli import main
from tests.e2e.test_bad_input import Complain, complain, model

__all__ = ["complain", "model"]  # fixtures

PROMPTS = [{"prompt": f"q {i}", "completion": f"a {i}"} for i in range(10)]
FUNCTIONS = """
def text(predictions, references):
    return "good"

def raises(predictions, references):
    return references[99]
"""


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with prompts, a function, and no compiled module, which would be a new file."""
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (tmp_path / "bad_test_metrics.py").write_text(FUNCTIONS)


@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (
            ["tasks.lua.metrics=[rouge_1]"],
            ["tasks.lua.metrics.0 = 'rouge_1': is not a metric; there are *. Did you mean 'rouge_l'?"],
        ),
        (
            ["tasks.lua.metrics=[rouge_l,rouge_l]"],
            ["tasks.lua.metrics = ['rouge_l', 'rouge_l']: names rouge_l twice: remove one"],
        ),
        (
            ["tasks.lua.metrics=my_metrics.py"],
            ["tasks.lua.metrics = 'my_metrics.py': is no function: write module:function, such as *"],
        ),
        (
            ["tasks.lua.metrics=exact_match"],
            ["tasks.lua.metrics = ['exact_match']: no held-out example has a prompt with a whole *"],
        ),
        (
            ["tasks.lua.metrics=no_such_module:f"],
            ["tasks.lua.metrics = 'no_such_module:f': there is no module no_such_module: *"],
        ),
        (
            [
                "tasks.lua.train=qa.jsonl",
                "tasks.lua.metrics=[bad_test_metrics:text,bad_test_metrics:none]",
            ],
            [
                "tasks.lua.metrics = 'bad_test_metrics:text': returned the text 'good' for 3 made texts: *",
                "tasks.lua.metrics = 'bad_test_metrics:none': bad_test_metrics has no none.",
            ],
        ),
        (
            ["tasks.lua.train=qa.jsonl", "tasks.lua.metrics=bad_test_metrics:raises"],
            ["tasks.lua.metrics = 'bad_test_metrics:raises': raised IndexError: list index out of range *"],
        ),
        (
            ["tasks.lua.train=qa.jsonl", "tasks.lua.metrics=rouge_l", "tasks.lua.max_new_tokens=100000"],
            ["tasks.lua.max_new_tokens = 100000: with a prompt of *"],
        ),
        (
            ["tasks.lua.max_metric_examples=3", "tasks.lua.metrics=perplexity"],
            ["tasks.lua.max_metric_examples = 3: requires metrics of answers, such as rouge_l: *"],
        ),
        (
            ["tasks.lua.metrics=rouge_l", "tasks.lua.objective=dpo"],
            ["tasks.lua.metrics = ['rouge_l']: is for prompts with completions: of preferences, rewards *"],
        ),
    ],
)
@pytest.mark.usefixtures("prompts")
def test_one_line_names_key_value_and_fix(complain: Complain, words: list[str], lines: list[str]) -> None:
    problems = complain("recipe=bad.yaml", *words)
    assert len(problems) == len(lines), problems
    for line, pattern in zip(problems, lines, strict=True):
        begin, star, end = pattern.partition("*")
        assert line.startswith(begin), line
        assert line.endswith(end) if star else line == pattern


@pytest.mark.usefixtures("prompts")
def test_without_sacrebleu_its_metrics_are_refused(
    complain: Complain, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *arguments: Any) -> Any:
        return None if name == "sacrebleu" else find_spec(name, *arguments)

    monkeypatch.setattr("flora_train.evaluation.answers.figures.find_spec", without)
    words = ["tasks.lua.train=qa.jsonl", "tasks.lua.metrics=[rouge_l,chrf,bleu]"]
    hint = "sacrebleu is not installed: pip install 'flora-train[text-metrics]', or remove it"
    assert complain("recipe=bad.yaml", *words) == [
        f"tasks.lua.metrics = 'chrf': {hint}",
        f"tasks.lua.metrics = 'bleu': {hint}",
    ]


@pytest.mark.usefixtures("prompts", "complain")
def test_plan_refuses_the_same(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["tasks.lua.train=qa.jsonl", "tasks.lua.metrics=bad_test_metrics:raises"]
    assert main(["plan", "recipe=bad.yaml", *words]) == 2
    assert "error: tasks.lua.metrics = 'bad_test_metrics:raises': raised IndexError" in capfd.readouterr().err
    assert main(["plan", "recipe=bad.yaml", "tasks.lua.metrics=rouge_l"]) == 2
    assert "no held-out example has a prompt" in capfd.readouterr().err
