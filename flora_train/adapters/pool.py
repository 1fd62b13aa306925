"""How are many adapters stored? As rows: one adapter is one row of a [slots, numbers] tensor.

Adapters of the same method, rank and targets share a pool. A layer's stack is a view of the pool, so that clipping,
the optimizer, checkpoints and the exchange between processes handle an adapter as one vector, not layer by layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.methods import METHODS, AdapterMethod, Target
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import find_targets


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
    return spec.method, spec.rank, spec.target_modules, spec.feedforward_modules, spec.parent_module


class Pool:
    """All adapters of one kind; `specs[member]` says whose numbers are whose. P: the numbers of one adapter.

    planes: name -> [slots, P] on the device: "values", and what an optimizer adds; gradients: [slots, P].
    slot_of: member -> its row there. It is the member itself, unless a pager decides who is on the device; then
    home: name -> [members, P] on the host has those that are not.
    """

    def __init__(self, method: str, specs: Sequence[AdapterSpec], targets: Mapping[str, Target]) -> None:
        self.method: AdapterMethod = METHODS[method]
        self.specs = tuple(specs)
        self.targets = dict(targets)
        self.slot_of: dict[int, int] = {}
        self.changed: set[int] = set()
        """Members on the device whose numbers may differ from those at home."""
        self.host: dict[str, Tensor] = {}
        self.layout: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self.row_size = 0
        for name, target in targets.items():
            self.layout[name] = {}
            for param, shape in self.method.shapes(specs[0], target).items():
                self.layout[name][param] = (self.row_size, shape)
                self.row_size += prod(shape)

    def allocate(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Room for every adapter on the device. Rows start undefined: `initialise` or `load` fills them."""
        shape = len(self.specs), self.row_size
        self.slot_of = {member: member for member in range(len(self.specs))}
        self.place(
            {"values": torch.full(shape, float("nan"), dtype=dtype, device=device)},
            torch.zeros(shape, dtype=dtype, device=device),
        )

    def place(self, planes: Mapping[str, Tensor], gradients: Tensor) -> None:
        """Live in this memory of the device, [slots, P] each."""
        self.planes, self.gradients = dict(planes), gradients
        # Leaves that ask for gradients, so that autograd calls GatherRows.backward; they share the pool's memory.
        self._leaves = {name: self._views(self.values, name, leaf=True) for name in self.layout}
        self._leaf_gradients = {name: self._views(self.gradients, name) for name in self.layout}

    @property
    def values(self) -> Tensor:
        """[slots, P]: the adapters' numbers on the device."""
        return self.planes["values"]

    def state(self, member: int) -> dict[str, Tensor]:
        """Plane -> [P], a view of one adapter's part of it, on the device or at home."""
        slot = self.slot_of.get(member)
        if slot is None:
            return {name: rows[member] for name, rows in self.host.items()}
        self.changed.add(member)  # who asks may write
        return {name: rows[slot] for name, rows in self.planes.items()}

    def initialise(self, member: int, seed: int) -> None:
        """Give one adapter its start, a function of (seed, adapter name, layer) alone."""
        spec, views = self.specs[member], self.row(member)
        for name in self.layout:
            params = {p: torch.empty(shape, dtype=views[name][p].dtype) for p, (_, shape) in self.layout[name].items()}
            self.method.initialise(params, spec, seeded_generator(seed, spec.name, name))
            for param, view in views[name].items():
                view.copy_(params[param])

    def row(self, member: int) -> dict[str, dict[str, Tensor]]:
        """Module -> parameter -> view of one adapter's values, on the device or at home."""
        values = self.state(member)["values"]
        return {
            name: {p: values[start : start + prod(shape)].view(shape) for p, (start, shape) in layout.items()}
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
            view = storage.as_strided((storage.shape[0], *shape), strides, storage.storage_offset() + start)
            views[param] = view.detach().requires_grad_() if leaf else view
        return views


def build_pools(
    model: nn.Module, specs: Iterable[AdapterSpec], unusable: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Pool], dict[str, str]]:
    """The pools of these adapters, without memory, and the target layers that no adapter is attached to -> the reason.

    unusable: layers that no adapter can be attached to -> the reason. Raises UserError when a target matches nothing.
    """
    groups: dict[tuple[object, ...], list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        groups[pool_key(spec)].append(spec)
    pools: list[Pool] = []
    left_out: dict[str, str] = {}
    for members in groups.values():
        pools.append(Pool(members[0].method, members, find_targets(model, members[0], unusable)))
        selected = find_targets(model, members[0])
        left_out |= {name: reason for name, reason in unusable.items() if name in selected}
    return pools, left_out


def seeded_generator(seed: int, *words: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on its arguments only, not on what ran before."""
    from hashlib import sha256

    digest = sha256("\x1f".join(map(str, (seed, *words))).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
