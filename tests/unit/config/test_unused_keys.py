"""A task's key that could do nothing is an error or a note, never ignored silently."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.load import load_config, shipped, validate
from flora_train.config.task_schema import SourceConfig, TaskConfig
from flora_train.config.unused_keys import OF_HUB, notes_on_unused
from tests.unit.config.helpers import faults, small

SPEECH = {"speech": {"language": "cs"}, "train": "cs.train.tsv"}


@pytest.mark.parametrize(
    ("task", "key", "reason"),
    [
        ({"train": "a.jsonl", "test": "b.jsonl"}, "test", "is for speech tasks"),
        ({"train": "a.jsonl", "max_test_examples": 3}, "max_test_examples", "is for speech tasks"),
        ({**SPEECH, "max_test_examples": 3}, "max_test_examples", "requires test"),
        ({**SPEECH, "truncation": "split"}, "truncation", "is for text"),
        ({**SPEECH, "sample_prompts": ["x"]}, "sample_prompts", "is for text"),
        (
            {"train": "a", "speech": {"language": "cs", "prompt": ["<s>"], "token": "<|cs|>"}},
            "speech.token",
            "remove one of them",
        ),
        (
            {"train": {"common_voice": "cv", "locale": "cs"}, "speech": {"language": "cs", "audio": "file"}},
            "speech.audio",
            "is always path in a Common Voice release",
        ),
        ({"train": {"files": "a.jsonl", "subset": "x"}}, "train.subset", "is for data sets of the hub"),
        ({"train": {"folder": "src", "data_dir": "x"}}, "train.data_dir", "is for data sets of the hub"),
        ({"train": {"files": "a.jsonl", "revision": "x"}}, "train.revision", "is for data sets of the hub"),
        ({"train": {"files": "a.jsonl", "max_rows": 3}}, "train.max_rows", "is for data sets of the hub"),
        (
            {"train": {"files": "a.jsonl", "fallback_hint": "x"}},
            "train.fallback_hint",
            "is for data sets of the hub",
        ),
        ({"train": {"files": "a.jsonl", "split": "dev"}}, "train.split", "give the split's files instead"),
        ({"train": {"files": "a.jsonl", "glob": "*.x"}}, "train.glob", "requires folder"),
        ({"train": {"hub": "a/b", "glob": "*.x"}}, "train.glob", "requires folder"),
        (
            {"train": {"files": "a.jsonl", "sample_by": "document"}},
            "train.sample_by",
            "applies to .txt files only",
        ),
        (
            {"train": {"folder": "src", "sample_by": "document"}},
            "train.sample_by",
            "applies to .txt files only",
        ),
        (
            {"train": "a.jsonl", "validation": {"files": "b.jsonl", "glob": "*"}},
            "validation.glob",
            "requires folder",
        ),
    ],
)
def test_key_that_could_do_nothing_is_an_error_that_names_it(
    task: dict[str, Any], key: str, reason: str
) -> None:
    found = faults(tasks={"a": task})
    assert list(found) == [f"tasks.a.{key}"]
    assert reason in found[f"tasks.a.{key}"]


@pytest.mark.parametrize(
    "task",
    [
        {"train": {"files": ["a.txt", "b.jsonl"], "sample_by": "paragraph"}},
        {"train": {"files": "data/*", "sample_by": "paragraph"}},
        {"train": {"hub": "a/b", "split": "dev", "subset": "x", "max_rows": 3}},
        {"train": {"folder": "src", "glob": "*.x"}},
        {"train": {"common_voice": "cv", "locale": "cs", "split": "dev"}, "speech": {"language": "cs"}},
        {**SPEECH, "test": "t.tsv", "max_test_examples": 3},
    ],
)
def test_keys_that_do_something_are_no_error(task: dict[str, Any]) -> None:
    validate(small(tasks={"a": task}))


def test_every_key_of_a_source_is_known_here() -> None:
    of_all = {"hub", "files", "common_voice", "locale", "folder", "split", "glob", "sample_by"}
    assert set(SourceConfig.model_fields) == of_all | set(OF_HUB)


def test_keys_that_another_setting_switches_off_are_notes_of_all_their_tasks() -> None:
    tasks = {
        "a": TaskConfig(train="a.jsonl", language="lua"),
        "b": TaskConfig(train="a.jsonl", language="pl", validation="v.jsonl", validation_fraction=0.2),
        "c": TaskConfig(train="c.tsv", validation="v.tsv", speech={"language": "cs", "speaker": "who"}),
    }
    assert notes_on_unused(tasks, problems=False) == [
        "tasks.{a, b}.language is not used: evaluation.problems names no problems",
        "tasks.b.validation_fraction is not used: the validation rows are given",
        "tasks.c.speech.speaker is not used: the validation rows are given",
    ]
    assert len(notes_on_unused(tasks, problems=True)) == 2


@pytest.mark.parametrize("name", sorted(shipped("recipes")))
def test_no_shipped_recipe_has_such_a_key(name: str) -> None:
    load_config([f"recipe={name}"])
