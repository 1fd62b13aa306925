"""Prompts and references are those of the rows, whatever the text is; rows without them are left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import TaskConfig
from flora_train.data.task import Task
from flora_train.data.templates import PromptCompletion
from flora_train.data.tokenization import tokenize
from flora_train.evaluation.answers.prompts import AnsweredTask, answered_tasks
from tests.unit.data.conftest import byte_tokenizer

ROWS = [
    ("What is 1 + 1?", " 2"),
    ("Kolik je 1 + 1?", " dvě ž\n\n"),
    ("emoji 🙂", "🙂🙃 <|end|> text"),
    ("long", "x" * 60),
    ("last", "y"),
]


def answered(rows: list[tuple[str, str]], max_length: int = 50, **options: Any) -> list[AnsweredTask]:
    tokenizer = byte_tokenizer()
    examples = [PromptCompletion(prompt, completion) for prompt, completion in rows]
    split = tokenize(examples, tokenizer, max_length, truncation="truncate")
    task = Task("qa", 1.0, split, split, "0", format=options.pop("format", "prompt"))
    source = {"train": "rows.jsonl", "prompt": "{prompt}", "completion": "{completion}"}
    keys = TaskConfig.model_validate({**source, "metrics": ["rouge_l"], **options})
    config: Any = SimpleNamespace(tasks={"qa": keys}, evaluation=SimpleNamespace(max_new_tokens=9))
    return answered_tasks(config, {"qa": task}, SimpleNamespace(), tokenizer)  # type: ignore[arg-type]


def test_references_are_the_completions_without_outer_white_space() -> None:
    (task,) = answered(ROWS)
    assert [(prompt.example, prompt.reference) for prompt in task.prompts] == [
        (0, "2"),
        (1, "dvě ž"),
        (2, "🙂🙃 <|end|> text"),
        (4, "y"),
    ]
    decode = byte_tokenizer().decode
    assert decode(task.prompts[1].tokens, skip_special_tokens=True) == "Kolik je 1 + 1?"
    assert (task.examples, task.max_new_tokens, task.setting) == (5, 9, "greedy, up to 9 tokens")


def test_limits_are_those_of_the_task() -> None:
    (task,) = answered(ROWS, max_metric_examples=2, max_new_tokens=3)
    assert [prompt.example for prompt in task.prompts] == [0, 1]
    assert task.max_new_tokens == 3


def test_the_hash_is_of_prompt_and_reference() -> None:
    (first,) = answered([("a", "b"), ("a", "c"), ("a", "b"), ("b", "b")])
    shas = [prompt.sha for prompt in first.prompts]
    assert shas[0] == shas[2]
    assert len(set(shas)) == 3


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        ([("", "text"), ("", "more")], {"format": "text"}),
        ([("prompt", "x" * 90)], {}),
        ([("prompt", "completion")], {"learn": "all"}),
    ],
)
def test_rows_without_a_prompt_or_a_whole_completion_are_refused(
    rows: list[tuple[str, str]], options: dict[str, Any]
) -> None:
    with pytest.raises(
        UserError, match=r"tasks.qa.metrics = \['rouge_l'\]: no held-out example has a prompt"
    ):
        answered(rows, **options)


def test_metrics_of_the_loss_need_no_prompts() -> None:
    assert answered([("", "text")], metrics=["perplexity"]) == []
