"""Keys of heads: what goes together with labels, and what has no meaning."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.adapters.spec import HeadShape, expand
from flora_train.config.errors import UserError
from flora_train.config.load import validate

ROWS = {"train": "rows.jsonl"}
LABELLED = {**ROWS, "label": "kind", "text": "text"}


def recipe(adapter: dict[str, Any], tasks: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": "heads",
        "model": {"path": "base"},
        "tasks": tasks or {"kind": LABELLED},
        "adapters": {"own": {"lr": 1e-3, **adapter}},
        "training": {"steps": 10},
    }


@pytest.mark.parametrize(
    ("adapter", "tasks", "key", "hint"),
    [
        ({"method": "head"}, {"plain": ROWS}, "adapters.own.method", "is for tasks with labels"),
        ({"method": "head"}, {"kind": LABELLED, "plain": ROWS}, "adapters.own.method", "tasks.plain"),
        ({"method": "lora", "head_lr": 1.0}, {"plain": ROWS}, "adapters.own.head_lr", "is not used"),
        ({"method": "head", "rank": 4}, None, "adapters.own.rank", "no meaning for method head"),
        ({"method": "head", "target_modules": "all-linear"}, None, "adapters.own.target_modules", "no layer"),
        (
            {"method": "lora", "head_lr": 30, "weight_decay": 0.1},
            None,
            "adapters.own.weight_decay",
            "head_lr",
        ),
        ({"method": "ia3", "seed": 1}, {"plain": ROWS}, "adapters.own.seed", "has no effect"),
        (
            {"method": "head", "init_from": "folder", "seed": 1},
            None,
            "adapters.own.seed",
            "has no effect",
        ),
    ],
)
def test_contradictions_are_named(
    adapter: dict[str, Any], tasks: dict[str, Any] | None, key: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        validate(recipe(adapter, tasks))
    (problem,) = caught.value.problems
    assert problem.key == key
    assert hint in str(problem)


def test_seed_of_an_adapter_that_begins_with_a_head_has_an_effect() -> None:
    validate(recipe({"method": "ia3", "seed": 1}))


@pytest.mark.parametrize(
    ("task", "labels", "shape"),
    [
        ({"label": "kind", "text": "text"}, {"kind": ("a", "b", "c")}, HeadShape("text", 3)),
        ({"label": "kind", "text": "text", "labels": ["a", "b"]}, {}, HeadShape("text", 2)),
        ({"label": "kind", "text": "text", "regression": True}, {}, HeadShape("text", 1)),
        ({"token_labels": "tags"}, {"kind": ("O", "B", "I", "E")}, HeadShape("tokens", 4)),
        ({"label": "kind", "text": "text", "verbalizer": {"a": "good", "b": "bad"}}, {}, None),
        ({}, {}, None),
    ],
)
def test_labels_make_the_shape_of_a_head(
    task: dict[str, Any], labels: dict[str, tuple[str, ...]], shape: HeadShape | None
) -> None:
    (spec,) = expand(validate(recipe({"method": "lora"}, {"kind": {**ROWS, **task}})), labels)
    assert spec.head == shape


def test_adapters_of_labels_and_embeddings_write_no_text() -> None:
    tasks = {"kind": LABELLED, "plain": ROWS, "pairs": {**ROWS, "anchor": "question", "positive": "answer"}}
    content = recipe({"method": "lora"}, tasks) | {"mixture": {"examples_per_draw": 4}}
    assert [spec.writes_text for spec in expand(validate(content))] == [False, True, False]


EMBEDDED = {**ROWS, "anchor": "question", "positive": "answer"}


@pytest.mark.parametrize(
    ("task", "key", "hint"),
    [
        ({**LABELLED, "metrics": ["perplexity"]}, "tasks.kind.metrics", "is of text that is written"),
        ({**EMBEDDED, "metrics": ["rouge_l"]}, "tasks.kind.metrics", "is for text and labels"),
        (
            {**ROWS, "label": "kind", "prompt": "{text}?", "verbalizer": {"a": "yes"}},
            "tasks.kind.verbalizer",
            "at least 2",
        ),
    ],
)
def test_a_task_with_one_mistake_has_one_error(task: dict[str, Any], key: str, hint: str) -> None:
    content = recipe({"method": "lora"}, {"kind": task}) | {"mixture": {"examples_per_draw": 4}}
    with pytest.raises(UserError) as caught:
        validate(content)
    (problem,) = caught.value.problems
    assert problem.key == key
    assert hint in str(problem)


def test_words_of_labels_can_have_the_metrics_of_losses() -> None:
    words = {"prompt": "{text}?", "verbalizer": {"a": "yes", "b": "no"}, "metrics": ["perplexity"]}
    config = validate(recipe({"method": "lora"}, {"kind": {**ROWS, "label": "kind", **words}}))
    assert config.tasks["kind"].metrics == ["perplexity"]
