"""Every row of a batch uses its own adapter, and the frozen base does not change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE, AdapterSpec
from tests.architectures import VOCABULARY, tiny_model
from tests.conftest import FEW, perturb, spec
from tests.unit.adapters.helpers import logits, plain_logits, tiny_t5, tokens

SOME_TARGETS = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["q_proj", "fc2"],
    "phi": ["q_proj", "fc2"],
}


def varied_specs(architecture: str) -> list[AdapterSpec]:
    """Every method, both variants of fLoRA, several ranks and target sets."""
    some = SOME_TARGETS[architecture]
    return [
        spec("flora", family="residual", rank=3, variant="residual"),
        spec("flora", family="one", rank=1, variant="pure"),
        spec("flora", family="pure", rank=3, variant="pure"),
        spec("lora", family="lora", rank=4),
        spec("lora", family="some", rank=2, target_modules=some),
        spec("ia3", family="ia3", target_modules=some, feedforward_modules=some[1:]),
    ]


def varied_bank(architecture: str) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model(architecture).eval(), varied_specs(architecture))
    perturb(bank)
    return bank


@pytest.mark.parametrize("architecture", FEW)
def test_mixed_rows_equal_one_adapter_at_a_time(architecture: str) -> None:
    bank = varied_bank(architecture)
    ids = [*range(len(bank.specs)), 2, -1, 0, 4]
    x = tokens(len(ids))
    mixed = logits(bank, x, ids)
    for row, adapter in enumerate(ids):
        alone = logits(bank, x[row : row + 1], [adapter])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-5)
    plain = plain_logits(architecture, x)
    assert all(
        (mixed[row] - plain[row]).abs().max() > 1e-3 for row, adapter in enumerate(ids) if adapter >= 0
    )


@pytest.mark.parametrize("architecture", FEW)
def test_base_rows_equal_the_base_beside_trained_adapters(architecture: str) -> None:
    bank = varied_bank(architecture)
    x = tokens(8)
    names = [BASE, "task-one", BASE, "task-ia3", "task-residual", "task-some", "task-lora", BASE]
    mixed, plain = logits(bank, x, names), plain_logits(architecture, x)
    for row, name in enumerate(names):
        difference = (mixed[row] - plain[row]).abs().max()
        assert difference <= 1e-6 if name == BASE else difference > 1e-3, (
            name
        )  # not 0: matmuls are blocked by their shape


def test_without_a_routing_the_model_is_the_base() -> None:
    bank = varied_bank("llama")
    x = tokens(2)
    logits(bank, x, [0, 3])
    with torch.no_grad():
        assert torch.equal(bank.model(input_ids=x).logits, plain_logits("llama", x))


def test_unsorted_adapter_ids_give_what_sorted_ones_give() -> None:
    bank = varied_bank("llama")
    ids = torch.tensor([4, 0, -1, 5, 2, 0, 3, 1, 4])
    x = tokens(len(ids))
    order = ids.argsort(stable=True)
    # not bit by bit: in some matrix libraries the last digit of a row depends on its place in the batch
    torch.testing.assert_close(
        logits(bank, x, ids)[order], logits(bank, x[order], ids[order]), rtol=1e-5, atol=1e-6
    )


def test_unsorted_adapter_ids_give_the_gradients_of_sorted_ones() -> None:
    bank = varied_bank("llama")
    ids = torch.tensor([4, 0, -1, 5, 2, 0, 3, 1, 4])
    x = tokens(len(ids))
    order = ids.argsort(stable=True)
    gradients = [
        gradients_of(bank, x[permutation], ids[permutation])
        for permutation in (torch.arange(len(ids)), order)
    ]
    for ours, sorted_first in zip(*gradients, strict=True):
        assert ours.abs().max() > 0
        torch.testing.assert_close(ours, sorted_first, rtol=1e-4, atol=1e-6)


def test_gradients_reach_the_pool_of_the_rows_present_and_no_other() -> None:
    bank = varied_bank("llama")
    gradients_of(bank, tokens(3), torch.tensor([0, 3, 3]))
    reached = [bool(bank.gradient_row(i).abs().max() > 0) for i in range(len(bank.specs))]
    assert reached == [True, False, False, True, False, False]
    assert all(torch.isfinite(pool.gradients).all() for pool in bank.pools)


def gradients_of(bank: AdapterBank, x: Tensor, ids: Tensor) -> list[Tensor]:
    for pool in bank.pools:
        pool.gradients.zero_()
    bank.route(ids)
    bank.model(input_ids=x).logits.square().mean(dim=(1, 2)).sum().backward()
    bank.abandon()
    return [pool.gradients.clone() for pool in bank.pools]


def test_base_parameters_are_frozen_and_never_get_a_gradient() -> None:
    bank = varied_bank("llama")
    bank.model.train()
    gradients_of(bank, tokens(6), torch.arange(6))
    assert all(pool.gradients.abs().max() > 0 for pool in bank.pools)
    assert not any(parameter.requires_grad for parameter in bank.model.parameters())
    assert all(parameter.grad is None for parameter in bank.model.parameters())


def test_state_dict_holds_the_base_and_no_adapter() -> None:
    bank = varied_bank("opt")
    plain, wrapped = tiny_model("opt").state_dict(), bank.model.state_dict()
    assert {name.replace(".base_layer", "") for name in wrapped} == set(plain)
    assert len(wrapped) == len(plain)
    assert all(
        torch.equal(tensor, plain[name.replace(".base_layer", "")]) for name, tensor in wrapped.items()
    )


@pytest.mark.parametrize("architecture", FEW)
def test_bfloat16_base_runs_with_float32_adapters(architecture: str) -> None:
    wide = varied_bank(architecture)
    bank = AdapterBank.attach(tiny_model(architecture).to(torch.bfloat16).eval(), varied_specs(architecture))
    perturb(bank)
    ids = [5, 0, -1, 3, 1, 2, 4]
    x = tokens(len(ids))
    y = logits(bank, x, ids)
    assert y.dtype == torch.bfloat16
    expected = logits(wide, x, ids)
    assert (y.float() - expected).norm() <= 0.03 * expected.norm()
    for pool, gradient in zip(bank.pools, gradients_of(bank, x, torch.tensor(ids)), strict=True):
        assert pool.values.dtype == gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        assert gradient.abs().max() > 0


class Flattening(nn.Module):
    """A model that feeds its layer [B * L, d], as OPT and mixtures of experts have done."""

    def __init__(self, flatten: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.hidden = nn.Linear(16, 24)
        self.flatten = flatten

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> None:
        return None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embedding(x)
        y = self.hidden(rows.flatten(0, 1) if self.flatten else rows)
        return y.view(*x.shape, -1)


def test_layer_fed_with_flattened_tokens_routes_them_row_by_row() -> None:
    ids, x, outputs = [2, 0, -1, 1, 0], tokens(5), []
    for flatten in (False, True):
        specs = [
            spec("flora", rank=2),
            spec("lora"),
            spec("ia3", target_modules=["hidden"], feedforward_modules=[]),
        ]
        bank = AdapterBank.attach(Flattening(flatten), specs)
        perturb(bank)
        with torch.no_grad(), bank.routed(ids):
            outputs.append(bank.model(x))
    assert torch.equal(*outputs)
    plain = Flattening(False)(x)
    assert [(row - base).abs().max() <= 1e-6 for row, base in zip(outputs[0], plain, strict=True)] == [
        i == -1 for i in ids
    ]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).float().norm() / expected.float().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_encoder_decoder_model_takes_mixed_rows(feed_forward: str, dtype: torch.dtype) -> None:
    """Encoder, decoder and cross attention share one routing; source and target differ in length."""
    specs = [
        spec("flora", family="pure", rank=2, variant="pure", target_modules="all-linear"),
        spec("flora", family="residual", rank=3, variant="residual", target_modules="all-linear"),
        spec("lora", target_modules="all-linear"),
        spec("ia3"),
    ]
    model = tiny_t5(feed_forward_proj=feed_forward).to(dtype).eval()
    ids = [1, 3, -1, 0, 2]
    source, target = tokens(5, 9), tokens(5, 6)
    with torch.no_grad():
        plain = model(input_ids=source, decoder_input_ids=target).logits
    bank = AdapterBank.attach(model, specs)
    perturb(bank)
    with torch.no_grad():
        with bank.routed(ids):
            mixed = model(input_ids=source, decoder_input_ids=target).logits
        for row, adapter in enumerate(ids):
            part = slice(row, row + 1)
            with bank.routed([adapter]):
                alone = model(input_ids=source[part], decoder_input_ids=target[part]).logits
            rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
            assert relative_error(mixed[part], alone) <= rounding
            assert (relative_error(mixed[part], plain[part]) <= rounding) == (adapter == -1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_encoder_decoder_gradients_under_checkpointing_equal_those_without(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_t5().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        bank = AdapterBank.attach(
            model,
            [spec("flora", rank=2, target_modules="all-linear"), spec("lora", target_modules="all-linear")],
        )
        perturb(bank)
        bank.route([1, 0, 1])
        model(
            input_ids=tokens(3, 9), decoder_input_ids=tokens(3, 6), use_cache=False
        ).logits.square().mean().backward()
        bank.route([0, 1, 0])  # the backward has ended, so this is allowed
        gradients.append([pool.gradients.clone() for pool in bank.pools])
    for plain, recomputed in zip(*gradients, strict=True):
        assert 0 < plain.norm() < float("inf")
        assert (plain - recomputed).norm() <= 1e-5 * plain.norm()
