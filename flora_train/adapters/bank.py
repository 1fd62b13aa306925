"""The bank of all adapters of a run, attached to one frozen base model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.expert_parameters import AdapterExperts, ExpertWeight
from flora_train.adapters.fused_experts import fused_experts, layout_of
from flora_train.adapters.host_memory import copy_to_host
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.layer_usage import unusable_layers
from flora_train.adapters.methods import Target
from flora_train.adapters.paging import Pager, Paging
from flora_train.adapters.pool import Pool, build_pools
from flora_train.adapters.routed.blocks import feedforward_blocks
from flora_train.adapters.routed.feedforward import ExpertBlock
from flora_train.adapters.routing import BatchRouting, RowDraw, RowGoal, RowNoise, build_routing
from flora_train.adapters.spec import BASE, BASE_ID, AdapterSpec
from flora_train.adapters.targets import check_base, linear_layers
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.models.loading import recomputes
from flora_train.models.speech_encoder import encoder_name


class AdapterBank:
    """All adapters of a run.

    An adapter's id is its position in `specs`; adapters of one pool have consecutive ids.

    Example: `bank = AdapterBank.attach(model, specs)`, then for every batch `bank.route(ids)`, forward and
    backward.
    """

    def __init__(
        self,
        model: nn.Module,
        pools: Sequence[Pool],
        *,
        paging: Paging | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        self.model = model
        self.pools = tuple(pools)
        self.specs: tuple[AdapterSpec, ...] = ()
        self.location: list[tuple[Pool, int]] = []
        """Adapter id -> its pool and its position there."""
        for pool in pools:
            self.specs += pool.specs
            self.location += [(pool, member) for member in range(len(pool.specs))]
        self.ids = {spec.name: i for i, spec in enumerate(self.specs)}
        self.router = BatchRouting()
        self.device = device or check_base(model)
        self.pager: Pager | None = None
        slots = None if paging is None else paging.slots_for(self.pools, self.device, dtype)
        if paging is not None and slots is not None:
            self.pager = Pager(
                self.pools, self.location, slots, folder=paging.folder, device=self.device, dtype=dtype
            )
        else:
            for pool in self.pools:
                pool.allocate(self.device, dtype)
        self.left_out: dict[str, str] = {}
        """Target layers that no adapter can be attached to -> the reason."""
        self._encoder = encoder_name(model)
        self._encoder_unchanged: frozenset[int] = frozenset()
        if self._encoder is not None:
            self._encoder_unchanged = self._adapters_outside(f"{self._encoder}.")

    @classmethod
    def attach(
        cls,
        model: nn.Module,
        specs: Sequence[AdapterSpec],
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        paging: Paging | None = None,
        device: torch.device | None = None,
        features: Tensor | None = None,
    ) -> AdapterBank:
        """Freeze `model`, wrap its target layers in place and initialise every adapter as the identity.

        Args:
            model: A transformers model, or any module with linear layers, on one device.
            specs: The adapters. Names must be unique.
            seed: Seed of the initial values.
            dtype: Type of the adapters' parameters.
            paging: Which adapters may be in host memory or on disk. Default: all adapters are on the device.
            device: Where the adapters compute. Default: the model's device.
            features: [1, ...], features of one clip. Required for a speech model whose configuration does not
                state their shape: the model is run on a few rows to find the layers that support adapters.

        Returns:
            The bank. Until `route` is called, the model computes what the base model computes.

        Raises:
            UserError: A target matches no layer, or two adapters have the same name.
        """
        counts = Counter(spec.name for spec in specs)
        for name, count in counts.items():
            if count > 1 or name == BASE:
                hint = "names of adapters must be unique (and __base__ is the base model)"
                raise user_error("adapters", name, hint)
        device = device or check_base(model)
        model.requires_grad_(False)
        layers = [*linear_layers(model)]
        if any(spec.target_parameters for spec in specs):
            layers += fused_experts(model)
        pools, left_out = build_pools(model, specs, unusable_layers(model, layers, features))
        bank = cls(model, pools, paging=paging, dtype=dtype, device=device)
        bank.left_out = left_out
        bank._wrap_layers()
        for pool, member in bank.location:
            pool.initialise(member, seed)
        bank._initialise_from_weights()
        return bank

    @torch.no_grad()
    def _initialise_from_weights(self) -> None:
        """Set the initial values that depend on the frozen weights, in pools whose method has some."""
        for pool in self.pools:
            if not pool.method.begins_with_weight:
                continue
            values: dict[str, dict[str, Tensor]] = {}
            for module in pool.targets:
                layer: Any = self.model.get_submodule(module)
                with layer.weight_context(torch.float32) as weight:
                    values[module] = pool.method.values_of_weight(weight)
            for member in range(len(pool.specs)):
                for module, views in pool.row(member).items():
                    for param, value in values[module].items():
                        views[param].copy_(value)

    def route(
        self,
        adapters: Tensor | Sequence[int] | Sequence[str],
        noise: Sequence[RowNoise | None] | None = None,
        draws: Sequence[RowDraw | None] | None = None,
        lengths: Sequence[int] | None = None,
        *,
        goals: Sequence[RowGoal | None] | None = None,
    ) -> None:
        """Set which adapter each row of the next batch uses. The routing stays until the next call.

        Args:
            adapters: [B], adapter ids (-1: the base model) or names (`__base__`: the base model).
            noise: Seeds of dropout and NEFTune noise, one per row; None for a row without. Default: neither
                in any row.
            draws: The draw of each row, for routed adapters. Default: the load of their experts is not
                balanced.
            lengths: Tokens of each row without padding, for routed adapters. Default: no row is padded.
            goals: The members that the gates of each row are to choose. Default: gates have no loss of their
                own.

        Raises:
            UserError: An adapter name or id is unknown.
        """
        ids = self._ids_of(adapters)
        for adapter in ids:
            if not BASE_ID <= adapter < len(self.specs):
                hint = f"ids run from 0 to {len(self.specs) - 1}, and {BASE_ID} is the base model"
                raise user_error("adapter_ids", adapter, hint)
        if self.pager is not None:
            self.pager.load({i for i in ids if i != BASE_ID})
        routing = build_routing(
            ids, self.location, self.device, noise=noise, draws=draws, lengths=lengths, goals=goals
        )
        self.router.set(routing)

    def _ids_of(self, adapters: Tensor | Sequence[int] | Sequence[str]) -> list[int]:
        if isinstance(adapters, Tensor):
            return adapters.tolist()
        return [self.id_of(adapter) if isinstance(adapter, str) else adapter for adapter in adapters]

    @contextmanager
    def routed(
        self, adapters: Tensor | Sequence[int] | Sequence[str], lengths: Sequence[int] | None = None
    ) -> Iterator[None]:
        """`route` for forward passes without a backward; afterwards the model is the plain base model again.

        Args:
            adapters: [B], as in `route`.
            lengths: As in `route`.

        Raises:
            UserError: An adapter name or id is unknown.
        """
        self.route(adapters, lengths=lengths)
        try:
            yield
        finally:
            self.router.set(None)

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """The plain base model for a forward and a backward.

        The embeddings require gradients, so that gradients flow through every layer as they do with adapters.
        """
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        self.router.set(None)
        # Cloned, because some models change their embeddings in place, which autograd forbids for a leaf.
        handle = embeddings.register_forward_hook(
            lambda module, args, output: output.requires_grad_(True).clone()
        )
        try:
            yield
        finally:
            handle.remove()

    def abandon(self) -> None:
        """Discard a forward whose backward will not run; the model is the plain base model again."""
        self.router.abandon()

    def id_of(self, name: str) -> int:
        """The id of an adapter (`__base__`: -1). Raises UserError for an unknown name."""
        if name == BASE:
            return BASE_ID
        if name not in self.ids:
            hint = f"there are {choices(self.ids)}.{did_you_mean(name, self.ids)}"
            raise user_error("adapter", name, hint)
        return self.ids[name]

    def shares_encoding(self, adapter: int) -> bool:
        """Whether this adapter (-1: the base model) does not change the encoder of an encoder-decoder
        model."""
        return adapter in self._encoder_unchanged

    def _adapters_outside(self, prefix: str) -> frozenset[int]:
        """The adapters (and -1) without a target whose name begins with `prefix`."""
        inside = {id(pool) for pool in self.pools if any(name.startswith(prefix) for name in pool.targets)}
        outside = {i for i, (pool, _) in enumerate(self.location) if id(pool) not in inside}
        return frozenset({BASE_ID} | outside)

    def parameters_of(self, name: str) -> dict[str, dict[str, Tensor]]:
        """The parameters of one adapter.

        Args:
            name: Name of the adapter.

        Returns:
            Module name -> parameter name -> view of the adapter's values, on the device or the host.

        Raises:
            UserError: The name is unknown.
        """
        self._settle()
        pool, member = self.location[self.id_of(name)]
        return pool.row(member)

    def head_of(self, name: str) -> dict[str, Tensor]:
        """The parameters of the head of one adapter.

        Args:
            name: Name of the adapter.

        Returns:
            Parameter name, as in a checkpoint of transformers -> view of the adapter's values; empty for an
            adapter without head.

        Raises:
            UserError: The name is unknown.
        """
        self._settle()
        pool, member = self.location[self.id_of(name)]
        return pool.head_row(member)

    def base_names(self) -> list[str]:
        """The names of all modules of the model as it was before `attach`."""
        modules = self.model.named_modules()
        names = (name for name, module in modules if not isinstance(module, ExpertWeight))
        return list(dict.fromkeys(name.replace(".base_layer", "") for name in names))

    def row(self, adapter: int) -> Tensor:
        """All parameters of one adapter as one vector.

        Args:
            adapter: Id of the adapter.

        Returns:
            [P], a view, on the device or the host.
        """
        return self.state(adapter)["values"]

    def state(self, adapter: int) -> dict[str, Tensor]:
        """Plane (values, and those that the optimizer adds) -> [P] of one adapter: views, valid until
        adapters move."""
        self._settle()
        pool, member = self.location[adapter]
        return pool.state(member)

    def add_plane(self, name: str, pools: Sequence[Pool] | None = None) -> None:
        """Add optimizer state: one number for every parameter of every adapter (of these pools), initially
        0."""
        if self.pager is not None:
            self.pager.add_plane(name, pools)
            return
        for pool in self.pools if pools is None else pools:
            pool.planes[name] = torch.zeros_like(pool.values)

    def tensors(self) -> dict[str, Tensor]:
        """`pool<i>.<plane>` -> [adapters of that pool, P], up to date, the same with and without paging.

        After writing to them, call `invalidate_device`.
        """
        if self.pager is not None:
            self.pager.flush_to_host()
        tensors: dict[str, Tensor] = {}
        for i, pool in enumerate(self.pools):
            planes = pool.host or pool.planes
            tensors |= {f"pool{i}.{name}": rows for name, rows in planes.items()}
        return tensors

    def copy_to_host(self, tensor: Tensor) -> Tensor:
        """A copy of one of `tensors` where adapters off the device are stored: in host memory or in a file.

        Raises UserError if the file's disk is full.
        """
        folder = None if self.pager is None else self.pager.folder
        return copy_to_host(tensor, folder)

    def invalidate_device(self) -> None:
        """Discard the device's copies: with paging, the values on the host are the current ones."""
        if self.pager is not None:
            self.pager.invalidate()

    def blocks(self, adapters: Iterable[int]) -> list[frozenset[int]]:
        """These adapters (-1: the base model), ascending, in groups that fit on the device; without paging,
        one group."""
        ids = sorted(set(adapters))
        if self.pager is None:
            return [frozenset(ids)]
        groups = [frozenset(group) for group in self.pager.blocks(i for i in ids if i != BASE_ID)]
        if BASE_ID in ids:
            groups[0] |= {BASE_ID}
        return groups

    def digest(self, adapter: int) -> str:
        """A hash of all parameters of one adapter.

        Args:
            adapter: Id of the adapter.

        Returns:
            The SHA-256 as hexadecimal digits; "" for the base model (-1).
        """
        if adapter == BASE_ID:
            return ""
        return sha256(self.row(adapter).detach().cpu().numpy().tobytes()).hexdigest()

    def gradient_row(self, adapter: int) -> Tensor:
        """All gradients of one adapter, [P]: a view."""
        pool, member = self.location[adapter]
        return pool.gradients[pool.slot_of[member]]

    def by_pool(self, adapters: Iterable[int]) -> Iterator[tuple[Pool, list[int], Any]]:
        """These adapters grouped by pool, for updates: the pool, its adapter ids ascending, and an index of
        their rows.

        The index is a slice where it selects all rows on the device, so that they are updated in place, else
        LongTensor [K].
        """
        members: dict[int, list[int]] = defaultdict(list)
        for adapter in sorted(adapters):
            members[id(self.location[adapter][0])].append(adapter)
        for pool in self.pools:
            ids = members[id(pool)]
            if not ids:
                continue
            changing = [self.location[adapter][1] for adapter in ids]
            pool.changed.update(changing)
            slots = [pool.slot_of[member] for member in changing]
            if slots == list(range(len(pool.values))):
                yield pool, ids, slice(None)
            else:
                yield pool, ids, torch.tensor(slots, device=self.device)

    def _settle(self) -> None:
        if self.pager is not None:
            self.pager.settle(for_host=True)

    def _wrap_layers(self) -> None:
        available = linear_layers(self.model)
        for pool in self.pools:
            for name, target in pool.targets.items():
                if target.experts:
                    self._wrap_experts(pool, target)
                    continue
                layer = self._wrap(name, target)
                if target.block is None:  # else its block computes it
                    layer.add_pool(pool)
        self._wrap_blocks(available)
        embeddings: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        embeddings.register_forward_hook(self._after_embedding)
        if self._encoder is None:
            return
        # A speech encoder begins without a token embedding.
        layers = getattr(self.model.get_submodule(self._encoder), "layers", None)
        if layers is not None:
            layers[0].register_forward_pre_hook(self._before_encoder_layers, with_kwargs=True)

    def _wrap(self, name: str, target: Target) -> AdapterLinear:
        """The wrapper of a linear layer, made once."""
        layer = self.model.get_submodule(name)
        if not isinstance(layer, AdapterLinear):
            layer = AdapterLinear(layer, target, self.router)
            self.model.set_submodule(name, layer)
        return layer

    def _wrap_blocks(self, available: Mapping[str, Target]) -> None:
        """Let the feed-forward blocks that have experts compute the rows of their adapters. available: all
        linear layers."""
        pools_of: dict[str, dict[int, Pool]] = defaultdict(dict)
        for pool in self.pools:
            for target in pool.targets.values():
                if target.block is not None:
                    pools_of[target.block][id(pool)] = pool
        if not pools_of:
            return
        for name, block in feedforward_blocks(self.model, available).items():
            if name in pools_of:
                layers = [self._wrap(layer, available[layer]) for layer in block.layers]
                experts = ExpertBlock(self.model.get_submodule(name), block, layers, self.router)
                for pool in pools_of[name].values():
                    experts.add_pool(pool)

    def _wrap_experts(self, pool: Pool, target: Target) -> None:
        module = target.name.rpartition(".")[0]
        experts = self.model.get_submodule(module)
        if not isinstance(experts, AdapterExperts):
            layout = layout_of(experts)
            assert layout is not None, "find_targets selects recognised experts alone"
            experts = AdapterExperts(experts, layout, self.router, module)
            experts.check(f"adapters.{pool.specs[0].family}.target_parameters")
            self.model.set_submodule(module, experts)
        experts.add_pool(pool, target)

    def _before_encoder_layers(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Reentrant checkpointing computes no gradients unless an input requires grad."""
        if self.router.routing is not None and torch.is_grad_enabled() and recomputes(self.model):
            states: Tensor = args[0] if args else kwargs["hidden_states"]
            if not states.requires_grad:
                states.requires_grad_(True)

    def _after_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.router.recomputes = recomputes(self.model)
        routing = self.router.routing
        if routing is None:
            return output
        if torch.is_grad_enabled() and self.router.recomputes:
            self.router.expect_backward(output)
            # Cloned, because some models change their embeddings in place, which autograd forbids for a leaf.
            output = output.clone()
        return routing.perturb(output) if routing.embedding_noise else output
