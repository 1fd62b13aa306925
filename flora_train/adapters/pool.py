"""Storage of adapters as rows: one adapter is one row of a [slots, P] tensor.

Adapters of the same method, ranks and targets share a pool. A layer's parameters are views of the pool's
tensor, so that clipping, the optimizer, checkpoints and communication handle an adapter as one vector instead
of layer by layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.heads import Head, head_of, shapes_of
from flora_train.adapters.methods import METHODS, AdapterMethod, Target
from flora_train.adapters.seeds import seeded_generator
from flora_train.adapters.spec import AdapterSpec, Gate
from flora_train.adapters.targets import check_patterns, find_targets

PLANES = 4
"""Values, gradients, and AdamW's two moments."""


class GatherRows(torch.autograd.Function):
    """The rows of the adapters in this batch. The backward adds to the pool's gradients; other rows are not
    touched."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, gradient: Tensor | None, slots: Tensor) -> Tensor:
        ctx.gradient, ctx.slots = gradient, slots
        return stack.index_select(0, slots)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[None, None, None]:
        ctx.gradient.index_add_(0, ctx.slots, drows.to(ctx.gradient.dtype))
        return None, None, None


class Pool:
    """All adapters with the same `pool_key`. P: the number of parameters of one adapter."""

    planes: dict[str, Tensor]
    """Plane -> [slots, P] on the device: "values", and the planes that the optimizer adds."""
    gradients: Tensor
    """[slots, P]."""

    def __init__(
        self,
        method: str,
        specs: Sequence[AdapterSpec],
        targets: Mapping[str, Target],
        head: Head | None = None,
    ) -> None:
        self.method: AdapterMethod = METHODS[method]
        self.specs = tuple(specs)
        """A member is a position in this tuple."""
        self.targets = dict(targets)
        self.head = head
        """Makes the outputs of the adapters of label tasks; None for all other tasks."""
        self.slot_of: dict[int, int] = {}
        """Member -> its row on the device. The same number, unless a pager decides which members are on the
        device."""
        self.changed: set[int] = set()
        """Members on the device whose values may differ from those on the host."""
        self.host: dict[str, Tensor] = {}
        """With a pager: plane -> [members, P] on the host."""
        self.layout: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        """Module -> parameter -> its offset in the row, and its shape."""
        self.head_layout: dict[str, tuple[int, tuple[int, ...]]] = {}
        """Parameter of the head -> its offset in the row, and its shape."""
        self.frozen = self.method.frozen_parameters(specs[0])
        """Parameters of the layers that are not trained: they get no gradient, and no update."""
        self._rate_columns: Tensor | None = None
        self._constants: dict[str, dict[str, Tensor]] = {}
        """Module -> what the method's `constants` are there, on the device."""
        self.row_size = 0
        for name, target in targets.items():
            self.layout[name] = {}
            for param, shape in self.method.shapes_at(specs[0].at(name), target).items():
                self.layout[name][param] = (self.row_size, shape)
                self.row_size += prod(shape)
        for name, shapes in self.method.router_shapes(specs[0], targets).items():
            layout = self.layout.setdefault(name, {})
            for param, shape in shapes.items():
                layout[param] = (self.row_size, shape)
                self.row_size += prod(shape)
        self.head_start = self.row_size
        """The offset of the head in the row: its parameters are the last ones."""
        for param, shape in shapes_of(head).items():
            self.head_layout[param] = (self.row_size, shape)
            self.row_size += prod(shape)

    @property
    def has_averages(self) -> bool:
        """Whether an adapter of this pool has an average of its weights (ema_decay)."""
        return any(spec.ema_decay is not None for spec in self.specs)

    @property
    def plane_count(self) -> int:
        """Numbers that are stored for a parameter, its gradient among them."""
        return PLANES + self.has_averages

    def rate_columns(self, device: torch.device) -> Tensor:
        """uint8 [P]: which learning rate a number has. 0: lr; 1: second_lr_ratio x lr; 2: head_lr."""
        if self._rate_columns is None or self._rate_columns.device != device:
            columns = torch.zeros(self.row_size, dtype=torch.uint8)
            for layout in self.layout.values():
                for param in (self.frozen or self.method.lr_ratio_parameters) & layout.keys():
                    start, shape = layout[param]
                    columns[start : start + prod(shape)] = 1
            columns[self.head_start :] = 2
            self._rate_columns = columns.to(device)
        return self._rate_columns

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank of an adapter's layers; 0 for a method without rank."""
        ranks = {self.specs[0].at(module).rank for module in self.targets} or {0}
        return min(ranks), max(ranks)

    def allocate(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Allocate rows for all members on the device. Values are NaN until `initialise` or a checkpoint sets
        them."""
        shape = len(self.specs), self.row_size
        self.slot_of = {member: member for member in range(len(self.specs))}
        values = torch.full(shape, float("nan"), dtype=dtype, device=device)
        self.use_storage({"values": values}, torch.zeros(shape, dtype=dtype, device=device))

    def use_storage(self, planes: Mapping[str, Tensor], gradients: Tensor) -> None:
        """Use this memory of the device, [slots, P] each."""
        self.planes, self.gradients = dict(planes), gradients
        # Leaves that require grad, so that autograd calls GatherRows.backward; they share the pool's memory.
        self._leaves = {name: self._views(self.values, name, leaf=True) for name in self.layout}
        self._leaf_gradients = {name: self._views(self.gradients, name) for name in self.layout}
        self._head_leaves = self._head_views(self.values, leaf=True)
        self._head_gradients = self._head_views(self.gradients)

    @property
    def values(self) -> Tensor:
        """[slots, P]: the parameters on the device."""
        return self.planes["values"]

    def state(self, member: int) -> dict[str, Tensor]:
        """Plane -> [P], a view of one adapter's row, on the device or the host."""
        slot = self.slot_of.get(member)
        if slot is None:
            return {name: rows[member] for name, rows in self.host.items()}
        self.changed.add(member)  # the caller may write to the view
        return {name: rows[slot] for name, rows in self.planes.items()}

    def initialise(self, member: int, seed: int) -> None:
        """Set the initial values of one adapter, which depend only on its seed (or else the given one), its
        name and the layer."""
        spec, views = self.specs[member], self.row(member)
        seed = spec.seed_in(seed)
        for name, layout in self.layout.items():
            params = {p: torch.empty(shape, dtype=views[name][p].dtype) for p, (_, shape) in layout.items()}
            generator = seeded_generator(seed, spec.seed_name, name)
            for part in self._layers_of(name, params):
                self.method.initialise(part, spec.at(name), generator)
            for param, view in views[name].items():
                view.copy_(params[param])
        if self.head is not None:
            values = self.head.initial(seed, spec.seed_name)
            for param, view in self.head_row(member).items():
                view.copy_(values[param])

    def _layers_of(self, name: str, params: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The parameters on a target as those of linear layers: one, or each of its experts."""
        experts = self.targets[name].experts if name in self.targets else 0  # else a router's
        if not experts:
            return [params]
        return [{param: tensor[e] for param, tensor in params.items()} for e in range(experts)]

    def row(self, member: int) -> dict[str, dict[str, Tensor]]:
        """Module -> parameter -> view of one adapter's values, on the device or the host."""
        values = self.state(member)["values"]
        views: dict[str, dict[str, Tensor]] = {}
        for name, layout in self.layout.items():
            views[name] = {
                p: values[start : start + prod(shape)].view(shape) for p, (start, shape) in layout.items()
            }
        return views

    def head_row(self, member: int) -> dict[str, Tensor]:
        """Parameter of the head -> view of one adapter's values, on the device or the host."""
        values = self.state(member)["values"]
        return {
            p: values[start : start + prod(shape)].view(shape)
            for p, (start, shape) in self.head_layout.items()
        }

    def gather_head(self, slots: Tensor) -> dict[str, Tensor]:
        """Parameter of the head -> [K, ...] for the adapters in `slots` [K], differentiable into
        `gradients`."""
        gradients = self._head_gradients
        return {p: GatherRows.apply(leaf, gradients[p], slots) for p, leaf in self._head_leaves.items()}

    def gather(self, module: str, slots: Tensor) -> dict[str, Tensor]:
        """Parameter -> [K, ...] for the adapters in `slots` [K], differentiable into `gradients` unless the
        parameter is frozen."""
        gradients = self._leaf_gradients[module]
        params: dict[str, Tensor] = {}
        for p, leaf in self._leaves[module].items():
            if p not in self.frozen:
                params[p] = GatherRows.apply(leaf, gradients[p], slots)
            elif len(leaf) == len(slots) == 1:
                params[p] = leaf.detach()  # not copied
            else:
                params[p] = leaf.detach().index_select(0, slots)
        return params | self._shared(module, len(slots))

    def views(self, module: str, slots: slice) -> dict[str, Tensor]:
        """Parameter -> [K, ...] for the adapters in consecutive rows, without a copy and without
        gradients."""
        params = {p: leaf.detach()[slots] for p, leaf in self._leaves[module].items()}
        return params | self._shared(module, slots.stop - slots.start)

    def gather_one(self, module: str, param: str, slots: Tensor) -> Tensor:
        """One of the parameters of `gather`."""
        leaf, gradient = self._leaves[module][param], self._leaf_gradients[module][param]
        return GatherRows.apply(leaf, gradient, slots)

    def _shared(self, module: str, adapters: int) -> dict[str, Tensor]:
        """The constants of a layer, the same in the row of each adapter."""
        constants = self.constants(module)
        return {name: tensor.expand(adapters, *tensor.shape) for name, tensor in constants.items()}

    def constants(self, module: str) -> dict[str, Tensor]:
        """Name -> tensor that all adapters share on this layer, on the device. They are made once."""
        if module not in self._constants:
            made: dict[str, Tensor] = {}
            if module in self.targets:  # else a router's
                made = self.method.constants(self.specs[0].at(module), self.targets[module])
            self._constants[module] = {name: tensor.to(self.values.device) for name, tensor in made.items()}
        return self._constants[module]

    def _views(self, storage: Tensor, module: str, leaf: bool = False) -> dict[str, Tensor]:
        return self._views_of(storage, self.layout[module], leaf)

    def _head_views(self, storage: Tensor, leaf: bool = False) -> dict[str, Tensor]:
        return self._views_of(storage, self.head_layout, leaf)

    def _views_of(
        self, storage: Tensor, layout: Mapping[str, tuple[int, tuple[int, ...]]], leaf: bool
    ) -> dict[str, Tensor]:
        views = {}
        for param, (start, shape) in layout.items():
            strides = (self.row_size, *torch.empty(shape, device="meta").stride())
            view = storage.as_strided((storage.shape[0], *shape), strides, storage.storage_offset() + start)
            views[param] = view.detach().requires_grad_() if leaf else view
        return views


def numbers_of(pools: Iterable[Pool], gradients: bool = True) -> int:
    """Numbers that are stored for all adapters of these pools."""
    omitted = 0 if gradients else 1
    return sum(len(pool.specs) * pool.row_size * (pool.plane_count - omitted) for pool in pools)


def pool_key(spec: AdapterSpec) -> tuple[object, ...]:
    """Adapters with the same key share a pool: all their tensors have the same shapes."""
    ranks = spec.rank, spec.rank_pattern
    layers = spec.exclude_modules, spec.layers_to_transform, spec.layers_pattern, spec.parent_module
    targets = spec.target_modules, spec.target_parameters, spec.feedforward_modules
    routes = spec.experts, _gate_key(spec.gate)
    return spec.method, ranks, *targets, *layers, spec.head, *routes, spec.mask


def _gate_key(gate: Gate | None) -> Gate | None:
    """A gate without what may differ between adapters of one pool."""
    if gate is None:
        return None
    members = tuple(replace(member, family="") for member in gate.members)
    return replace(gate, members=members, loss=0.0)  # each row has the coefficient of its own gate


def build_pools(
    model: nn.Module, specs: Iterable[AdapterSpec], unusable: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[Pool], dict[str, str]]:
    """The pools of these adapters, without memory, and the target layers that no adapter is attached to ->
    the reason.

    unusable: layers that no adapter can be attached to -> the reason. Raises UserError when a target matches
    no layer.
    """
    groups: dict[tuple[object, ...], list[AdapterSpec]] = defaultdict(list)
    for spec in specs:
        groups[pool_key(spec)].append(spec)
    pools: list[Pool] = []
    left_out: dict[str, str] = {}
    for members in groups.values():
        targets = find_targets(model, members[0], unusable)
        shape = members[0].head
        head = None if shape is None else head_of(model, shape)
        for spec in members:
            check_patterns(spec, targets)
        pools.append(Pool(members[0].method, members, targets, head))
        selected = find_targets(model, members[0])
        left_out |= {name: reason for name, reason in unusable.items() if name in selected}
    return pools, left_out
