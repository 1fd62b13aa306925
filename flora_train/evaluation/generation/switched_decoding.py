"""Decodes one row of a switch adapter: unmerged, or with the routes of its tokens merged into weights.

Merged weights are kept for later tokens of the same route.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.merged import EXACT_DTYPES, dense_modules
from flora_train.adapters.routed.one_row import OneRow, Route
from flora_train.adapters.routed.route_merge import Layers, RouteMerger
from flora_train.adapters.routing import MergedLayer
from flora_train.evaluation.generation.route_costs import RouteCosts, measure_route

SwitchPath = Literal["auto", "batched", "merged"]
"""How one row of a switch adapter is decoded.

batched: unmerged, as rows in a batch are. merged: the experts of each token are merged into the weights, in
16 bits, too, which rounds otherwise than the experts do. auto: merged where that was measured to be faster
and the weights are of 32 bits.
"""
ANY_DTYPE = (*EXACT_DTYPES, torch.bfloat16, torch.float16)


class RouteCache:
    """The merged routes of one switch adapter.

    A route is merged once its tokens have lost as much time unmerged as merging takes: whatever comes later,
    both together are at most twice the least time. Where memory is short, the route that was not used for
    longest makes room.
    """

    def __init__(
        self, bank: AdapterBank, adapter: int, path: SwitchPath, free_bytes: Callable[[], int]
    ) -> None:
        pool, member = bank.location[adapter]
        self.bank, self.path = bank, path
        self.row = OneRow(pool, member, bank.router, self)
        self.costs: RouteCosts | None = None
        self.merges = 0
        """Routes that were merged so far."""
        dtypes = ANY_DTYPE if path == "merged" else EXACT_DTYPES
        self._modules = dense_modules(bank, adapter, dtypes)
        self._merger: RouteMerger | None = None
        self._free_bytes = free_bytes
        self._cached: OrderedDict[tuple[int, ...], Layers] = OrderedDict()
        self._spare: Layers | None = None
        """Merged layers of no route that is used, whose memory can be used again."""
        self._room: int | None = None
        self._uses: Counter[tuple[int, ...]] = Counter()

    def layers_for(self, route: Route) -> Mapping[str, MergedLayer]:
        """The merged layers for the next token; none where it is cheaper unmerged."""
        if self.path == "batched" or not self._modules:
            return {}
        if not route.is_shared:
            return self._merged_anew(route)
        key = route.experts
        if key in self._cached:
            self._cached.move_to_end(key)
            return self._cached[key]
        if self.path == "auto" and not self._is_worthwhile(key):
            return {}
        self._cached[key] = self._merge(route, self._memory())
        return self._cached[key]

    def release(self) -> None:
        """Free the merged weights; the measured costs stay."""
        self._cached.clear()
        self._uses.clear()
        self._spare, self._room, self._merger = None, None, None
        self.row.release()

    def _merged_anew(self, route: Route) -> Mapping[str, MergedLayer]:
        """The layers of one token alone, whose weights no other token has."""
        if self.path == "auto":
            costs = self._measured()
            if costs is None or costs.merge_seconds >= costs.saved_seconds:
                return {}
        self._spare = self._merge(route, self._spare)
        return self._spare

    def _is_worthwhile(self, key: tuple[int, ...]) -> bool:
        costs = self._measured()
        if costs is None or costs.saved_seconds <= 0:
            return False
        self._uses[key] += 1
        return self._uses[key] * costs.saved_seconds >= costs.merge_seconds

    def _measured(self) -> RouteCosts | None:
        """The costs, measured once; None without room for a merged route."""
        if self.room < 1:
            return None
        if self.costs is None:
            self.costs, layers = measure_route(self.bank, self.row, self._merger_of_layers())
            self._spare = layers or None
        return self.costs

    @property
    def room(self) -> int:
        """Merged routes that fit into the free memory."""
        if self._room is None:
            self._room = self._free_bytes() // max(1, self._merger_of_layers().bytes)
        return self._room

    def _memory(self) -> Layers | None:
        """The layers whose memory the next route gets: spare ones, or where there is no room, those of the
        route that was not used for longest; None: new ones."""
        if self._spare is not None:
            spare, self._spare = self._spare, None
            return spare
        if not self._cached or len(self._cached) < self.room:
            return None
        key, layers = self._cached.popitem(last=False)
        self._uses[key] = 0
        return layers

    def _merge(self, route: Route, memory: Layers | None) -> Layers:
        self.merges += 1
        return self._merger_of_layers().merge(route, memory)

    def _merger_of_layers(self) -> RouteMerger:
        if self._merger is None:
            self._merger = RouteMerger(self.bank, self.row, self._modules)
        return self._merger


class SwitchedDecoding:
    """The rows of a bank's switch adapters that are decoded alone."""

    def __init__(self, bank: AdapterBank, path: SwitchPath, free_bytes: Callable[[], int]) -> None:
        self.bank, self.path, self._free_bytes = bank, path, free_bytes
        self.caches: dict[int, RouteCache] = {}
        """Adapter -> its merged routes."""

    def applies_to(self, adapters: Sequence[int]) -> bool:
        """Whether these rows are one row of a switch adapter."""
        return len(adapters) == 1 and adapters[0] >= 0 and self._decides_once(adapters[0])

    @contextmanager
    def routed(self, adapter: int) -> Iterator[None]:
        """`bank.routed` for one row of a switch adapter. Forwards of several tokens are not merged."""
        if adapter not in self.caches:
            self.caches[adapter] = RouteCache(self.bank, adapter, self.path, self._free_bytes)
        cache = self.caches[adapter]
        with self.bank.routed([adapter]):
            cache.row.refresh()
            routing = self.bank.router.routing
            assert routing is not None
            routing.token_step = cache.row
            yield

    def release(self) -> None:
        """Free all merged weights."""
        for cache in self.caches.values():
            cache.release()

    def _decides_once(self, adapter: int) -> bool:
        return self.bank.location[adapter][0].method.decides_once
