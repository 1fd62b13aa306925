"""Who holds all adapters of a run? One bank on one frozen base model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.host_memory import copy_to_host
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.layer_usage import unusable_layers
from flora_train.adapters.paging import Pager, Paging
from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.routing import BatchRouting, RowNoise, build_routing
from flora_train.adapters.spec import BASE, BASE_ID, AdapterSpec
from flora_train.adapters.targets import check_base, linear_layers
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.models.speech_encoder import encoder_name


class AdapterBank:
    """All adapters of a run. Ids are positions in `specs`: adapters of one pool are neighbours.

    Use: `bank = AdapterBank.attach(model, specs)`, then for every batch `bank.route(ids)`, forward and backward.
    """

    def __init__(
        self,
        model: nn.Module,
        pools: Sequence[Pool],
        paging: Paging | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.pools = tuple(pools)
        self.specs: tuple[AdapterSpec, ...] = tuple(spec for pool in pools for spec in pool.specs)
        self.ids = {spec.name: i for i, spec in enumerate(self.specs)}
        self.location: list[tuple[Pool, int]] = [(pool, member) for pool in pools for member in range(len(pool.specs))]
        self.router = BatchRouting()
        self.device = check_base(model) if device is None else device
        self.pager: Pager | None = None
        slots = None if paging is None else paging.slots_for(self.pools, self.device, dtype)
        if paging is not None and slots is not None:
            self.pager = Pager(self.pools, self.location, slots, paging.folder, self.device, dtype)
        else:
            for pool in self.pools:
                pool.allocate(self.device, dtype)
        self.left_out: dict[str, str] = {}
        """Linear layers that adapters would have, but cannot be attached to -> why."""
        self._encoder = encoder_name(model)
        self._sharing = frozenset() if self._encoder is None else self._who_leaves_the_encoder(f"{self._encoder}.")

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        specs: Sequence[AdapterSpec],
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        paging: Paging | None = None,
        device: torch.device | None = None,
        features: Tensor | None = None,
    ) -> AdapterBank:
        """Freeze `model`, wrap its target layers in place and start every adapter as the identity.

        paging: who of them may be on the host (default: nobody); device: where they compute (default: where the model is);
        features: [1, ...] of a clip, for a speech model: the model is run on a few rows to see which of its layers can be adapted.
        Raises UserError when a target matches nothing (with what could match) or two adapters share a name.
        """
        counts = Counter(spec.name for spec in specs)
        for name, count in counts.items():
            if count > 1 or name == BASE:
                raise user_error("adapters", name, "two adapters cannot share a name (and __base__ is the base model)")
        device = check_base(model) if device is None else device
        model.requires_grad_(False)
        pools, left_out = build_pools(model, specs, unusable_layers(model, linear_layers(model), features))
        bank = cls(model, pools, paging, dtype, device)
        bank.left_out = left_out
        bank._wrap_layers()
        for pool, member in bank.location:
            pool.initialise(member, seed)
        return bank

    def route(self, adapters: Tensor | Sequence[int] | Sequence[str], noise: Sequence[RowNoise] | None = None) -> None:
        """Say which adapter each row of the coming batch uses: ids (-1: base) or names (`__base__`: base), [B].

        The routing stays until the next call. Raises UserError for an unknown name or id.
        """
        ids = (
            adapters.tolist() if isinstance(adapters, Tensor) else [self.id_of(a) if isinstance(a, str) else a for a in adapters]
        )
        for wrong in (i for i in ids if not BASE_ID <= i < len(self.specs)):
            raise user_error(
                "adapter_ids",
                wrong,
                f"ids run from 0 to {len(self.specs) - 1}, and {BASE_ID} is the base model",
            )
        if self.pager is not None:
            self.pager.load({i for i in ids if i != BASE_ID})
        self.router.set(build_routing(ids, self.location, self.device, noise))

    @contextmanager
    def routed(self, adapters: Tensor | Sequence[int] | Sequence[str]) -> Iterator[None]:
        """`route` for forward passes without a backward; afterwards the model is the plain base again."""
        self.route(adapters)
        try:
            yield
        finally:
            self.router.set(None)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The plain base, forward and backward: as if the embeddings were trained, so that gradients flow through every
        layer, as they do for adapters."""
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        self.router.set(None)
        # the copy is for models that change their embeddings in place, which no leaf allows
        handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_(True).clone())
        try:
            yield
        finally:
            handle.remove()

    def abandon(self) -> None:
        """Forget a forward whose backward will not run, and be the plain base again."""
        self.router.abandon()

    def id_of(self, name: str) -> int:
        if name == BASE:
            return BASE_ID
        if name not in self.ids:
            raise user_error("adapter", name, f"there are {choices(self.ids)}.{did_you_mean(name, self.ids)}")
        return self.ids[name]

    def shares_encoding(self, adapter: int) -> bool:
        """Whether this adapter (-1: the base) leaves an encoder-decoder's encoder as it is."""
        return adapter in self._sharing

    def _who_leaves_the_encoder(self, prefix: str) -> frozenset[int]:
        apart = {id(pool) for pool in self.pools if any(name.startswith(prefix) for name in pool.targets)}
        return frozenset({BASE_ID} | {i for i, (pool, _) in enumerate(self.location) if id(pool) not in apart})

    def parameters_of(self, name: str) -> dict[str, dict[str, Tensor]]:
        """Module -> parameter -> view of this adapter's values."""
        self._settle()
        pool, member = self.location[self.id_of(name)]
        return pool.row(member)

    def base_names(self) -> list[str]:
        """The names of all modules of the model as it was before `attach`."""
        names = (name.replace(".base_layer", "") for name, _ in self.model.named_modules())
        return list(dict.fromkeys(names))

    def row(self, adapter: int) -> Tensor:
        """All numbers of one adapter, [P]: a view, on the device or the host."""
        return self.state(adapter)["values"]

    def state(self, adapter: int) -> dict[str, Tensor]:
        """Plane (values, and what the optimizer adds) -> that of one adapter, [P]: views, valid until adapters are moved."""
        self._settle()
        pool, member = self.location[adapter]
        return pool.state(member)

    def add_plane(self, name: str) -> None:
        """One more number for every number of every adapter, 0 at first: what an optimizer remembers."""
        if self.pager is not None:
            self.pager.add_plane(name)
            return
        for pool in self.pools:
            pool.planes[name] = torch.zeros_like(pool.values)

    def tensors(self) -> dict[str, Tensor]:
        """`pool<i>.<plane>` -> [adapters of that pool, P], as they stand: the same with and without paging. Who writes to them calls
        `invalidate_device` afterwards."""
        if self.pager is not None:
            self.pager.flush_to_host()
        return {f"pool{i}.{name}": rows for i, pool in enumerate(self.pools) for name, rows in (pool.host or pool.planes).items()}

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """One of `tensors` as it stands, copied to where adapters that are not on the device live: host memory, or a file, for which
        UserError says where its disk is full."""
        return copy_to_host(tensor, None if self.pager is None else self.pager.folder)

    def invalidate_device(self) -> None:
        """The numbers on the host count, where there is paging."""
        if self.pager is not None:
            self.pager.invalidate()

    def blocks(self, adapters: Iterable[int]) -> list[frozenset[int]]:
        """These adapters (-1: the base), ascending, in parts that fit on the device at one time; without paging in one."""
        ids = sorted(set(adapters))
        if self.pager is None:
            return [frozenset(ids)]
        parts = [frozenset(part) for part in self.pager.blocks(i for i in ids if i != BASE_ID)]
        return [parts[0] | {BASE_ID}, *parts[1:]] if BASE_ID in ids else parts

    def digest(self, adapter: int) -> str:
        """SHA-256 of all numbers of one adapter; "" for the base."""
        return "" if adapter == BASE_ID else sha256(self.row(adapter).detach().cpu().numpy().tobytes()).hexdigest()

    def gradient_row(self, adapter: int) -> Tensor:
        """All gradients of one adapter, [P]: a view."""
        pool, member = self.location[adapter]
        return pool.gradients[pool.slot_of[member]]

    def by_pool(self, adapters: Iterable[int]) -> Iterator[tuple[Pool, list[int], Any]]:
        """These adapters pool by pool, to be changed: the pool, its adapter ids ascending, and an index of their rows on the device: a
        slice where it is every row (they are then updated in place instead of copied out and back), else LongTensor [K]."""
        members: dict[int, list[int]] = defaultdict(list)
        for adapter in sorted(adapters):
            members[id(self.location[adapter][0])].append(adapter)
        for pool in self.pools:
            if ids := members[id(pool)]:
                changing = [self.location[adapter][1] for adapter in ids]
                pool.changed.update(changing)
                slots = [pool.slot_of[member] for member in changing]
                every = slots == list(range(len(pool.values)))
                yield pool, ids, slice(None) if every else torch.tensor(slots, device=self.device)

    def _settle(self) -> None:
        if self.pager is not None:
            self.pager.settle(for_host=True)

    def _wrap_layers(self) -> None:
        for pool in self.pools:
            for name, target in pool.targets.items():
                layer = self.model.get_submodule(name)
                if not isinstance(layer, AdapterLinear):
                    layer = AdapterLinear(layer, target, self.router)
                    self.model.set_submodule(name, layer)
                layer.add_pool(pool)
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(self._after_embedding)
        layers = getattr(self.model.get_submodule(self._encoder), "layers", None) if self._encoder else None
        if layers is not None:  # an encoder of sounds has no embedding of tokens to begin with
            layers[0].register_forward_pre_hook(self._before_encoder_layers, with_kwargs=True)

    def _before_encoder_layers(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reentrant checkpointing gives gradients to nothing whose input asks for none."""
        if self.router.routing is not None and torch.is_grad_enabled() and _recomputes(self.model):
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            if not states.requires_grad:
                states.requires_grad_(True)

    def _after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.router.recomputes = _recomputes(self.model)
        if self.router.routing is not None and torch.is_grad_enabled() and self.router.recomputes:
            self.router.expect_backward(output)
            return output.clone()  # some models change their embeddings in place, which no leaf allows
        return output


def _recomputes(model: nn.Module) -> bool:
    # transformers 5.20 renamed the property; the old name warns.
    name = "is_activation_checkpointing" if hasattr(type(model), "is_activation_checkpointing") else "is_gradient_checkpointing"
    return model.training and getattr(model, name, False)
