"""Special cases of MixLoRA: one expert, ties, experts without tokens, padding, noise, 16 bits."""

from __future__ import annotations

from copy import deepcopy
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routed.choice import choose
from flora_train.adapters.routing import RowDraw, RowNoise
from flora_train.adapters.spec import AdapterSpec, Experts
from flora_train.kernels.expert_pairs import UNUSED, combine_pairs, gather_pairs, group_pairs
from flora_train.kernels.segments import Segments
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, perturb, spec
from tests.unit.adapters.helpers import logits, plain_logits, tokens
from tests.unit.adapters.routed.reference import slow_model

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 5.0},
    "flora": {"rank": 2},
    "ia3": {},
}


def mixlora(expert: str = "lora", task: str = "task", **options: Any) -> AdapterSpec:
    settings = {"expert": expert, **METHODS[expert], "target_modules": "all-linear", **options}
    return spec("mixlora", task, "mix", **settings)


def gradients(bank: AdapterBank, name: str) -> dict[str, Tensor]:
    """`module.parameter` -> its gradient."""
    adapter = bank.id_of(name)
    pool, _ = bank.location[adapter]
    row, found = bank.gradient_row(adapter), {}
    for module, layout in pool.layout.items():
        for param, (start, shape) in layout.items():
            found[f"{module}.{param}"] = row[start : start + prod(shape)].view(shape).clone()
    return found


def learnt(bank: AdapterBank, x: Tensor, adapters: list[str], **routing: Any) -> Tensor:
    """The logits, after a backward of random weights."""
    bank.route(adapters, **routing)
    found = bank.model(input_ids=x).logits
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * weights.to(found)).sum().backward()
    return found.detach()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_one_expert_is_a_plain_adapter(method: str, architecture: str) -> None:
    routed = AdapterBank.attach(tiny_model(architecture), [mixlora(method, experts=1, balance_loss=1.0)])
    perturb(routed, 0.1)
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if method == "ia3":
        targets["feedforward_modules"] = ["down_proj" if architecture == "llama" else "mlp.c_proj"]
    plain = AdapterBank.attach(tiny_model(architecture), [spec(method, **METHODS[method], **targets)])
    ours = routed.parameters_of("task-mix")
    for module, params in plain.parameters_of(f"task-{method}").items():
        for param, values in params.items():
            values.copy_(ours[module][param].view_as(values))
    x = tokens(3)
    draws = {"draws": [RowDraw(0, 1.0)] * 3}
    assert torch.equal(learnt(routed, x, ["task-mix"] * 3, **draws), learnt(plain, x, [f"task-{method}"] * 3))
    theirs = gradients(plain, f"task-{method}")
    for name, gradient in gradients(routed, "task-mix").items():
        if name.endswith("router"):
            assert not gradient.any()
        else:
            difference = (gradient.view_as(theirs[name]) - theirs[name]).abs().max()
            assert difference <= 1e-6 * theirs[name].abs().max(), name


def test_of_equal_logits_the_first_experts_are_chosen_whatever_the_batch() -> None:
    experts = Experts("lora", count=13, top_k=5)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 3, (200, 13), generator=generator).float()
    choice = choose(logits, experts)
    for row, chosen in zip(logits.tolist(), choice.experts.tolist(), strict=True):
        assert chosen == sorted(range(13), key=lambda e: (-row[e], e))[:5]
    for row in (0, 57, 199):
        alone = choose(logits[row : row + 1], experts)
        assert torch.equal(alone.experts[0], choice.experts[row])
        assert torch.equal(alone.weights[0], choice.weights[row])


def test_logits_decide_where_probabilities_are_equal() -> None:
    """float32 rounds both probabilities to 1/2."""
    choice = choose(torch.tensor([[1.0, 1.0 + 2**-23, -200.0]]), Experts("lora", count=3, top_k=1))
    assert choice.experts.tolist() == [[1]]
    assert choice.weights.tolist() == [[1.0]]


@pytest.mark.parametrize("value", [3e38, -3e38, 88.0])
def test_large_logits_give_finite_weights(value: float) -> None:
    logits = torch.tensor([[value, 0.0, -value], [value, value, value]], requires_grad=True)
    choice = choose(logits, Experts("lora", count=3, top_k=2, top_p=0.9))
    choice.weights.sum().backward()
    assert torch.isfinite(choice.weights).all()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert torch.allclose(choice.weights.sum(1), torch.ones(2))


def test_top_p_uses_as_few_experts_as_reach_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.25, 0.25, 0.25, 0.25], [0.9, 0.05, 0.03, 0.02]]).log()
    choice = choose(logits, Experts("lora", count=4, top_k=3, top_p=0.6))
    assert choice.experts.tolist() == [[0, 1, UNUSED], [0, 1, 2], [0, UNUSED, UNUSED]]
    assert torch.allclose(choice.weights[0], torch.tensor([0.625, 0.375, 0.0]))
    assert choice.weights[2].tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_without_tokens_has_no_gradient(method: str) -> None:
    bank = AdapterBank.attach(tiny_model(), [mixlora(method, experts=3, top_k=1, balance_loss=0.0)])
    perturb(bank, 0.1)
    for params in bank.parameters_of("task-mix").values():
        if "router" in params:
            params["router"].zero_()  # all experts are alike: every token goes to the first
    learnt(bank, tokens(2), ["task-mix"] * 2)
    seen = 0
    for name, gradient in gradients(bank, "task-mix").items():
        assert torch.isfinite(gradient).all(), name
        if ".mlp." in name and not name.endswith("router"):
            assert gradient[0].abs().max() > 0, name
            assert not gradient[1:].any(), name
            seen += 1
    assert seen


@pytest.mark.parametrize("method", METHODS)
def test_rows_of_one_token(method: str) -> None:
    bank = AdapterBank.attach(tiny_model(), [mixlora(method, experts=4), *mixed_specs()[:2]])
    perturb(bank, 0.1)
    x = tokens(4, length=1)
    names = ["task-mix", "__base__", "a-flora", "task-mix"]
    together = learnt(bank, x, names, draws=[RowDraw(0, 1.0), None, None, RowDraw(0, 1.0)])
    for row, name in enumerate(names):
        assert torch.allclose(logits(bank, x[row : row + 1], [name])[0], together[row], atol=1e-5)
    assert all(torch.isfinite(gradient).all() for gradient in gradients(bank, "task-mix").values())


def test_what_stands_in_the_padding_changes_no_gradient() -> None:
    bank = AdapterBank.attach(
        tiny_model().double(), [mixlora(experts=4, balance_loss=1.0)], dtype=torch.float64
    )
    perturb(bank, 0.1)
    found = []
    for padding in (0, 7):
        x = tokens(2, length=6).clone()
        x[1, 3:] = padding
        mask = torch.ones_like(x)
        mask[1, 3:] = 0
        bank.route(["task-mix"] * 2, draws=[RowDraw(0, 1.0)] * 2, lengths=[6, 3])
        output = bank.model(input_ids=x, attention_mask=mask).logits
        (output[0].sum() + output[1, :3].sum()).backward()
        found.append(gradients(bank, "task-mix"))
        bank.location[0][0].gradients.zero_()
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=0, atol=1e-12), name
    assert found[0]["model.layers.0.mlp.router"].abs().max() > 1e-4


@pytest.mark.parametrize("noise", [{"jitter": 0.4}, {"dropout": 0.4}])
def test_noise_belongs_to_training(noise: dict[str, float]) -> None:
    x, names = tokens(2), ["task-mix"] * 2
    plain, noisy = (
        AdapterBank.attach(tiny_model(), [mixlora(experts=4, top_k=1, **options)]) for options in ({}, noise)
    )
    for bank in (plain, noisy):
        perturb(bank, 0.2)
    assert torch.equal(logits(plain, x, names), logits(noisy, x, names))
    seeds = [RowNoise(seed, x.shape[1]) for seed in (3, 4)]
    first, second = (learnt(noisy, x, names, noise=seeds) for _ in range(2))
    assert torch.equal(first, second)
    assert (first - logits(noisy, x, names)).abs().max() > 1e-3
    assert torch.allclose(learnt(plain, x, names, noise=seeds), logits(plain, x, names), rtol=0, atol=2e-6)


def test_untrained_experts_are_the_base() -> None:
    specs = [mixlora(method, task=method, experts=3) for method in METHODS]
    bank = AdapterBank.attach(tiny_model().eval(), specs)
    x = tokens(3)
    assert torch.allclose(
        logits(bank, x, [s.name for s in specs]), plain_logits("llama", x), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_rounding_in_16_bits_is_no_more_than_that_of_the_base(method: str, dtype: torch.dtype) -> None:
    model: Any = tiny_model("llama", dtype)
    block = model.model.layers[0].mlp
    exact = deepcopy(model).double()
    own = mixlora(method, experts=4)
    bank = AdapterBank.attach(model, [own])
    perturb(bank, 0.1)
    params = {
        module: {p: v.to(dtype).double() if p != "router" else v.double() for p, v in of_module.items()}
        for module, of_module in bank.parameters_of("task-mix").items()
        if module.startswith("model.layers.0.mlp")
    }
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad():
        of_base = exact.model.layers[0].mlp(x.double())
        base_error = (block(x).double() - of_base).abs().mean() / of_base.abs().mean()
        slow_model(exact, own, params, ("down_proj",))
        expected = exact.model.layers[0].mlp(x.double().reshape(1, 100, 32)).view(2, 50, 32)
        with bank.routed(["task-mix"] * 2):
            found = block(x)
    assert found.dtype == dtype
    error = (found.double() - expected).abs().mean() / expected.abs().mean()
    assert error <= 2.0 * base_error, (float(error), float(base_error))


def test_routers_are_float32_under_autocast() -> None:
    """The base computes in bfloat16; all tokens that read the same are sent to the same experts."""
    bank = AdapterBank.attach(tiny_model(), [mixlora(experts=4, top_k=2, balance_loss=1.0)])
    perturb(bank, 0.1)
    x, names = tokens(2), ["task-mix"] * 2
    exact = logits(bank, x, names)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = learnt(bank, x, names, draws=[RowDraw(0, 1.0)] * 2)
    assert (found.float() - exact).abs().mean() <= 0.05 * exact.abs().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for length in (1, 2, x.shape[1]):  # also the ways of few tokens
            decoded = logits(bank, x[:1, :length], names[:1])
            assert (decoded.float() - exact[:1, :length]).abs().mean() <= 0.05 * exact.abs().mean()
    for name, gradient in gradients(bank, "task-mix").items():
        assert gradient.dtype == torch.float32
        assert torch.isfinite(gradient).all()
        assert gradient.any(), name


def test_inference_mode_before_training_changes_nothing() -> None:
    x, names, found = tokens(2), ["task-mix"] * 2, []
    for first in (False, True):
        bank = AdapterBank.attach(tiny_model(), [mixlora(experts=4)])
        perturb(bank, 0.1)
        if first:
            with torch.inference_mode(), bank.routed(names):
                bank.model(input_ids=x)
        found.append((learnt(bank, x, names, draws=[RowDraw(0, 1.0)] * 2), gradients(bank, "task-mix")))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


def test_a_copy_of_the_model_is_the_base_and_leaves_the_original_alone() -> None:
    bank = AdapterBank.attach(tiny_model().eval(), [mixlora(experts=4)])
    perturb(bank, 0.1)
    x = tokens(2)
    before = logits(bank, x, ["task-mix"] * 2)
    copied: Any = deepcopy(bank.model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        assert not copied(input_ids=x).logits.any()
    assert torch.equal(logits(bank, x, ["task-mix"] * 2), before)
    assert torch.equal(logits(bank, x, ["__base__"] * 2), plain_logits("llama", x))


def test_pairs_and_their_gradients() -> None:
    """Tokens of two adapters of three experts, some with unused slots, against dense sums in float64."""
    experts = torch.tensor([[2, 0], [1, UNUSED], [0, 1], [2, 1], [0, UNUSED]])
    pairs = group_pairs(experts, Segments((0, 3, 5)), 3)
    assert pairs.segments.lengths == (2, 2, 1, 1, 1, 1)
    assert pairs.tokens.tolist() == [0, 2, 1, 2, 0, 4, 3, 3]
    assert not pairs.all_used
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(5, 2, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, weights: Tensor) -> Tensor:
        values = gather_pairs(x, pairs)
        factors = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None]
        return combine_pairs(values * factors, weights, pairs)

    assert torch.autograd.gradcheck(function, (x, weights))
    dense = torch.zeros(5, 4, dtype=torch.float64)
    for pair, token in enumerate(pairs.tokens.tolist()):
        slot = pairs.position[token].tolist().index(pair)
        dense[token] += weights[token, slot].detach() * (pair + 1) * x[token].detach()
    assert torch.allclose(function(x, weights).detach(), dense)
