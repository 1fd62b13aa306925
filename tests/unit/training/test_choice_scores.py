"""Scores of words are those of the plain model for each example and word, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import BASE_ID
from flora_train.config.load import validate
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.task import Task, load_tasks
from flora_train.training.choice_scores import ChoiceScores, score_choices
from flora_train.training.loss import RowLosses
from tests.architectures import architecture_config
from tests.conftest import spec
from tests.unit.data.conftest import byte_tokenizer

WORDS = {"a": {"pos": "good", "neg": "awful"}, "b": {"x": "one", "y": "twotwo", "z": "\nthree"}}


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    return word_tasks(tmp_path)


def word_tasks(folder: Path) -> dict[str, Task]:
    """Two tasks with words, and one of plain text, whose rows are in a folder."""
    folder.mkdir(exist_ok=True)
    configs = {}
    for name, words in WORDS.items():
        labels = list(words)
        rows = [{"text": "film " * (i % 4 + 1) + str(i), "label": labels[i % len(labels)]} for i in range(30)]
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        configs[name] = {
            "train": str(path),
            "label": "label",
            "prompt": "{text}\nIt is",
            "verbalizer": words,
            "validation_fraction": 0.2,
        }
    configs["plain"] = {"train": str(folder / "a.jsonl"), "text": "text"}
    config = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": configs,
            "adapters": {"ia3": {"method": "ia3", "lr": 1e-3}},
            "training": {"steps": 2, "max_length": 64},
        }
    )
    return load_tasks(config, byte_tokenizer(), folder / "cache")


def attached(paging: Paging | None = None) -> AdapterBank:
    """Base and two adapters of each task, with weights of their own."""
    torch.manual_seed(0)
    config = architecture_config("llama")
    config.vocab_size = 300
    model = AutoModelForCausalLM.from_config(config).eval()
    specs = [spec(method, task) for task in ("a", "b", "plain") for method in ("flora", "ia3")]
    bank = AdapterBank.attach(model, specs, paging=paging)
    for adapter in range(len(specs)):
        values = bank.row(adapter)
        generator = np.random.default_rng(adapter)
        values.add_(values.new_tensor(generator.normal(0, 0.05, len(values))))
    return bank


def scored(bank: AdapterBank, tasks: dict[str, Task], **options: Any) -> dict[str, ChoiceScores]:
    options = {"max_tokens": 512, "pad_token": 257, **options}
    return score_choices(RowLosses(bank.model), bank, tasks, **options)


@torch.no_grad()
def expected_score(bank: AdapterBank, split: ChoiceSplit, contender: int, example: int, label: int) -> float:
    """The sum of log-probabilities of a word after its prompt, in a pass of its own."""
    ((tokens, spans),) = split.sequence(example, label + 1)
    begin = int(spans[0, 0])
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with bank.routed(torch.tensor([contender])):
        logits = bank.model(input_ids=ids).logits[0]
    bank.abandon()
    logps = logits.double().log_softmax(dim=-1)
    return float(sum(logps[place - 1, ids[0, place]] for place in range(begin, ids.shape[1])))


def test_scores_are_those_of_the_plain_model_for_base_and_adapters(tasks: dict[str, Task]) -> None:
    bank = attached()
    scores = scored(bank, tasks)
    assert list(scores) == ["a", "b"]
    for name, result in scores.items():
        split = tasks[name].evaluated
        assert isinstance(split, ChoiceSplit)
        own = [i for i, one in enumerate(bank.specs) if one.task == name]
        assert list(result.log_probabilities) == [BASE_ID, *own]
        assert result.spec.labels == tuple(WORDS[name])
        for contender, values in result.log_probabilities.items():
            assert values.shape == (len(split), len(WORDS[name]))
            for (example, label), value in np.ndenumerate(values):
                expected = expected_score(bank, split, contender, example, label)
                assert value == pytest.approx(expected, abs=2e-4)
        different = [result.log_probabilities[i] for i in (BASE_ID, *own)]
        assert len({values.tobytes() for values in different}) == 3


def test_predictions_are_the_most_probable_words(tasks: dict[str, Task]) -> None:
    result = scored(attached(), tasks)["b"]
    for contender, values in result.log_probabilities.items():
        probabilities = result.probabilities(contender)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1)
        np.testing.assert_allclose(
            probabilities, torch.from_numpy(values.copy()).softmax(dim=1).numpy(), rtol=1e-12
        )
        assert (result.predictions(contender) == probabilities.argmax(axis=1)).all()
        hits = [p == r for p, r in zip(result.predictions(contender), result.references, strict=True)]
        assert result.accuracy(contender) == pytest.approx(np.mean(hits))


def test_scores_do_not_depend_on_batches_paging_and_absent_adapters(tasks: dict[str, Task]) -> None:
    expected = scored(attached(), tasks)
    cases: list[tuple[Paging | None, dict[str, Any]]] = [
        (None, {"max_tokens": 64}),
        (Paging(2, None), {}),
        (None, {"absent": [1]}),
    ]
    for paging, options in cases:
        for name, result in scored(attached(paging), tasks, **options).items():
            for contender, values in result.log_probabilities.items():
                np.testing.assert_allclose(values, expected[name].log_probabilities[contender], atol=2e-4)
            assert 1 not in result.log_probabilities or "absent" not in options
    few = scored(attached(), tasks, max_examples=2)["a"]
    assert len(few.references) == 2
    assert few.log_probabilities[BASE_ID].shape == (2, 2)


def test_probabilities_of_very_improbable_words_are_numbers() -> None:
    from flora_train.data.labels.spec import LabelSpec

    values = {BASE_ID: np.array([[-2000.0, -2001.0], [-1.0, -9000.0]])}
    result = ChoiceScores("a", LabelSpec("single", ("x", "y")), np.array([1, 0]), values)
    np.testing.assert_allclose(result.probabilities(BASE_ID)[0], [0.731058, 0.268941], rtol=1e-5)
    assert result.accuracy(BASE_ID) == 0.5
