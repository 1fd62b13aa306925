"""`select_by`: a figure that the texts of a task have."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.config.suggestions import full_key
from flora_train.config.unused_keys import notes_on_unused

KINDS: dict[str, dict[str, Any]] = {
    "single": {"label": "kind"},
    "multi": {"label": "kinds", "multi_label": True},
    "regression": {"label": "score", "regression": True},
    "tokens": {"token_labels": "tags"},
    "words": {"label": "kind", "prompt": "{text}", "verbalizer": {"a": "yes", "b": "no"}},
    "pairs": {"anchor": "question", "positive": "answer"},
    "text": {},
}


def config_of(kind: str, select_by: Any, **sections: Any) -> RunConfig:
    return validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": {"t": {"train": "rows.jsonl", **KINDS[kind], "select_by": select_by}},
            "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
            "mixture": {"examples_per_draw": 4},
            "training": {"steps": 4},
            **sections,
        }
    )


@pytest.mark.parametrize(
    ("kind", "figure"),
    [
        ("single", "macro_f1"),
        ("single", "my_metrics:score"),
        ("multi", "subset_accuracy"),
        ("regression", "spearman"),
        ("tokens", "entity_f1"),
        ("words", "mcc"),
        ("pairs", "mrr"),
    ],
)
def test_each_kind_of_task_has_figures(kind: str, figure: str) -> None:
    assert config_of(kind, figure).tasks["t"].select_by == figure


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_default(kind: str) -> None:
    assert config_of(kind, "loss").tasks["t"].select_by is None
    assert config_of(kind, None).tasks["t"].select_by is None


@pytest.mark.parametrize(
    ("kind", "figure", "message"),
    [
        ("single", "macro_f", "is not a figure; there are "),
        ("single", "macro_f", "Did you mean 'macro_f1'?"),
        ("single", "mse", "is no figure of this task; there are accuracy, "),
        ("multi", "accuracy", "is no figure of this task; there are auroc, macro_f1, "),
        ("regression", "macro_f1", "is no figure of this task; there are mae, mse, "),
        ("tokens", "accuracy", "is no figure of this task; there are entity_f1, "),
        ("words", "entity_f1", "is no figure of this task; there are accuracy, "),
        ("pairs", "accuracy", "is no figure of this task; there are mrr or recall_at_1"),
        ("pairs", "my_metrics:score", "is a function, and embeddings have mrr or"),
        ("text", "macro_f1", "is for labelled texts and embeddings"),
        ("single", ["macro_f1"], ""),
        ("single", "", ""),
    ],
)
def test_other_figures_are_one_error(kind: str, figure: Any, message: str) -> None:
    with pytest.raises(UserError) as error:
        config_of(kind, figure)
    (problem,) = error.value.problems
    assert str(problem).startswith("tasks.t.select_by")
    assert message in str(problem)


def test_a_note_says_where_no_states_are_compared() -> None:
    for evaluation, selects in (
        ({}, False),
        ({"interval": 2}, True),
        ({"interval": 2, "select_best": False}, False),
    ):
        config = config_of("single", "macro_f1", evaluation=evaluation)
        assert config.compares_states == selects
        notes = notes_on_unused(config.tasks, False, selects=config.compares_states)
        assert any(note.startswith("tasks.t.select_by is not used") for note in notes) != selects


def test_the_name_of_other_trainers_is_known() -> None:
    assert full_key(["metric_for_best_model"]) == "tasks.NAME.select_by"
