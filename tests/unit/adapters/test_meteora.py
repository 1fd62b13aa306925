"""Gates over adapters compute what the formula says, and learn from the gradients that it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.gate_loss import gate_losses, goal_positions
from flora_train.adapters.routing import RowGoal
from flora_train.adapters.spec import AdapterSpec
from flora_train.export.gate_members import copy_members, members_of
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.gate_reference import (
    FLORAS,
    IA3S,
    LORAS,
    SETS,
    gate_spec,
    randomise,
    reference_gate_loss,
    reference_model,
)
from tests.unit.adapters.helpers import tokens

LENGTH = 5


def double_bank(*specs: AdapterSpec) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model(dtype=torch.float64), specs, dtype=torch.float64)
    randomise(bank)
    return bank


def token_loss(logits: Tensor, x: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("members", SETS)
@pytest.mark.quick("lora-1", "flora-2", "ia3-2", "mixed-1", "mixed-2")
def test_gate_equals_the_formula_in_value_and_all_gradients(members: str, top_k: int) -> None:
    """Beside rows of the base, a plain adapter and another gate, with the gate's own loss."""
    gate = gate_spec(SETS[members], top_k=top_k, train_members=True, gate_loss=0.7)
    bank = double_bank(spec("lora", "b"), gate, gate_spec(LORAS, "c", "other", top_k=1))
    adapter, x = bank.ids[gate.name], tokens(5, LENGTH)
    rows = [bank.ids["c-other"], adapter, -1, adapter, bank.ids["b-lora"]]
    goals = torch.randint(-1, len(SETS[members]), (2, LENGTH), generator=torch.Generator().manual_seed(3))
    share = 0.7 / float((goals >= 0).sum())
    row_goals = [RowGoal(of_row.numpy(), share) for of_row in goals]
    bank.route(rows, goals=[None, row_goals[0], None, row_goals[1], None])
    logits = bank.model(input_ids=x).logits
    mine = torch.tensor([1, 3])
    token_loss(logits[mine], x[mine]).backward()
    losses = gate_losses(bank.router.routing)

    model, leaves = reference_model(bank, adapter)
    expected = model(input_ids=x[mine]).logits
    gate_loss = reference_gate_loss(model, goals.flatten(), 0.7)
    (token_loss(expected, x[mine]) + gate_loss).backward()

    assert float((logits[mine] - expected).abs().max()) < 1e-10
    assert float((losses[gate.name] - gate_loss).abs()) < 1e-10
    assert losses.keys() == {gate.name}
    for length in (1, 2, LENGTH):  # the way of few tokens, which decoding takes
        with bank.routed([gate.name]), torch.no_grad():
            few = bank.model(input_ids=x[1:2, :length]).logits
        assert float((few - expected[:1, :length]).abs().max()) < 1e-10
    gradients = _gradients(bank, adapter)
    for module, of_module in leaves.items():
        for name, leaf in of_module.items():
            parts = {"gate": leaf} if name == "gate" else leaf
            for param, tensor in parts.items():
                found = gradients[module, name, param]
                wanted = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                assert float((found - wanted).abs().max()) < 1e-8, (module, name, param)
    assert all(float(leaves[module]["gate"].grad.abs().max()) > 1e-6 for module in leaves)


def _gradients(bank: AdapterBank, adapter: int) -> dict[tuple[str, str, str], Tensor]:
    """(module, "gate" or member, parameter) -> gradient, read through the views of the values."""
    pool, member = bank.location[adapter]
    values = pool.values[member].clone()
    found: dict[tuple[str, str, str], Tensor] = {}
    try:
        pool.values[member].copy_(pool.gradients[member])
        for module, params in bank.parameters_of(bank.specs[adapter].name).items():
            found[module, "gate", "gate"] = params["gate"].clone()
        for name, modules in members_of(bank, adapter).items():
            for module, views in modules.items():
                found |= {(module, name, param): view.clone() for param, view in views.items()}
    finally:
        pool.values[member].copy_(values)
    return found


@pytest.mark.parametrize("member", [LORAS["two"], FLORAS["one"], FLORAS["two"], IA3S["one"], IA3S["two"]])
@pytest.mark.parametrize("top_k", [None, 1])
def test_gate_over_one_member_is_that_adapter_bit_by_bit(member: dict[str, Any], top_k: int | None) -> None:
    options = {key: value for key, value in member.items() if key != "method"}
    plain = spec(member["method"], "b", "plain", **options)
    gate = gate_spec({"one": member}, top_k=top_k)
    bank = AdapterBank.attach(tiny_model(), [plain, gate])
    perturb(bank)
    copy_members(bank, bank.ids[gate.name], {"one": bank.parameters_of("b-plain")})
    x = tokens(3, 1 + LENGTH)
    with bank.routed(["b-plain"] * 3):
        expected = bank.model(input_ids=x).logits
    with bank.routed([gate.name] * 3):
        found = bank.model(input_ids=x).logits
    assert torch.equal(found, expected)


def test_all_members_are_used_with_top_k_of_all_and_ties_take_the_first() -> None:
    """With equal logits, weights are equal, and top_k = 1 takes the first member."""
    every, first = gate_spec(LORAS, top_k=3), gate_spec(LORAS, "b", top_k=1)
    bank = double_bank(every, first)
    for params in bank.parameters_of(first.name).values():
        params["gate"].zero_()
    for params in bank.parameters_of(every.name).values():
        params["gate"].zero_()
    x, choices = tokens(2, LENGTH), Recorder()
    bank.router.recorder = choices
    with bank.routed([every.name, first.name]), torch.no_grad():
        logits = bank.model(input_ids=x).logits
    assert set(choices.experts[first.name].unique().tolist()) == {0}
    assert choices.experts[every.name].sort(1).values.unique(dim=0).tolist() == [[0, 1, 2]]
    for row, one in enumerate((every, first)):
        model, _ = reference_model(bank, bank.ids[one.name])
        with torch.no_grad():
            assert float((model(input_ids=x[row : row + 1]).logits - logits[row]).abs().max()) < 1e-10


class Recorder:
    """Collects the choices of all layers."""

    def __init__(self) -> None:
        self.experts: dict[str, Tensor] = {}
        self.modules: set[str] = set()
        self.tokens = 0

    def add(self, spec: AdapterSpec, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
        self.experts[spec.name] = torch.cat([self.experts.get(spec.name, experts[:0]), experts])
        self.modules.add(module)
        self.tokens = len(experts)
        assert torch.allclose(probabilities.sum(1), torch.ones(len(experts)).to(probabilities))


def test_recorder_gets_the_choices_of_real_tokens_of_every_layer() -> None:
    gate = gate_spec(SETS["mixed"])
    bank, recorder = double_bank(gate), Recorder()
    bank.router.recorder = recorder
    bank.route([gate.name, "__base__", gate.name], lengths=[4, LENGTH, 2])
    with torch.no_grad():
        bank.model(input_ids=tokens(3, LENGTH))
    pool, _ = bank.location[0]
    assert recorder.modules == set(pool.targets)
    assert recorder.tokens == 6
    assert recorder.experts[gate.name].shape == (6 * len(pool.targets), 2)


def test_rows_of_one_token_are_computed() -> None:
    gate = gate_spec(SETS["mixed"])
    bank, x = double_bank(gate), tokens(2, 1)
    with bank.routed([gate.name, gate.name]), torch.no_grad():
        logits = bank.model(input_ids=x).logits
    model, _ = reference_model(bank, 0)
    with torch.no_grad():
        assert float((model(input_ids=x).logits - logits).abs().max()) < 1e-10


def test_a_layer_that_a_member_does_not_adapt_is_unchanged_for_its_tokens() -> None:
    """With gates of 0, all tokens choose member `one`, which adapts neither v_proj nor up_proj."""
    gate = gate_spec(LORAS, top_k=1)
    plain = spec("lora", "b", "plain", **{k: v for k, v in LORAS["one"].items() if k != "method"})
    bank = AdapterBank.attach(tiny_model(), [plain, gate])
    perturb(bank, 0.1)
    bank.row(bank.ids[gate.name]).zero_()  # also the padding of ranks
    values = members_of(bank, bank.ids[gate.name]) | {"one": bank.parameters_of("b-plain")}
    copy_members(bank, bank.ids[gate.name], values)
    assert not values["one"].keys() >= bank.parameters_of(gate.name).keys()
    x = tokens(2, LENGTH)
    with torch.no_grad():
        with bank.routed([gate.name, gate.name]):
            found = bank.model(input_ids=x).logits
        with bank.routed(["b-plain"] * 2):
            expected = bank.model(input_ids=x).logits
    assert torch.allclose(found, expected, atol=1e-6)


def test_goals_are_at_the_positions_that_predict_learnt_tokens() -> None:
    """Two packed documents: a prompt of 2 tokens with 3 learnt ones, and a text of 3 tokens."""
    documents = [(5, np.array([[2, 5]], dtype=np.int32)), (3, np.array([[1, 3]], dtype=np.int32))]
    assert goal_positions(documents, [4, 1]).tolist() == [-1, 4, 4, 4, -1, 1, 1, -1]
