"""Sparse adapters in a bank: what they compute, their mask, and isolation from other adapters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.sparse_mask import SparseMask, mask_digest
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.export.merge import merge_into_base
from flora_train.federated.specs import sparse_spec
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import perturb, spec
from tests.unit.training.harness import (
    largest_difference_to_training_alone,
    make_trainer,
    moved,
    plans_of,
    train_together,
)

KNOWN = [1, 9, 20]
"""Of 5 x 6 entries at density 0.1."""
MODES = [
    pytest.param({}, id="plain"),
    pytest.param({"tokens_per_microbatch": 32}, id="accumulation"),
    pytest.param({"checkpointing": "reentrant"}, id="reentrant"),
    pytest.param({"checkpointing": "non_reentrant", "tokens_per_microbatch": 32}, id="non-reentrant"),
]


def sparse(task: str, family: str = "lora", density: float = 0.01, **options: Any) -> AdapterSpec:
    return sparse_spec(spec("lora", task, family, **options), density=density, seed=3)


def sparse_specs(**options: Any) -> list[AdapterSpec]:
    """Three of one pool, one of a density that dense matmuls compute, and other methods beside them."""
    few = {"target_modules": ["q_proj", "down_proj"], **options}
    return [
        *(sparse(task, **options) for task in "abc"),
        sparse("a", "dense", 0.3, **few),
        spec("lora", "b", rank=2, **options),
        spec("flora", "c", rank=2, **options),
    ]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("options", MODES)
@pytest.mark.quick("plain-adamw", "accumulation-sgd", "reentrant-sgd", "non-reentrant-adamw")
def test_trained_together_equals_trained_alone(tmp_path: Path, optimizer: str, options: Any) -> None:
    lr = {"adamw": 2e-3, "sgd": 0.4}[optimizer]
    adapter = {"max_grad_norm": 0.05, "weight_decay": 0.1} if "checkpointing" in options else {}
    specs = sparse_specs(lr=lr, **adapter)
    options = {"optimizer": optimizer, **options}
    together = make_trainer(specs, tmp_path, **options)
    assert len(together.bank.pools) == 4
    plans = plans_of(together)
    assert any(len(plan.label_tokens) < len(specs) for plan in plans)
    train_together(together, plans)
    assert min(moved(together).values()) > 1e-3
    differences = largest_difference_to_training_alone(together, plans, tmp_path, **options)
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_merged_sparse_adapter_computes_what_the_bank_computes(architecture: str) -> None:
    tokens = torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    model = tiny_model(architecture)
    plain = model(input_ids=tokens).logits
    bank = AdapterBank.attach(model, [sparse("a"), spec("ia3", "b")])
    with bank.routed(["a-lora_sparse"] * 2):
        torch.testing.assert_close(model(input_ids=tokens).logits, plain, rtol=0, atol=1e-6)
    perturb(bank)
    with bank.routed(["a-lora_sparse"] * 2):
        expected = model(input_ids=tokens).logits
    assert (expected - plain).abs().max() > 1e-2
    merged = merge_into_base(bank, "a-lora_sparse")
    torch.testing.assert_close(merged(input_ids=tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_the_mask_is_stored_once_for_all_adapters_of_a_pool() -> None:
    bank = AdapterBank.attach(tiny_model("llama"), [sparse(task) for task in "abc"])
    (pool,) = bank.pools
    for module, target in pool.targets.items():
        indices = pool.constants(module)["indices"]
        params = pool.gather(module, torch.tensor([0, 1, 2]))
        assert params["indices"].data_ptr() == indices.data_ptr()
        assert params["indices"].shape == (3, len(indices))
        assert len(indices) == round(0.01 * target.in_features * target.out_features)
        assert (indices.diff() > 0).all()
        assert int(indices[0]) >= 0
        assert int(indices[-1]) < target.in_features * target.out_features


def test_a_mask_depends_on_seed_density_layer_and_shape_alone() -> None:
    mask = SparseMask(0.1, 1, "layer")
    first = mask.indices(20, 30)
    assert torch.equal(first, SparseMask(0.1, 1, "layer").indices(20, 30))
    for other in (SparseMask(0.1, 2, "layer"), SparseMask(0.1, 1, "other"), SparseMask(0.11, 1, "layer")):
        assert not torch.equal(first, other.indices(20, 30))
    assert not torch.equal(first, mask.indices(30, 20))
    assert torch.equal(SparseMask(1.0, 0, "x").indices(3, 4), torch.arange(12))
    assert len(SparseMask(1e-9, 0, "x").indices(3, 4)) == 1
    # Written down: another version of numpy that drew another mask would be noticed here.
    assert SparseMask(0.1, 1, "layer").indices(5, 6).tolist() == KNOWN
    digest = mask_digest({"layer": first})
    assert digest == mask_digest({"layer": first.clone()})
    assert digest != mask_digest({"layer": first + 1})
    assert digest != mask_digest({"other": first})


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density: float) -> None:
    with pytest.raises(UserError, match=r"density = .*: must be above 0 and at most 1"):
        sparse("a", density=density)


def test_other_masks_have_pools_of_their_own() -> None:
    one = sparse("a")
    two = replace(sparse("b"), mask=SparseMask(0.01, 4))
    bank = AdapterBank.attach(tiny_model("llama"), [one, two])
    assert len(bank.pools) == 2


def test_export_to_peft_says_what_to_export_instead(tmp_path: Path) -> None:
    from flora_train.adapters.methods import METHODS

    with pytest.raises(UserError, match="export the LoRA that its SVD begins"):
        METHODS["sparse"].peft_config(sparse("a"), [], [])
