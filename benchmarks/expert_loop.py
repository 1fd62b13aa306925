"""MixLoRA as its published code computes it: expert by expert, each a whole feed-forward block.

The order of work is that of MoE-PEFT (TUDB-Labs, Apache-2.0), written anew: the base's attention layers run
once for all rows of a batch, every adapter's rows go through their own LoRA and their own router, and a
Python loop over all experts (also those without tokens) indexes the tokens of each, runs W1, W3 and W2 with
the expert's LoRA on them, and adds the result to the output. With `shared_inputs`, W1 x and W3 x of the base
are computed once for all experts, as its option `efficient_operator` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.methods.routed import ROUTER
from flora_train.adapters.spec import Experts

Layer = Mapping[str, Tensor]
"""A and B of a LoRA, or of stacks of them."""


@dataclass(frozen=True)
class LoopAdapter:
    """One MixLoRA adapter with LoRA experts."""

    parameters: Mapping[str, Layer]
    """Module name -> its parameters, as the bank names and shapes them."""
    scaling: float
    experts: Experts

    @classmethod
    def of_bank(cls, bank: AdapterBank, name: str) -> LoopAdapter:
        """A copy of an adapter of a bank, whose parameters require gradients."""
        spec = bank.specs[bank.id_of(name)]
        assert spec.experts is not None
        copies = {}
        for module, layer in bank.parameters_of(name).items():
            copies[module] = {key: value.detach().clone().requires_grad_() for key, value in layer.items()}
        return cls(copies, spec.scaling, spec.experts)

    def tensors(self) -> list[Tensor]:
        """All parameters."""
        return [tensor for layer in self.parameters.values() for tensor in layer.values()]


@dataclass
class LoopRows:
    """Which adapter each row of the current batch has, and what the routers computed."""

    spans: Sequence[tuple[int, int, int]] = ()
    """(adapter, first row, end row), in the order of the rows. Empty: the base computes alone."""
    logits: dict[int, list[Tensor]] = field(default_factory=dict)
    """Adapter -> float32 [T, E] of each layer."""

    def begin(self, spans: Sequence[tuple[int, int, int]]) -> None:
        """Begin a forward pass."""
        self.spans, self.logits = spans, {}


class ExpertLoop:
    """Puts MixLoRA adapters into a model, whose modules are replaced."""

    def __init__(self, model: nn.Module, adapters: Sequence[LoopAdapter], *, shared_inputs: bool) -> None:
        self.model, self.adapters, self.rows = model, adapters, LoopRows()
        names = list(adapters[0].parameters)
        blocks = [name for name in names if ROUTER in adapters[0].parameters[name]]
        for name in blocks:
            block = LoopBlock(model.get_submodule(name), name, self, shared_inputs=shared_inputs)
            model.set_submodule(name, block)
        inside = tuple(f"{block}." for block in blocks)
        for name in names:
            if name not in blocks and not name.startswith(inside):
                model.set_submodule(name, LoopLinear(model.get_submodule(name), name, self))

    def balance_loss(self, adapter: int) -> Tensor:
        """coefficient x E x sum_e f_e P_e over the tokens of all layers in the last forward pass, f over the
        slots (MoE-PEFT sums over them instead, which is top_k times as much)."""
        experts = self.adapters[adapter].experts
        probabilities = torch.cat(self.rows.logits[adapter]).softmax(-1)
        chosen = probabilities.topk(experts.top_k).indices
        share = F.one_hot(chosen, experts.count).float().mean((0, 1))
        return experts.balance_loss * experts.count * (share * probabilities.mean(0)).sum()


class LoopLinear(nn.Module):
    """A linear layer with a plain LoRA of each adapter."""

    def __init__(self, base: nn.Module, name: str, owner: ExpertLoop) -> None:
        super().__init__()
        self.base = base
        self.rows = owner.rows
        self.adapters = [(adapter.parameters[name], adapter.scaling) for adapter in owner.adapters]

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, in] -> [B, L, out]."""
        y, parts = self.base(x), []
        if not self.rows.spans:
            return y
        for adapter, first, end in self.rows.spans:
            layer, scaling = self.adapters[adapter]
            parts.append(y[first:end] + scaling * low_rank(x[first:end], layer["A"], layer["B"]))
        return joined(parts)


class LoopBlock(nn.Module):
    """A feed-forward block with experts of each adapter."""

    def __init__(self, block: Any, name: str, owner: ExpertLoop, *, shared_inputs: bool) -> None:
        super().__init__()
        self.block, self.rows, self.shared_inputs = block, owner.rows, shared_inputs
        self.adapters = owner.adapters
        self.names = [f"{name}.{layer}" for layer in ("gate_proj", "up_proj", "down_proj")]
        self.routers = [adapter.parameters[name][ROUTER] for adapter in owner.adapters]

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]."""
        if not self.rows.spans:
            return self.block(x)
        return joined([self._mixed(adapter, x[first:end]) for adapter, first, end in self.rows.spans])

    def _mixed(self, adapter: int, x: Tensor) -> Tensor:
        """The rows x [B, L, d] of one adapter."""
        experts = self.adapters[adapter].experts
        tokens = x.reshape(-1, x.shape[-1])
        logits = F.linear(tokens.float(), self.routers[adapter])
        self.rows.logits.setdefault(adapter, []).append(logits)
        weights, chosen = logits.softmax(-1).topk(experts.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        mask = F.one_hot(chosen, experts.count).permute(2, 1, 0)
        common = None
        if self.shared_inputs:
            common = self.block.gate_proj(tokens), self.block.up_proj(tokens)
        outputs = []
        for expert in range(experts.count):
            _, position = torch.where(mask[expert])
            outputs.append(self._expert(adapter, expert, tokens, position, common))
        y = torch.zeros_like(tokens, dtype=torch.float32)
        for expert in range(experts.count):
            slot, position = torch.where(mask[expert])
            weighted = outputs[expert] * weights[position, slot, None]
            y = y.index_add(0, position, weighted)
        return y.to(x.dtype).view_as(x)

    def _expert(
        self,
        adapter: int,
        expert: int,
        tokens: Tensor,
        position: Tensor,
        common: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """The whole block of one expert, for its tokens. common: the base's W1 x and W3 x of all tokens."""
        owner, block = self.adapters[adapter], self.block
        x = tokens[position]
        if common is None:
            gate, up = block.gate_proj(x), block.up_proj(x)
        else:
            gate, up = common[0][position], common[1][position]
        deltas = []
        for name in self.names:
            layer = owner.parameters[name]
            deltas.append((layer["A"][expert], layer["B"][expert]))
        gate = gate + owner.scaling * low_rank(x, *deltas[0])
        up = up + owner.scaling * low_rank(x, *deltas[1])
        hidden = block.act_fn(gate) * up
        return block.down_proj(hidden) + owner.scaling * low_rank(hidden, *deltas[2])


def low_rank(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """x A^T B^T, in the type of x."""
    return F.linear(F.linear(x, A.to(x.dtype)), B.to(x.dtype))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
