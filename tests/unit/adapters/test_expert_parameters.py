"""Adapters on fused experts equal a slow loop over tokens in float64, whatever rows they are mixed with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.expert_parameters import AdapterExperts
from flora_train.adapters.fused_experts import fused_experts
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import find_targets
from flora_train.config.errors import UserError
from tests.architectures import MIXTURES, tiny_model
from tests.conftest import perturb, spec
from tests.families import FUSED_EXPERTS, OTHER_EXPERTS, family_model
from tests.unit.adapters.helpers import logits, plain_logits, tokens

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
ON_EXPERTS: dict[str, Any] = {"target_modules": [], "target_parameters": BOTH}
EXPERTS = "model.layers.1.mlp.experts"


def expert_specs(**options: Any) -> list[AdapterSpec]:
    """Every method; two LoRAs in one pool, one parameter alone, ranks that differ between parameters."""
    options = {**ON_EXPERTS, **options}
    return [
        spec("flora", family="residual", rank=3, variant="residual", **options),
        spec("flora", family="pure", rank=3, variant="pure", **options),
        spec("lora", family="lora", rank=3, alpha=2.0, **options),
        spec("lora", family="other", rank=3, alpha=7.0, **options),
        spec("lora", family="ranks", rank=2, rank_pattern={"experts.down_proj": 4}, **options),
        spec("lora", family="down", rank=2, **{**options, "target_parameters": BOTH[1:]}),
        spec("ia3", family="ia3", **options),
        spec("ia3", family="outputs", feedforward_modules=[], **options),
        spec("ia3", family="inputs", feedforward_modules=BOTH, **options),
    ]


def adapted(
    weight: Tensor, bias: Tensor, adapter: AdapterSpec, params: Mapping[str, Tensor], feedforward: bool
) -> tuple[Tensor, Tensor]:
    """The weight [out, in] and bias of one expert, from the formula of the method."""
    if adapter.method == "lora":
        return weight + adapter.scaling * params["B"] @ params["A"], bias
    if adapter.method == "flora":
        return weight * (adapter.offset + params["B"] @ params["A"]), bias
    if feedforward:
        return weight * params["l"][None, :], bias
    return weight * params["l"][:, None], bias * params["l"]


def activation(architecture: str, hidden: Tensor, experts: Any) -> Tensor:
    """What follows the first product, from the papers and model cards."""
    if architecture == "gpt_oss":
        gate, up = hidden[0::2], hidden[1::2]
        gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = hidden.chunk(2)
    return F.silu(gate) * up


def reference(
    bank: AdapterBank,
    architecture: str,
    leaves: Mapping[str, Mapping[str, Mapping[str, Tensor]]],
    inputs: tuple[Tensor, Tensor, Tensor],
    rows: Sequence[str],
) -> Tensor:
    """The experts' outputs, token by token. leaves: adapter -> target -> parameter -> tensor."""
    hidden, chosen, weights = inputs
    wrapper = bank.model.get_submodule(EXPERTS)
    assert isinstance(wrapper, AdapterExperts)
    experts: Any = wrapper.base_layer
    outputs: list[Tensor] = []
    for t, token in enumerate(hidden):
        name = rows[t // (len(hidden) // len(rows))]
        total = torch.zeros_like(token)
        for slot, e in enumerate(chosen[t].tolist()):
            x = token
            for part in ("gate_up_proj", "down_proj"):
                weight = getattr(experts, part)[e]
                bias = weight.new_zeros(1)
                if architecture == "gpt_oss":
                    weight, bias = weight.T, getattr(experts, f"{part}_bias")[e]
                target = f"{EXPERTS}.{part}"
                if target in leaves.get(name, {}):
                    pool, member = bank.location[bank.id_of(name)]
                    params = {key: value[e] for key, value in leaves[name][target].items()}
                    feedforward = pool.targets[target].feedforward
                    at = pool.specs[member].at(target)
                    weight, bias = adapted(weight, bias, at, params, feedforward)
                x = weight @ x + bias
                if part == "gate_up_proj":
                    x = activation(architecture, x, experts)
            total = total + weights[t, slot] * x
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_values_and_every_gradient_equal_a_loop_over_tokens_in_float64(architecture: str) -> None:
    model: Any = tiny_model(architecture, torch.float64)
    model.config._experts_implementation = "eager"  # others have no float64
    bank = AdapterBank.attach(model, expert_specs(), dtype=torch.float64)
    perturb(bank)
    names = [*bank.ids]
    rows = [*names[::-1], "__base__", names[2], names[3]]
    generator = torch.Generator().manual_seed(3)
    length, width, count, used = 2, 32, 4, 2
    hidden = torch.randn(len(rows) * length, width, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:used] for _ in hidden])
    weights = torch.rand(len(hidden), used, generator=generator, dtype=torch.float64)
    dy = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)

    leaves: dict[str, Any] = {}
    for name in names:
        leaves[name] = {
            target: {key: value.detach().clone().requires_grad_() for key, value in params.items()}
            for target, params in bank.parameters_of(name).items()
        }
    exact = hidden.clone().requires_grad_(), chosen, weights.clone().requires_grad_()
    expected = reference(bank, architecture, leaves, exact, rows)
    expected.backward(dy)

    bank.route(rows)
    mine = hidden.clone().requires_grad_(), chosen, weights.clone().requires_grad_()
    result = bank.model.get_submodule(EXPERTS)(*mine)
    torch.testing.assert_close(result, expected)
    result.backward(dy)
    torch.testing.assert_close(mine[0].grad, exact[0].grad)
    torch.testing.assert_close(mine[2].grad, exact[2].grad)
    for name in names:
        pool, member = bank.location[bank.id_of(name)]
        gradient = pool.gradients[pool.slot_of[member]]
        for target, params in leaves[name].items():
            for key, leaf in params.items():
                start, shape = pool.layout[target][key]
                own = gradient[start : start + leaf.numel()].view(shape)
                if target.startswith(EXPERTS):
                    assert float(leaf.grad.abs().max()) > 0
                    torch.testing.assert_close(own, leaf.grad)
                else:
                    assert not own.any()


@pytest.mark.parametrize("architecture", MIXTURES)
def test_identity_adapters_equal_the_base_and_its_router_decides_alike(architecture: str) -> None:
    x = tokens(10)
    expected = plain_logits(architecture, x)
    model = tiny_model(architecture).eval()
    decisions: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        decisions.append(args[1])

    bank = AdapterBank.attach(model, [s for s in expert_specs() if s.family != "pure"])
    for name in fused_experts(model):
        model.get_submodule(name.replace(".base_layer", "")).register_forward_pre_hook(record)
    names = [*bank.ids]
    torch.testing.assert_close(
        logits(bank, x, [*names, *["__base__"] * (10 - len(names))]), expected, rtol=1e-5, atol=1e-6
    )
    routed = list(decisions)
    decisions.clear()
    assert torch.equal(model(input_ids=x).logits, expected)
    assert len(routed) == len(decisions) == 2
    assert all(torch.equal(one, other) for one, other in zip(routed, decisions, strict=True))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixed_batch_equals_each_row_alone(architecture: str) -> None:
    """Also beside adapters of linear layers, and for rows that are not grouped by adapter."""
    specs = [*expert_specs(), spec("lora", family="attention", target_modules=["q_proj"])]
    specs.append(spec("flora", family="wide", target_modules=["q_proj", "o_proj"], target_parameters=BOTH))
    bank = AdapterBank.attach(tiny_model(architecture).eval(), specs)
    perturb(bank)
    names = ["__base__", *[*bank.ids][::-1], "task-lora"]
    x = tokens(len(names))
    together = logits(bank, x, names)
    plain = plain_logits(architecture, x)
    for row, name in enumerate(names):
        alone = logits(bank, x[row : row + 1], [name])
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=2e-6)
        assert name == "__base__" or float((plain[row] - together[row]).abs().max()) > 1e-4


@pytest.mark.parametrize("family", FUSED_EXPERTS)
@pytest.mark.quick("nemotron_h", "deepseek_v3")
def test_experts_of_other_families_compute_each_row_with_its_own_adapter(family: str) -> None:
    model: Any = family_model(family, **FUSED_EXPERTS[family])
    parts = sorted({part for layout in fused_experts(model).values() for part in layout.weights})
    options: dict[str, Any] = {"target_modules": [], "target_parameters": parts}
    names = ["task-ia3", "task-lora", "__base__", "task-flora"]
    x = tokens(len(names))
    with torch.no_grad():
        plain = model(input_ids=x, use_cache=False).logits
        bank = AdapterBank.attach(model, [spec(method, **options) for method in ("flora", "lora", "ia3")])
        with bank.routed(names):
            identity = model(input_ids=x, use_cache=False).logits
        torch.testing.assert_close(identity, plain, rtol=1e-4, atol=1e-5)
        perturb(bank)
        with bank.routed(names):
            together = model(input_ids=x, use_cache=False).logits
        for row, name in enumerate(names):
            with bank.routed([name]):
                alone = model(input_ids=x[row : row + 1], use_cache=False).logits
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)
            assert name == "__base__" or float((plain[row] - together[row]).abs().max()) > 1e-4


@pytest.mark.parametrize("family", OTHER_EXPERTS)
def test_experts_of_families_with_another_layout_are_refused(family: str) -> None:
    parameter = OTHER_EXPERTS[family]
    wrong = spec("lora", target_modules=[], target_parameters=[parameter])
    with pytest.raises(
        UserError, match=r"layout of experts is not supported|not the weight of fused experts"
    ):
        AdapterBank.attach(family_model(family), [wrong])


def test_an_adapter_on_experts_has_the_same_start_alone_and_among_others() -> None:
    specs = expert_specs()
    together = AdapterBank.attach(tiny_model("mixtral"), specs)
    for adapter in specs[:3]:
        alone = AdapterBank.attach(tiny_model("mixtral"), [adapter])
        assert torch.equal(alone.row(0), together.row(together.id_of(adapter.name)))
    A = together.parameters_of("task-lora")[f"{EXPERTS}.gate_up_proj"]["A"]
    assert A.shape == (4, 3, 32)
    assert not torch.equal(A[0], A[1])


def test_experts_that_get_no_token_get_no_gradient() -> None:
    bank = AdapterBank.attach(tiny_model("mixtral"), expert_specs()[:3])
    perturb(bank)
    bank.route([0, 2])
    hidden = torch.randn(4, 32)
    chosen = torch.tensor([[0, 3]] * 4)
    bank.model.get_submodule(EXPERTS)(hidden, chosen, torch.ones(4, 2)).sum().backward()
    for pool, slot in ((bank.location[0][0], 0), (bank.location[2][0], 0)):
        gradients = pool.gradients[slot]
        for start, shape in pool.layout[f"{EXPERTS}.down_proj"].values():
            own = gradients[start : start + prod(shape)].view(shape)
            assert own[0].any()
            assert own[3].any()
            assert not own[1].any()
            assert not own[2].any()


BAD = [
    (["experts.gate_proj"], "experts.gate_proj", "matches no parameter of .*experts.gate_up_proj"),
    (["gate_upp_proj"], "gate_upp_proj", "matches no parameter of MixtralForCausalLM"),
    (["q_proj.weight"], "q_proj.weight", "not the weight of fused experts: .*target_modules"),
    (["mlp.gate.weight"], "mlp.gate.weight", "not the weight of fused experts"),
]


@pytest.mark.parametrize(("parameters", "value", "hint"), BAD, ids=[str(case[0]) for case in BAD])
def test_names_that_are_no_weights_of_experts_are_refused(
    parameters: list[str], value: str, hint: str
) -> None:
    wrong = spec("lora", target_modules=[], target_parameters=parameters)
    with pytest.raises(UserError, match=hint) as raised:
        AdapterBank.attach(tiny_model("mixtral"), [wrong])
    assert f"adapters.lora.target_parameters = '{value}'" in str(raised.value)


def test_a_base_without_experts_is_refused() -> None:
    with pytest.raises(UserError, match="matches no parameter of LlamaForCausalLM, which has no fused exp"):
        AdapterBank.attach(tiny_model("llama"), [spec("lora", **ON_EXPERTS)])


def test_experts_of_another_layout_are_refused() -> None:
    model = tiny_model("mixtral")
    experts: Any = model.get_submodule(EXPERTS)
    experts.has_post_expert_norm, experts.post_expert_norm = True, nn.Identity()
    with pytest.raises(UserError, match=r"layers.1.mlp.experts.gate_up_proj of MixtralExperts, whose layout"):
        AdapterBank.attach(model, [spec("lora", **ON_EXPERTS)])


def test_quantized_experts_are_refused() -> None:
    model = tiny_model("mixtral")
    experts: Any = model.get_submodule(EXPERTS)
    packed = torch.zeros(experts.down_proj.shape, dtype=torch.uint8)
    experts.down_proj = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(UserError, match=r"not supported \(or is quantized"):
        find_targets(model, spec("lora", target_modules=[], target_parameters=["experts.down_proj"]))


def test_experts_that_compute_something_else_are_refused_before_training() -> None:
    """The model class says the layout, and the module's own forward decides."""
    model = tiny_model("mixtral")
    experts: Any = model.get_submodule(EXPERTS)
    experts.config._experts_implementation = "eager"
    experts.act_fn = nn.Identity()  # used by its forward and ours: still equal
    AdapterBank.attach(model, [spec("lora", **ON_EXPERTS)])
    model = tiny_model("mixtral")
    experts = model.get_submodule(EXPERTS)
    experts._apply_gate = lambda hidden: 2.0 * hidden.chunk(2, dim=-1)[0]
    experts.config._experts_implementation = "eager"
    with pytest.raises(UserError, match="a MixtralExperts, which does not compute what its layout"):
        AdapterBank.attach(model, [spec("lora", **ON_EXPERTS)])


def test_tokens_of_other_rows_than_the_routed_ones_are_an_error() -> None:
    bank = AdapterBank.attach(tiny_model("mixtral"), [spec("lora", **ON_EXPERTS)])
    bank.route([0, 0, 0])
    with pytest.raises(RuntimeError, match="10 tokens, which are not the tokens of 3 routed rows"):
        bank.model.get_submodule(EXPERTS)(torch.ones(10, 32), torch.zeros(10, 1).long(), torch.ones(10, 1))
