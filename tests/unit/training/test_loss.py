"""A row's loss equals plain cross entropy, and unneeded logits are not computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config

from flora_train.adapters.bank import AdapterBank
from flora_train.data.batch import IGNORE, MixedBatch, Row, collate
from flora_train.training import loss as loss_module
from flora_train.training.loss import RowLosses
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import FEW, perturb, spec
from tests.unit.training.harness import PAD, random_split

SOFT_CAP = 0.5


def soft_capped_model() -> Any:
    """Gemma 2 squeezes its logits after the head; a small cap makes a loss that forgets it wrong."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        final_logit_softcapping=SOFT_CAP,
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20.0)  # tied to the embeddings; logits beyond the cap
    return model


MODELS: dict[str, Any] = {
    **{name: lambda name=name: tiny_model(name) for name in FEW},
    "soft_capped": soft_capped_model,
}


def mixed_batch() -> MixedBatch:
    """Five rows of different lengths for four contenders; some have a prompt."""
    split = random_split(3, 5)
    rows = [Row(adapter, "a", i, int(split.lengths[i])) for i, adapter in enumerate([-1, 0, 0, 1, 2])]
    batch = collate(rows, lambda task: split, PAD)
    assert len({row.length for row in rows}) > 1
    assert split.spans[:, 0].max() > 1
    return batch


def bank_on(model: Any) -> AdapterBank:
    inputs = [
        name
        for name in ("down_proj", "fc2", "mlp.c_proj")
        if any(n.endswith(name) for n, _ in model.named_modules())
    ]
    specs = [
        spec("flora", rank=2),
        spec("lora", rank=2),
        spec("ia3", target_modules="all-linear", feedforward_modules=inputs),
    ]
    bank = AdapterBank.attach(model, specs)
    perturb(bank, 0.1)
    return bank


def plain_row_losses(model: Any, batch: MixedBatch) -> Tensor:
    """All logits, then cross entropy per row."""
    logits = model(
        input_ids=batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], use_cache=False
    ).logits
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        ignore_index=IGNORE,
        reduction="none",
    )
    return losses.view(len(batch.labels), -1).sum(dim=1)


def values_and_gradients(bank: AdapterBank, losses_of: Any, batch: MixedBatch) -> tuple[Tensor, list[Tensor]]:
    for pool in bank.pools:
        pool.gradients.zero_()
    bank.route(batch.adapter_ids)
    losses = losses_of(batch)
    (losses * torch.tensor([0.3, 1.0, 0.5, 2.0, 0.7])).sum().backward()
    return losses.detach(), [pool.gradients.clone() for pool in bank.pools]


@pytest.mark.parametrize("chunk", [1, 3, 128])
@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_equal_cross_entropy_on_full_logits(
    monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    model, batch = MODELS[name](), mixed_batch()
    row_losses = RowLosses(model)
    assert row_losses.head_makes_logits == (name != "soft_capped")
    bank = bank_on(model)
    losses, gradients = values_and_gradients(bank, row_losses, batch)
    expected, expected_gradients = values_and_gradients(bank, lambda b: plain_row_losses(model, b), batch)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert theirs.norm() > 0
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_soft_cap_changes_the_loss() -> None:
    """Else the test above could not tell whether the cap was applied."""
    model, batch = soft_capped_model(), mixed_batch()
    capped = plain_row_losses(model, batch)
    model.config.final_logit_softcapping = None
    assert (plain_row_losses(model, batch) - capped).abs().min() > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_logits_exist_at_learnt_positions_only_and_never_all_at_once(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", 4)
    model, batch = MODELS[name](), mixed_batch()
    row_losses = RowLosses(model)
    seen: list[Tensor] = []
    positions_with_logits: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0]))
    linear = F.linear

    def spy(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = linear(x, weight, bias)
        if y.shape[-1] == VOCABULARY:
            positions_with_logits.append(y.numel() // VOCABULARY)
        return y

    monkeypatch.setattr(F, "linear", spy)
    row_losses(batch)
    learnt = int((batch.labels[:, 1:] != IGNORE).sum())
    assert 4 < learnt < batch.labels.numel()
    assert len(seen) == 1
    if name == "soft_capped":  # the model needs all learnt positions to do what it does after its head
        assert seen[0].shape == (1, learnt, 32)
        assert positions_with_logits == [learnt]
    else:
        assert seen[0].shape == (1, 1, 32)
        assert positions_with_logits == [1, *[4] * (learnt // 4), *([learnt % 4] if learnt % 4 else [])]


def test_row_without_labels_costs_nothing_and_moves_nothing() -> None:
    model, batch = tiny_model(), mixed_batch()
    batch.labels[3] = IGNORE
    bank = bank_on(model)
    losses, gradients = values_and_gradients(bank, RowLosses(model), batch)
    assert losses[3] == 0.0
    assert [bool(gradient.any()) for gradient in gradients] == [True, False, True]


def test_padding_changes_no_loss() -> None:
    model, batch = tiny_model().eval(), mixed_batch()
    row_losses = RowLosses(model)
    inputs = {
        name: F.pad(tensor, (0, 5), value=PAD if name == "input_ids" else 0)
        for name, tensor in batch.inputs.items()
    }
    longer = replace(batch, inputs=inputs, labels=F.pad(batch.labels, (0, 5), value=IGNORE))
    torch.testing.assert_close(row_losses(longer), row_losses(batch), rtol=1e-6, atol=1e-6)


def test_bfloat16_base_gives_float32_losses_near_the_float32_ones() -> None:
    batch = mixed_batch()
    wide = RowLosses(tiny_model())(batch)
    half = RowLosses(tiny_model().to(torch.bfloat16))(batch)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, wide, rtol=2e-2, atol=0)


def test_hooks_are_removed_after_a_failure() -> None:
    """A forward that fails must not leave the head cutting positions away."""
    model, batch = cast(Any, tiny_model()), mixed_batch()
    row_losses = RowLosses(model)

    def out_of_memory(*args: Any) -> None:
        raise MemoryError

    handle = model.lm_head.register_forward_hook(out_of_memory)
    with pytest.raises(MemoryError):
        row_losses(batch)
    handle.remove()
    with torch.no_grad():
        assert model(input_ids=batch.inputs["input_ids"]).logits.shape == (
            *batch.inputs["input_ids"].shape,
            VOCABULARY,
        )
