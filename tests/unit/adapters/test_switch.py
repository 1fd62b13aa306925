"""Switch adapters against the formula in float64, and in degenerate cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import RowDraw
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.adapters.switch_reference import Reference, tiny_bank

ROWS = torch.tensor([[3, 5, 7, 9, 11], [2, 5, 8, 1, 13], [4, 4, 6, 19, 10]])
LENGTHS = (5, 3, 4)
CASES: dict[str, dict[str, Any]] = {
    "lora, one of 3": {"experts": 3, "top_k": 1, "rank": 2},
    "lora, 2 of 4": {"experts": 4, "top_k": 2, "rank": 2},
    "lora, all": {"experts": 3, "top_k": 3, "rank": 1},
    "flora, 2 of 3": {"expert": "flora", "experts": 3, "top_k": 2, "rank": 2},
    "flora, one of 3": {"expert": "flora", "experts": 3, "top_k": 1, "rank": 2},
    "ia3, 2 of 4": {"expert": "ia3", "experts": 4, "top_k": 2},
    "ia3, one of 2": {"expert": "ia3", "experts": 2, "top_k": 1},
}


def switch(task: str = "a", family: str = "switch", **options: Any) -> AdapterSpec:
    return spec("switch", task, family, **options)


def loss_of(outputs: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """A different loss for each row, over its real tokens."""
    rows = [outputs[i, :length].square().sum() * (i + 1) for i, length in enumerate(lengths)]
    return torch.stack(rows).sum()


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_values_and_all_gradients_are_those_of_the_formula(options: dict[str, Any]) -> None:
    """Two draws of one and two rows; the balance loss has a share of 1/2 of each."""
    bank = tiny_bank([switch(balance_loss=0.7, **options), switch("b", balance_loss=0.0, **options)])
    draws = [RowDraw(0, 0.5), RowDraw(1, 0.5), RowDraw(1, 0.5)]
    bank.route([0, 0, 0], draws=draws, lengths=LENGTHS)
    outputs = bank.model(ROWS)
    loss_of(outputs, LENGTHS).backward()
    reference = Reference(bank, 0)
    rows = [reference.row(ids[:length]) for ids, length in zip(ROWS, LENGTHS, strict=True)]
    for i, (expected, _, _) in enumerate(rows):
        assert torch.allclose(outputs[i, : LENGTHS[i]], expected, atol=1e-12)
    for length in (1, 2, LENGTHS[0]):  # the ways of few tokens, which decoding takes
        with bank.routed([0]), torch.no_grad():
            few = bank.model(ROWS[:1, :length])[0]
        assert torch.allclose(few, reference.row(ROWS[0, :length])[0], atol=1e-12)
    loss = torch.stack([(i + 1) * row[0].square().sum() for i, row in enumerate(rows)]).sum()
    balance = [reference.balance([row[1:]]) for row in (rows[0],)]
    balance.append(reference.balance([row[1:] for row in rows[1:]]))
    (loss + 0.5 * balance[0] + 0.5 * balance[1]).backward()
    expected = reference.gradients()
    assert expected.abs().max() > 1e-2
    assert reference.leaves["first"]["router"].grad is not None
    assert reference.leaves["first"]["router"].grad.abs().max() > 1e-3
    assert torch.allclose(bank.gradient_row(0), expected, atol=1e-7, rtol=1e-6)
    assert not bank.gradient_row(1).any()


def test_the_balance_loss_alone_moves_the_router_once() -> None:
    options = CASES["lora, 2 of 4"]
    plain = tiny_bank([switch(balance_loss=0.0, **options)])
    balanced = tiny_bank([switch(balance_loss=0.7, **options)])
    for bank in (plain, balanced):
        bank.route([0, 0], draws=[RowDraw(0, 1.0)] * 2, lengths=[5, 3])
        loss_of(bank.model(ROWS[:2]), (5, 3)).backward()
    difference = balanced.gradient_row(0) - plain.gradient_row(0)
    reference = Reference(balanced, 0)
    reference.balance([reference.row(ROWS[0])[1:], reference.row(ROWS[1][:3])[1:]]).backward()
    assert torch.allclose(difference, reference.gradients(), atol=1e-7)


@pytest.mark.parametrize("method", ["lora", "flora", "ia3"])
def test_one_expert_is_exactly_a_plain_adapter(method: str) -> None:
    options = {} if method == "ia3" else {"rank": 2}
    targets = {"target_modules": ["first", "second"]}
    if method == "ia3":
        plain_spec = spec(method, "a", "switch", feedforward_modules=[], **targets)
    else:
        plain_spec = spec(method, "a", "switch", **options, **targets)
    one = switch(expert=method, experts=1, top_k=1, **options, **targets)
    torch.manual_seed(0)
    results = []
    for adapter in (one, plain_spec):
        bank = tiny_bank([adapter], torch.float32)
        params = bank.parameters_of(adapter.name)
        for module in ("first", "second"):
            generator = torch.Generator().manual_seed(len(module))
            for name in params[module]:
                if name != "router":
                    params[module][name].copy_(torch.randn(params[module][name].shape, generator=generator))
        bank.route([0, 0, 0], draws=[RowDraw(0, 1.0)] * 3)
        outputs = bank.model(ROWS)
        outputs.square().sum().backward()
        pool = bank.pools[0]
        gradients = pool._leaf_gradients
        results.append(
            (outputs, {m: {n: g for n, g in gradients[m].items() if n != "router"} for m in gradients})
        )
    (ours, our_gradients), (plain, plain_gradients) = results
    assert torch.equal(ours, plain)
    for module, gradients in plain_gradients.items():
        for name, gradient in gradients.items():
            assert torch.equal(our_gradients[module][name].flatten(), gradient.flatten())


def test_one_expert_begins_as_the_plain_adapter_does() -> None:
    bank = AdapterBank.attach(
        tiny_model("llama"), [switch(experts=1, top_k=1, rank=2), spec("lora", "a", "switch2", rank=2)]
    )
    alone = AdapterBank.attach(tiny_model("llama"), [spec("lora", "a", "switch", rank=2)])
    ours, plain = bank.parameters_of("a-switch"), alone.parameters_of("a-switch")
    for module, params in plain.items():
        for name, value in params.items():
            assert torch.equal(ours[module][name][0], value)


def test_equal_experts_tie_and_the_first_are_chosen() -> None:
    bank = tiny_bank([switch(experts=4, top_k=2, rank=2)])
    bank.parameters_of("a-switch")["first"]["router"].zero_()
    seen = recorded(bank, [0])
    assert torch.equal(seen[0][0], torch.tensor([[0, 1]]).expand(5, 2))
    assert torch.allclose(seen[0][1], torch.full((5, 4), 0.25, dtype=torch.float64))


def test_an_expert_without_tokens_gets_no_gradient_but_by_the_router() -> None:
    bank = tiny_bank([switch(experts=3, top_k=1, rank=2)])
    router = bank.parameters_of("a-switch")["first"]["router"]
    router.zero_()  # all tokens go to the first
    bank.route([0])
    bank.model(ROWS[:1]).square().sum().backward()
    for module in ("first", "second"):
        gradients = bank.pools[0]._leaf_gradients[module]
        for name in ("A", "B"):
            assert gradients[name][0, 0].abs().max() > 0
            assert not gradients[name][0, 1:].any()
    assert bank.pools[0]._leaf_gradients["first"]["router"].abs().max() > 0


def test_rows_of_one_token() -> None:
    bank = tiny_bank([switch(experts=3, top_k=2, rank=2), switch("b", experts=3, top_k=2, rank=2)])
    bank.route([1, 0, -1])
    with torch.no_grad():
        outputs = bank.model(ROWS[:, :1])
    for row, adapter in ((0, 1), (1, 0)):
        expected = Reference(bank, adapter).row(ROWS[row, :1])[0]
        assert torch.allclose(outputs[row], expected, atol=1e-12)
    bank.router.set(None)
    assert torch.equal(outputs[2], bank.model(ROWS[2:, :1])[0])


def test_the_recorder_gets_the_choices_of_real_tokens() -> None:
    bank = tiny_bank([switch(experts=3, top_k=2, rank=2), switch("b", experts=3, top_k=2, rank=2)])
    names: list[tuple[str, str]] = []
    seen = recorded(bank, [1, 0, 1], LENGTHS, names=names)
    assert names == [("a-switch", "first"), ("b-switch", "first")]
    assert [len(experts) for experts, _ in seen] == [3, 9]
    _, chosen, probabilities = Reference(bank, 0).row(ROWS[1, :3])
    assert [set(row.tolist()) for row in seen[0][0]] == [set(weights) for weights in chosen]
    assert torch.allclose(seen[0][1], probabilities.detach())


def recorded(
    bank: AdapterBank,
    adapters: list[int],
    lengths: tuple[int, ...] | None = None,
    *,
    names: list[tuple[str, str]] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """What a recorder gets in a forward."""
    seen: list[tuple[Tensor, Tensor]] = []

    class Recorder:
        def add(self, spec: AdapterSpec, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
            seen.append((experts, probabilities))
            if names is not None:
                names.append((spec.name, module))

    bank.router.recorder = Recorder()
    bank.route(adapters, lengths=lengths)
    with torch.no_grad():
        bank.model(ROWS[: len(adapters)])
    bank.router.recorder = None
    return seen


def test_a_second_forward_of_one_routing_decides_anew() -> None:
    bank = tiny_bank([switch(experts=3, top_k=1, rank=2)])
    with torch.no_grad(), bank.routed([0]):
        first, second = bank.model(ROWS[:1]), bank.model(ROWS[1:2])
        assert torch.equal(bank.model(ROWS[:1]), first)
    assert torch.allclose(second[0], Reference(bank, 0).row(ROWS[1])[0], atol=1e-12)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "phi", "bert"])
def test_the_layer_that_runs_first_decides(architecture: str) -> None:
    model = tiny_model(architecture)
    bank = AdapterBank.attach(model, [switch(experts=3, rank=2)])
    order: list[str] = []
    for name in bank.pools[0].targets:
        bank.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: order.append(name)
        )
    with torch.no_grad(), bank.routed([0]):
        bank.model(torch.tensor([[5, 6, 7]]))
    assert [name for name, target in bank.pools[0].targets.items() if target.decides] == [order[0]]
    assert "router" in bank.pools[0].layout[order[0]]


def test_layers_that_read_other_tokens_are_refused_before_training() -> None:
    for architecture in ("t5", "whisper"):
        with pytest.raises(UserError, match="one decision for a token cannot hold in all of these layers"):
            AdapterBank.attach(tiny_model(architecture), [switch(experts=3, rank=2)])
    bank = AdapterBank.attach(tiny_model("whisper"), [switch(experts=3, rank=2, parent_module="encoder")])
    assert len(bank.pools[0].targets) > 2


def test_ia3_experts_scale_the_input_of_feed_forward_outputs() -> None:
    bank = AdapterBank.attach(tiny_model("llama"), [switch(expert="ia3", experts=3, top_k=2)])
    inputs = [name for name, target in bank.pools[0].targets.items() if target.feedforward]
    assert inputs
    assert all(name.endswith("down_proj") for name in inputs)
    for params in bank.parameters_of("a-switch").values():
        generator = torch.Generator().manual_seed(1)
        params["l"].add_(0.3 * torch.randn(params["l"].shape, generator=generator))
    name = inputs[0]
    layer: Any = bank.model.get_submodule(name)
    x = torch.randn(1, 4, layer.in_features, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), bank.routed([0]):
        bank.model(torch.tensor([[5, 6, 7, 8]]))
        routing = bank.router.routing
        assert routing is not None
        decision = next(v for key, v in routing.loads.items() if key[0] == "decision")  # type: ignore[index]
        ours = layer(x)
        scale = bank.parameters_of("a-switch")[name]["l"]
        for t in range(4):
            factor = 1.0 + sum(
                w * (scale[e] - 1.0)
                for e, w in zip(decision.choice.experts[t], decision.choice.weights[t], strict=True)
            )
            assert torch.allclose(ours[0, t], layer.base_layer(factor * x[0, t]), atol=1e-5)
