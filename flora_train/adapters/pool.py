"""How are many adapters stored? As rows: one adapter is one row of one [slots, numbers] tensor.

Adapters of the same method, rank and targets share a pool. A layer's stack is a view of the pool, so that clipping,
the optimizer, checkpoints and the exchange between processes handle an adapter as one vector, not layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from flora_train.adapters.methods import METHODS, AdapterMethod, Target
from flora_train.adapters.spec import AdapterSpec


class GatherRows(torch.autograd.Function):
    """The rows of the adapters in this batch; their gradients are added to the pool's, absent rows are not touched."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, gradient: Tensor | None, slots: Tensor) -> Tensor:
        ctx.gradient, ctx.slots = gradient, slots
        return stack.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[None, None, None]:
        ctx.gradient.index_add_(0, ctx.slots, drows.to(ctx.gradient.dtype))
        return None, None, None


def pool_key(spec: AdapterSpec) -> tuple[str, int, object, object, object]:
    """Adapters with the same key share a pool."""
    return spec.method, spec.rank, spec.target_modules, spec.feedforward_modules, spec.within


class Pool:
    """values, gradients: [slots, P] float32, P the numbers of one adapter; `specs[slot]` says whose row it is."""

    def __init__(self, method: str, specs: Sequence[AdapterSpec], targets: Mapping[str, Target]) -> None:
        self.method: AdapterMethod = METHODS[method]
        self.specs = tuple(specs)
        self.targets = dict(targets)
        self.layout: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self.row_size = 0
        for name, target in targets.items():
            self.layout[name] = {}
            for param, shape in self.method.shapes(specs[0], target).items():
                self.layout[name][param] = (self.row_size, shape)
                self.row_size += prod(shape)

    def allocate(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Values and gradients for every slot. Rows start undefined: `initialise` or `load` fills them."""
        self.values = torch.full((len(self.specs), self.row_size), float("nan"), dtype=dtype, device=device)
        self.gradients = torch.zeros_like(self.values)
        # Leaves that ask for gradients, so that autograd calls GatherRows.backward; they share the pool's memory.
        self._leaves = {name: self._views(self.values, name, leaf=True) for name in self.layout}
        self._leaf_gradients = {name: self._views(self.gradients, name) for name in self.layout}

    def initialise(self, slot: int, seed: int) -> None:
        """Give one adapter its start, a function of (seed, adapter name, layer) alone."""
        spec = self.specs[slot]
        for name in self.layout:
            params = {p: torch.empty(shape, dtype=self.values.dtype) for p, (_, shape) in self.layout[name].items()}
            self.method.initialise(params, spec, seeded_generator(seed, spec.name, name))
            for param, view in self.row(slot)[name].items():
                view.copy_(params[param])

    def row(self, slot: int) -> dict[str, dict[str, Tensor]]:
        """Module -> parameter -> view of one adapter's values."""
        return {
            name: {p: self.values[slot, start : start + prod(shape)].view(shape) for p, (start, shape) in layout.items()}
            for name, layout in self.layout.items()
        }

    def gather(self, module: str, slots: Tensor) -> dict[str, Tensor]:
        """Parameter -> [K, ...] for the adapters in `slots` [K], differentiable into `gradients`."""
        gradients = self._leaf_gradients[module]
        return {p: GatherRows.apply(leaf, gradients[p], slots) for p, leaf in self._leaves[module].items()}

    def _views(self, storage: Tensor, module: str, leaf: bool = False) -> dict[str, Tensor]:
        views = {}
        for param, (start, shape) in self.layout[module].items():
            strides = (self.row_size, *torch.empty(shape, device="meta").stride())
            view = storage.as_strided((storage.shape[0], *shape), strides, start)
            views[param] = view.detach().requires_grad_() if leaf else view
        return views


def seeded_generator(seed: int, *words: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only, not on what ran before."""
    from hashlib import sha256

    digest = sha256("\x1f".join(map(str, (seed, *words))).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
