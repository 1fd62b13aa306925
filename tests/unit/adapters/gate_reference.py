"""Gates over members, and an independent float64 form of what they compute, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.seeds import seeded_generator
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import linear_layers
from flora_train.export.gate_members import members_of
from tests.architectures import tiny_model
from tests.conftest import spec

LORAS: dict[str, dict[str, Any]] = {
    "one": {"method": "lora", "rank": 3, "alpha": 5.0, "target_modules": ["q_proj", "down_proj"]},
    "two": {
        "method": "lora",
        "rank": 2,
        "rank_pattern": {"down_proj": 4},
        "alpha": 3.0,
        "rslora": True,
        "target_modules": ["down_proj", "v_proj"],
    },
    "three": {"method": "lora", "rank": 1, "alpha": 1.0, "target_modules": ["q_proj", "v_proj", "up_proj"]},
}
FLORAS: dict[str, dict[str, Any]] = {
    "one": {"method": "flora", "rank": 2, "variant": "residual", "target_modules": ["q_proj", "down_proj"]},
    "two": {"method": "flora", "rank": 1, "variant": "pure", "target_modules": ["down_proj", "v_proj"]},
    "three": {"method": "flora", "rank": 3, "variant": "residual", "target_modules": ["q_proj", "v_proj"]},
}
IA3S: dict[str, dict[str, Any]] = {
    "one": {
        "method": "ia3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "two": {"method": "ia3", "target_modules": ["v_proj", "down_proj"], "feedforward_modules": []},
    "three": {
        "method": "ia3",
        "target_modules": ["v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
}
MIXED: dict[str, dict[str, Any]] = {
    "lora": LORAS["one"],
    "flora": FLORAS["two"],
    "ia3": IA3S["one"],
    "other": IA3S["two"],
    "second": LORAS["two"],
}
SETS = {"lora": LORAS, "flora": FLORAS, "ia3": IA3S, "mixed": MIXED}


def gate_spec(
    members: Mapping[str, Mapping[str, Any]], task: str = "a", family: str = "gate", **options: Any
) -> AdapterSpec:
    """A gate over these members, as resolve_members describes them."""
    described = [{"name": name, "source": f"folder/{name}", **member} for name, member in members.items()]
    over = [f"folder/{name}" for name in members]
    return spec("meteora", task, family, over=over, members=described, **options)


@torch.no_grad()
def randomise(bank: AdapterBank, scale: float = 0.3) -> None:
    """Give all gates and their members random values that depend on the adapter's name, but not the padding
    of their ranks."""
    for adapter, one in enumerate(bank.specs):
        if one.gate is None:
            continue
        generator = seeded_generator(1, one.name, "random members")
        for params in bank.parameters_of(one.name).values():
            gate = params["gate"]
            gate.copy_(torch.randn(gate.shape, generator=generator).to(gate))
        for member in members_of(bank, adapter).values():
            for views in member.values():
                for view in views.values():
                    view.add_(torch.randn(view.shape, generator=generator).to(view), alpha=scale)


class ReferenceLayer(nn.Module):
    """A layer with a gate, from the formula of arXiv 2405.13053: every token and member by itself."""

    def __init__(
        self,
        layer: nn.Linear,
        gate: Tensor,
        members: Sequence[tuple[AdapterSpec, dict[str, Tensor], bool] | None],
        top_k: int,
    ) -> None:
        super().__init__()
        self.layer, self.top_k, self.gate = layer, top_k, gate
        self.members = members
        """(specification on this layer, parameters, whether an IA3 scales the input) or None."""
        self.probabilities = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        self.probabilities = torch.stack([(self.gate @ token).softmax(0) for token in tokens])
        pairs = zip(tokens, self.probabilities, strict=True)
        outputs = [self._token(token, probabilities) for token, probabilities in pairs]
        return torch.stack(outputs).view(*x.shape[:-1], -1)

    def _token(self, x: Tensor, probabilities: Tensor) -> Tensor:
        ranked = sorted(range(len(probabilities)), key=lambda e: (-float(probabilities[e].detach()), e))
        chosen = ranked[: self.top_k]
        total = sum(probabilities[e] for e in chosen)
        y = self.layer(x)
        for e in chosen:
            weight = probabilities[e] / total
            if self.top_k == 1:
                weight = 1.0 + probabilities[e] - probabilities[e].detach()
            y = y + weight * self._delta(e, x)
        return y

    def _delta(self, e: int, x: Tensor) -> Tensor:
        """What member e adds to the layer's output."""
        member, W = self.members[e], self.layer.weight
        if member is None:
            return x.new_zeros(len(W))
        own, params, scales_input = member
        if own.method == "lora":
            return own.scaling * (params["B"] @ (params["A"] @ x))
        if own.method == "flora":
            return (W * (own.offset + params["B"] @ params["A"])) @ x - W @ x
        if scales_input:
            return W @ ((params["l"] - 1.0) * x)
        return (params["l"] - 1.0) * self.layer(x)


def reference_model(bank: AdapterBank, adapter: int) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The model of one gate of the bank in float64, and the leaves of its parameters: module -> gate, and
    member -> parameter."""
    model: Any = tiny_model(dtype=torch.float64)
    model.requires_grad_(False)
    one = bank.specs[adapter]
    assert one.gate is not None
    pool, _ = bank.location[adapter]
    of_members, leaves = members_of(bank, adapter), {}
    for module in linear_layers(model):
        if module not in pool.targets:
            continue
        gate = bank.parameters_of(one.name)[module]["gate"].detach().double().clone().requires_grad_()
        leaves[module] = {"gate": gate}
        members: list[Any] = []
        inputs = dict(pool.targets[module].members)
        for number, member in enumerate(one.gate.members):
            values = of_members[member.name].get(module)
            if values is None:
                members.append(None)
                continue
            own = {p: v.detach().double().clone().requires_grad_() for p, v in values.items()}
            leaves[module][member.name] = own
            members.append((member.at(module), own, inputs[number]))
        layer = ReferenceLayer(model.get_submodule(module), gate, members, one.gate.top_k)
        model.set_submodule(module, layer)
    return model, leaves


def reference_gate_loss(model: nn.Module, goals: Tensor, coefficient: float) -> Tensor:
    """coefficient x the mean over layers and tokens with a goal (goals [T], -1 for none) of the
    cross-entropy."""
    layers = [layer for layer in model.modules() if isinstance(layer, ReferenceLayer)]
    learnt = goals >= 0
    losses = [F.nll_loss(layer.probabilities[learnt].log(), goals[learnt]) for layer in layers]
    return coefficient * torch.stack(losses).mean()
