"""Best states by a figure: of the evaluation where it is best, per adapter, also after a kill."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import isnan
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.evaluation.figures.selection import selections_of
from flora_train.training.best_adapters import load_best
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer
from tests.unit.training.test_label_isolation import LABELS, label_specs

BY = {
    "three": "macro_f1",
    "two": "auroc",
    "many": "micro_f1",
    "number": "mse",
    "tags": "tests.own_metrics:share",
}
PAIRS = {"b": EmbeddingSpec("mean", 0.1)}


class Killed(BaseException):
    """As a kill during training."""


def selecting(folder: Path, by: Mapping[str, str], **options: Any) -> Trainer:
    """A trainer whose best states are selected by these figures."""
    folder.mkdir(exist_ok=True)
    if "embeddings" not in options:
        options = {"specs": label_specs(lr=3e-2), "architecture": "bert", "labels": LABELS, **options}
    budget = {"tokens_per_step": 100, "tokens_per_microbatch": 64, "interval": 2, "steps": 16}
    trainer = make_trainer(folder=folder, optimizer="adamw", **{**budget, **options})
    tasks = {name: SimpleNamespace(select_by=by.get(name)) for name in trainer.tasks}
    selections = selections_of(SimpleNamespace(tasks=tasks), trainer.tasks)  # type: ignore[arg-type]
    trainer.context = replace(trainer.context, selections=selections)
    return trainer


def curves_of(trainer: Trainer, figure: str, adapter: int) -> list[float]:
    """The figure of an adapter at each evaluation."""
    name = trainer.bank.specs[adapter].name
    records = trainer.folder.read_metrics("evaluation")
    values = [record["adapters"][name][figure.replace(":", ".")] for record in records]
    assert all(value is not None for value in values)
    return values  # type: ignore[return-value]


def digests_of(trainer: Trainer) -> dict[str, str]:
    return {name: trainer.bank.digest(adapter) for name, adapter in trainer.bank.ids.items()}


def best_steps(trainer: Trainer) -> dict[str, int]:
    return {trainer.bank.specs[i].name: best.step for i, best in trainer.best_adapters.best.items()}


def test_the_best_state_is_that_of_the_best_figure(tmp_path: Path) -> None:
    trainer = selecting(tmp_path, BY)
    trainer.train()
    differs = 0
    for adapter, own in enumerate(trainer.bank.specs):
        figure = BY[own.task]
        values, losses = curves_of(trainer, figure, adapter), curves_of(trainer, "loss", adapter)
        wanted = min(values) if figure == "mse" else max(values)
        best = trainer.best_adapters.best[adapter]
        assert best.step == 2 * (1 + values.index(wanted)), own.name
        assert best.loss == losses[values.index(wanted)]
        assert best.score == (wanted if figure == "mse" else -wanted)
        differs += values.index(wanted) != losses.index(min(losses))
    assert differs > 1
    chosen = digests_of(trainer)
    for pool in trainer.bank.pools:
        pool.values.zero_()
    kept = load_best(trainer.bank, range(len(trainer.bank.specs)), trainer.folder.best_adapters)
    assert digests_of(trainer) == chosen
    assert kept == trainer.best_adapters.best
    again = trainer.heldout(None, lambda share: None)
    for adapter, own in enumerate(trainer.bank.specs):
        assert again[own.task].loss(adapter) == pytest.approx(kept[adapter].loss, rel=1e-5)


def test_another_figure_of_one_task_changes_no_other_adapter(tmp_path: Path) -> None:
    by_loss, by_figure = (
        selecting(tmp_path / "loss", {}),
        selecting(tmp_path / "figure", {"three": "macro_f1"}),
    )
    for trainer in (by_loss, by_figure):
        trainer.train()
    expected, found = digests_of(by_loss), digests_of(by_figure)
    changed = {name for name in expected if found[name] != expected[name]}
    assert changed
    assert all(name.startswith("three-") for name in changed)
    same = expected.keys() - changed
    steps = best_steps(by_loss)
    assert {name: best_steps(by_figure)[name] for name in same} == {name: steps[name] for name in same}


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_run_selects_the_same_states(tmp_path: Path, moment: str) -> None:
    """Killed before or after the states of an evaluation are kept."""
    straight = selecting(tmp_path / "straight", BY, save_every=4)
    straight.train()
    first = selecting(tmp_path / "resumed", BY, save_every=4)
    offer = first.best_adapters.offer

    def killed(losses: Any, step: int, scores: Any) -> None:
        if step == 10 and moment == "before":
            raise Killed
        offer(losses, step, scores)
        if step == 10:
            raise Killed

    first.best_adapters.offer = killed  # type: ignore[method-assign]
    with pytest.raises(Killed):
        first.train()
    first.finish_saving()
    second = selecting(tmp_path / "resumed", BY, save_every=4)
    second.resume()
    assert second.state.step == 8
    second.train()
    assert digests_of(second) == digests_of(straight)
    assert second.best_adapters.best == straight.best_adapters.best


def test_patience_goes_by_the_figure(tmp_path: Path) -> None:
    """Its evaluations without a better figure are counted, whatever the loss does."""
    specs = [replace(own, patience=2) for own in label_specs(lr=3e-2)]
    trainer = selecting(tmp_path, BY, specs=specs, steps=24)
    trainer.train()
    assert trainer.early_stopping.retired
    for adapter, retirement in trainer.early_stopping.retired.items():
        name, figure = trainer.bank.specs[adapter].name, BY[trainer.bank.specs[adapter].task]
        values = [
            record["adapters"][name][figure.replace(":", ".")]
            for record in trainer.folder.read_metrics("evaluation")
            if name in record["adapters"]
        ]
        assert len(values) == retirement.step // 2
        earlier, last = values[:-2], values[-2:]
        if figure == "mse":
            assert min(last) >= min(earlier)  # type: ignore[type-var]
        else:
            assert max(last) <= max(earlier)  # type: ignore[type-var]


def test_embeddings_are_selected_by_their_rank(tmp_path: Path) -> None:
    specs = [spec("lora", "b", "fast", rank=2, lr=0.1), spec("ia3", "a", lr=0.01)]
    budget = {"examples_per_draw": 4, "tokens_per_step": 400, "tokens_per_microbatch": 256}
    trainer = selecting(tmp_path, {"b": "mrr"}, specs=specs, embeddings=PAIRS, **budget)
    trainer.train()
    for adapter, figure in enumerate(("mrr", "loss")):
        values = curves_of(trainer, figure, adapter)
        wanted = max(values) if figure == "mrr" else min(values)
        assert trainer.best_adapters.best[adapter].step == 2 * (1 + values.index(wanted))


def test_a_function_that_fails_selects_nothing(tmp_path: Path) -> None:
    trainer = selecting(tmp_path, {"three": "tests.own_metrics:knows_other_labels"}, steps=4)
    trainer.train()
    best = trainer.best_adapters.best[trainer.bank.ids["three-lora"]]
    assert best.step == 2
    assert best.score is not None
    assert isnan(best.score)


def test_entity_f1_needs_tags_of_entities(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tasks\.three\.select_by = 'entity_f1': is of tags such as B-PER"):
        selecting(tmp_path, {"three": "entity_f1"})
