"""The LoRA that approximates an adapter computes what it computes, as far as its rank allows."""

from __future__ import annotations

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.export.svd_lora import SvdLora, compute_svd_lora, write_into
from tests.architectures import tiny_model
from tests.conftest import FEW
from tests.unit.adapters.helpers import logits, plain_logits, tokens
from tests.unit.export.test_peft_format import perturbed_bank


def logits_of(svd_lora: SvdLora, architecture: str) -> torch.Tensor:
    bank = AdapterBank.attach(tiny_model(architecture).eval(), [svd_lora.spec])
    write_into(bank, svd_lora)
    return logits(bank, tokens(3), [0, 0, 0])


@pytest.mark.parametrize("architecture", FEW)
@pytest.mark.parametrize("family", ["pure", "residual", "rslora", "lora_subset", "ia3_explicit"])
def test_svd_lora_is_exact_at_full_rank_and_closer_with_every_rank(architecture: str, family: str) -> None:
    bank, name = perturbed_bank(architecture), f"task-{family}"
    ours, plain = logits(bank, tokens(3), [name] * 3), plain_logits(architecture, tokens(3))
    full = compute_svd_lora(bank, name, rank=48, max_error=None)
    if not full.biases:
        assert (logits_of(full, architecture) - ours).abs().max() <= 1e-4 * ours.abs().max()
        assert (ours - plain).abs().max() > 100 * (logits_of(full, architecture) - ours).abs().max()
    assert full.error < 1e-6
    errors = [compute_svd_lora(bank, name, rank=rank, max_error=None).error for rank in (1, 2, 4, 8)]
    assert errors == pytest.approx(sorted(errors, reverse=True), abs=1e-6)


def test_rank_is_the_smallest_within_the_error() -> None:
    bank, shares = perturbed_bank("llama"), []
    found = compute_svd_lora(bank, "task-residual", rank=None, max_error=0.3, report=shares.append)
    assert found.error <= 0.3
    assert compute_svd_lora(bank, "task-residual", rank=found.spec.rank - 1, max_error=None).error > 0.3
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_biases_that_it_cannot_change_are_counted() -> None:
    counts = {
        name: compute_svd_lora(perturbed_bank("gpt2"), f"task-{name}", rank=1, max_error=None).biases
        for name in ("pure", "ia3_explicit")
    }
    assert counts["pure"] == 0
    assert counts["ia3_explicit"] > 0
