"""Embeddings among other rows: trained together equals trained alone, and negatives are of one draw."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flora_train.adapters.paging import Paging
from flora_train.adapters.spec import BASE_ID
from flora_train.data.batch import Row, collate, padded_tokens
from flora_train.data.embeddings.spec import EmbeddingSpec
from flora_train.data.embeddings.split import EmbeddingSplit
from flora_train.data.labels.spec import LabelSpec
from flora_train.data.preferences.preference import Preference
from flora_train.training.heldout import evaluate_heldout
from flora_train.training.objectives import StepTotals
from tests.conftest import mixed_specs, perturb, spec
from tests.unit.training.embedding_reference import contrastive, cosine
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    plans_of,
    train_together,
)

MIXED = {
    "b": EmbeddingSpec("mean", 0.1, symmetric=True),
    "c": EmbeddingSpec("last", 0.2, has_negatives=True),
}
BUDGET: dict[str, Any] = {"examples_per_draw": 4, "tokens_per_step": 700, "tokens_per_microbatch": 256}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"tokens_per_microbatch": 4096}, id="one-microbatch"),
        pytest.param({"checkpointing": "reentrant"}, id="reentrant-checkpointing"),
        pytest.param({"architecture": "gpt2"}, id="gpt2"),
    ],
)
def test_embeddings_trained_together_equal_those_trained_alone(
    tmp_path: Path, optimizer: str, options: dict[str, Any]
) -> None:
    """Text, pairs and triplets share steps and micro-batches, and adapters are absent in some steps."""
    specs = specs_of(options.get("architecture", "llama"), lr={"adamw": 2e-3, "sgd": 0.2}[optimizer])
    options = {**BUDGET, "optimizer": optimizer, **options}
    together = make_trainer(specs, tmp_path, embeddings=MIXED, **options)
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    mixed = [{row.task for row in rows} for plan in plans for rows in plan.microbatches]
    assert any(len(tasks) > 1 and tasks & {"b", "c"} for tasks in mixed)
    train_together(together, plans)
    differences = largest_difference_to_training_alone(together, plans, tmp_path, embeddings=MIXED, **options)
    assert max(differences.values()) <= 1e-5, differences
    distances = moved(together, options.get("architecture", "llama"))
    assert min(distance for name, distance in distances.items() if name[0] in MIXED) > 3e-4


def specs_of(architecture: str, lr: float) -> list[Any]:
    """The mixed adapters, one of them with dropout; of GPT-2 those that its layers' names allow."""
    specs = []
    for one in mixed_specs(lr=lr):
        if architecture == "gpt2":
            if one.method == "ia3" or one.rank_pattern:
                continue
            one = replace(one, target_modules=("c_attn", "c_fc"))
        if one.name == "b-lora_some":
            one = replace(one, dropout=0.2)
        specs.append(one)
    return specs


def test_embeddings_and_preferences_share_a_step(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **BUDGET,
        "embeddings": {"b": MIXED["b"]},
        "preferences": {"c": Preference("kto", 0.5)},
        "tokens_per_microbatch": 4096,
        "tokens_per_step": 1500,
    }
    together = make_trainer(mixed_specs(lr=2e-3), tmp_path, **options)
    plans = plans_of(together)
    tasks = [{row.task for row in rows if row.adapter >= 0} for plan in plans for rows in plan.microbatches]
    assert {"a", "b", "c"} in tasks
    train_together(together, plans)
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


def test_draws_are_never_divided_and_microbatches_hold_their_budget(tmp_path: Path) -> None:
    trainer = make_trainer(mixed_specs(), tmp_path, embeddings=MIXED, **BUDGET)
    places: dict[tuple[int, str, int | None, int], set[int]] = {}
    for number, plan in enumerate(plans_of(trainer)):
        assert plan.tokens <= BUDGET["tokens_per_step"]
        for place, rows in enumerate(plan.microbatches):
            assert padded_tokens(rows) <= BUDGET["tokens_per_microbatch"]
            for row in rows:
                assert (row.unit is not None) == (row.task in MIXED)
                if row.unit is not None:
                    places.setdefault((number, row.task, row.unit, row.adapter), set()).add(place)
    assert len(places) > 20
    assert all(len(of_unit) == 1 for of_unit in places.values())


@pytest.mark.parametrize(
    "spec",
    [
        EmbeddingSpec("mean", 0.05),
        EmbeddingSpec("last", 0.1, symmetric=True),
        EmbeddingSpec("mean", 0.5, symmetric=True, has_negatives=True),
        EmbeddingSpec("last", 0.07, has_negatives=True),
    ],
)
def test_losses_and_gradients_equal_the_definition_of_each_draw(tmp_path: Path, spec: EmbeddingSpec) -> None:
    """Of a step in float64 on a perturbed adapter: the loss of every draw from embeddings that are computed
    one text at a time. Rows of other adapters, and of other draws, are no negatives."""
    specs = [s for s in mixed_specs() if s.name in ("b-flora_one", "b-lora_some", "a-lora")]
    options: dict[str, Any] = {**BUDGET, "tokens_per_microbatch": 4096, "dtype": torch.float64}
    trainer = make_trainer(specs, tmp_path, embeddings={"b": spec}, **options)
    perturb(trainer.bank, 0.05)
    adapter = trainer.bank.ids["b-flora_one"]
    plan = next(plan for plan in plans_of(trainer) if plan.texts.get(adapter, 0) > 4)
    sums = trainer._accumulate_gradients(0, plan)
    gradient = trainer.bank.gradient_row(adapter).clone()
    trainer.bank.gradient_row(adapter).zero_()
    loss = StepTotals(plan, sums.flatten().tolist(), trainer.task_of).losses[adapter]
    rows = [row for group in plan.microbatches for row in group if row.adapter == adapter]
    split = trainer.tasks["b"].train
    assert isinstance(split, EmbeddingSplit)
    losses: list[float] = []
    for unit in sorted({row.unit for row in rows}, key=str):
        parts = [[r for r in rows if r.unit == unit and r.document == part] for part in range(spec.texts)]
        embeddings = []
        for part in parts:
            for row in part:
                trainer.bank.route([adapter])
                output = trainer.row_losses.outputs(trainer.make_batch([row])).embeddings
                assert output is not None
                embeddings.append(output.values[0])
        values = torch.stack(embeddings).detach().numpy().reshape(spec.texts, len(parts[0]), -1)
        texts = [[tuple(split.text(row.example, row.document)) for row in part] for part in parts]
        reference = contrastive(values, texts, temperature=spec.temperature, symmetric=spec.symmetric)
        losses += reference.losses
        derivatives = reference.gradients.reshape(-1, values.shape[2])
        for row, derivative in zip(chain.from_iterable(parts), derivatives, strict=True):
            trainer.bank.route([adapter])
            output = trainer.row_losses.outputs(trainer.make_batch([row])).embeddings
            assert output is not None
            (output.values[0] * torch.from_numpy(derivative)).sum().backward()
    assert loss == pytest.approx(np.mean(losses), rel=1e-9)
    own = trainer.bank.gradient_row(adapter) / len(losses)
    assert float((own - gradient).norm() / gradient.norm()) <= 1e-5


def test_texts_of_another_adapter_are_no_negatives(tmp_path: Path) -> None:
    """Two adapters of one task learn from the same draw; moving one of them leaves the other's loss and
    gradient as they are, to the last bit."""
    options: dict[str, Any] = {**BUDGET, "tokens_per_microbatch": 4096}
    measured = []
    for scale in (0.0, 0.5):
        trainer = make_trainer(mixed_specs(), tmp_path, embeddings=MIXED, **options)
        first, second = (trainer.bank.ids[name] for name in ("b-flora_one", "b-lora_some"))
        trainer.bank.row(second).add_(scale)
        plan = next(plan for plan in plans_of(trainer) if first in plan.texts)
        assert any({first, second} <= {row.adapter for row in rows} for rows in plan.microbatches)
        sums = trainer._accumulate_gradients(0, plan)
        losses = StepTotals(plan, sums.flatten().tolist(), trainer.task_of).losses
        measured.append((losses[first], losses[second], trainer.bank.gradient_row(first).clone()))
    (loss, other, gradient), (loss_after, other_after, gradient_after) = measured
    assert loss == loss_after
    assert torch.equal(gradient, gradient_after)
    assert other != other_after


def test_a_nan_in_one_adapter_leaves_the_others_bit_identical(tmp_path: Path) -> None:
    options = {**BUDGET, "tokens_per_microbatch": 4096, "tokens_per_step": 1500}
    good, bad = (make_trainer(mixed_specs(), tmp_path, embeddings=MIXED, **options) for _ in range(2))
    plans = plans_of(good, 6)
    victim = bad.bank.ids["b-flora_one"]
    bad.bank.row(victim)[0] = float("nan")
    for trainer in (good, bad):
        train_together(trainer, plans)
    for name, adapter in good.bank.ids.items():
        if adapter != victim:
            assert torch.equal(good.bank.row(adapter), bad.bank.row(adapter)), name


@pytest.mark.parametrize("spec", [MIXED["b"], MIXED["c"]], ids=["pairs", "triplets"])
def test_heldout_figures_equal_a_search_by_hand(tmp_path: Path, spec: EmbeddingSpec) -> None:
    """Of base and adapters, from embeddings computed one text at a time, and the same with pages."""
    spec = replace(spec, examples_per_draw=3)
    results = []
    for paging in (None, Paging(4, None)):
        trainer = make_trainer(mixed_specs(), tmp_path, embeddings={"b": spec}, paging=paging, **BUDGET)
        with torch.no_grad():
            for name in ("b-flora_one", "b-lora_some"):
                row = trainer.bank.row(trainer.bank.ids[name])
                row.add_(torch.randn(len(row), generator=torch.Generator().manual_seed(1)), alpha=0.1)
        trainer.bank.invalidate_device()
        results.append(
            evaluate_heldout(
                trainer.row_losses,
                trainer.bank,
                trainer.tasks.values(),
                max_tokens=64,
                pad_token=0,
                with_base=True,
            )
        )
    for result in results:
        embeddings = result["b"].embeddings
        assert embeddings is not None
        assert result["a"].embeddings is None
        contenders = [BASE_ID, trainer.bank.ids["b-flora_one"], trainer.bank.ids["b-lora_some"]]
        assert sorted(embeddings.losses) == contenders
        losses = set()
        for contender in contenders:
            expected = searched_by_hand(trainer, contender, spec)
            np.testing.assert_allclose(embeddings.losses[contender], expected[0], rtol=1e-4)
            np.testing.assert_allclose(embeddings.first[contender], expected[1])
            np.testing.assert_allclose(embeddings.reciprocal_ranks[contender], expected[2])
            assert result["b"].objective_loss(contender) == pytest.approx(np.mean(expected[0]), rel=1e-4)
            losses.add(round(result["b"].objective_loss(contender), 6))
        assert len(losses) == 3


def searched_by_hand(trainer: Any, contender: int, spec: EmbeddingSpec) -> tuple[Any, Any, Any]:
    split = trainer.tasks["b"].validation
    vectors: dict[tuple[int, int], np.ndarray] = {}
    for example in range(7):
        for document in range(spec.texts):
            row = Row(contender, "b", example, split.size(example, document), document=document)
            batch = collate([row], lambda task: split, 0)
            with torch.no_grad(), trainer.bank.routed([contender]):
                output = trainer.row_losses.outputs(batch).embeddings
            vectors[document, example] = output.values[0].double().numpy()
    texts = [[tuple(split.text(i, part)) for i in range(7)] for part in range(spec.texts)]
    losses: list[float] = []
    for group in (range(4), range(4, 7)):
        values = np.array([[vectors[part, i] for i in group] for part in range(spec.texts)])
        of_group = [[part[i] for i in group] for part in texts]
        losses += contrastive(values, of_group, temperature=spec.temperature, symmetric=spec.symmetric).losses
    candidates = {}
    for part in range(1, spec.texts):
        candidates |= {text: vectors[part, i] for i, text in enumerate(texts[part])}
    first, reciprocal = [], []
    for i in range(7):
        belongs = {p for a, p in zip(texts[0], texts[1], strict=True) if a == texts[0][i]}
        own = cosine(vectors[0, i], candidates[texts[1][i]])
        others = [cosine(vectors[0, i], v) for t, v in candidates.items() if t not in belongs]
        rank = 1 + sum(other > own for other in others)
        first.append(float(rank == 1))
        reciprocal.append(1 / rank)
    return losses, first, reciprocal


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_embeddings_of_an_encoder_mix_with_each_other_and_with_labels(
    tmp_path: Path, architecture: str, optimizer: str
) -> None:
    """Pairs, triplets, classes and tags share micro-batches, and each adapter equals itself alone."""
    lr = {"adamw": 2e-3, "sgd": 0.2}[optimizer]
    embeddings = {"b": MIXED["b"], "c": EmbeddingSpec("cls", 0.2, has_negatives=True)}
    labels = {"a": LabelSpec("single", ("x", "y", "z")), "tags": LabelSpec("tokens", ("O", "B"))}
    specs = [
        spec("lora", "a", rank=2, lr=lr),
        spec("flora", "b", rank=3, variant="residual", lr=lr),
        spec("lora", "b", rank=2, lr=lr, dropout=0.2),
        spec("flora", "c", "pure", rank=2, variant="pure", lr=lr),
        spec("lora", "c", rank=2, lr=lr),
        spec("head", "tags", lr=lr),
    ]
    options = {**BUDGET, "architecture": architecture, "optimizer": optimizer, "labels": labels}
    options |= {"tokens_per_step": 900, "tokens_per_microbatch": 600}
    together = make_trainer(specs, tmp_path, embeddings=embeddings, **options)
    plans = plans_of(together)
    tasks = [{row.task for row in rows} for plan in plans for rows in plan.microbatches]
    assert any({"b", "c"} <= mixed and mixed & set(labels) for mixed in tasks)
    train_together(together, plans)
    differences = largest_difference_to_training_alone(
        together, plans, tmp_path, embeddings=embeddings, **options
    )
    assert max(differences.values()) <= 1e-5, differences
    distances = moved(together, architecture)
    assert min(distance for name, distance in distances.items() if name[0] in "bc") > 1e-4
