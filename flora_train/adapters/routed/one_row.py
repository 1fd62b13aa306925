"""Steps of one token of a switch adapter: the only row of a batch while it is decoded.

The token's experts are a plain adapter, which needs no grouping of tokens: each layer adds it to the frozen
layer's output, or uses weights into which it is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.methods import Params, Site
from flora_train.adapters.methods.routed import ROUTER, expert_method
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.choice import choose, router_logits
from flora_train.adapters.routed.decision import with_routes
from flora_train.adapters.routed.switch import joined_experts
from flora_train.adapters.routing import BatchRouting, MergedLayer
from flora_train.kernels.autocast import linear_dtype
from flora_train.kernels.segments import Segments

ONE = Segments((0, 1))


@dataclass(frozen=True)
class Route:
    """What the router decided about one token."""

    experts: tuple[int, ...]
    weights: Tensor
    """float32 [k]."""

    @property
    def is_shared(self) -> bool:
        """Whether all tokens of these experts have the same weights, and so the same merged layers: one
        expert has weight 1."""
        return len(self.experts) == 1


class RoutePath(Protocol):
    """Chooses how the layers of a token are computed."""

    def layers_for(self, route: Route) -> Mapping[str, MergedLayer]:
        """Module name -> its layer with these experts merged, for the next token. The other layers add the
        experts to the frozen layer's output."""
        ...


class OneRow:
    """The layers of one switch adapter in steps of one token."""

    def __init__(self, pool: Pool, member: int, router: BatchRouting, path: RoutePath) -> None:
        self.pool, self.member, self.path, self._router = pool, member, path, router
        self.spec = pool.specs[member]
        assert self.spec.experts is not None
        self.experts = self.spec.experts
        self._merged: Mapping[str, MergedLayer] = {}
        self._route: Route | None = None
        self._factors: dict[tuple[str, int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self._weights: list[float] = []
        self._memory: tuple[int, int] | None = None
        self.params: dict[str, dict[str, Tensor]] = {}
        """Module -> parameter -> view of the adapter's values on the device."""

    def refresh(self) -> None:
        """Read the parameters from where they are now on the device."""
        memory = self.pool.slot_of[self.member], self.pool.values.data_ptr()
        if memory != self._memory:
            self._memory = memory
            self.params = self.pool.row(self.member)
            self._factors.clear()

    def release(self) -> None:
        """Forget all that depends on the adapter's values."""
        self._merged, self._memory = {}, None
        self._factors.clear()

    def forward(self, layer: AdapterLinear, x: Tensor) -> Tensor:
        """[..., in], one token in all -> [..., out]. The first layer decides about all others."""
        name = layer.target.name
        target = self.pool.targets.get(name)
        if target is None:
            return layer.base_layer(x)
        if target.decides:
            self._decide(name, x)
        merged = self._merged.get(name)
        if merged is not None:
            return F.linear(x, merged.weight, merged.bias)
        return self.adapted(layer, name, x)

    def adapted(self, layer: AdapterLinear, name: str, x: Tensor) -> Tensor:
        """The unmerged layer."""
        if self.experts.method == "lora":
            return self._add_lora(layer, name, x)
        return self._plain_adapter(layer, name, x)

    @contextmanager
    def using(self, route: Route) -> Iterator[None]:
        """Compute `adapted` with this route, for measurements."""
        before = self._route, self._weights
        self._set(route)
        try:
            yield
        finally:
            self._route, self._weights = before

    def _decide(self, module: str, x: Tensor) -> None:
        routers = self.params[module][ROUTER][None]
        choice = choose(router_logits(x.reshape(1, -1), routers, ONE), self.experts)
        if self._router.given_routes is not None:
            choice = with_routes(choice, self._router.given_routes(1))
        if self._router.recorder is not None:
            self._router.recorder.add(
                self.spec, module, experts=choice.experts, probabilities=choice.probabilities
            )
        route = Route(tuple(choice.experts[0].tolist()), choice.weights[0])
        self._set(route)
        self._merged = self.path.layers_for(route)

    def _set(self, route: Route) -> None:
        self._route = route
        self._weights = [1.0] if route.is_shared else route.weights.tolist()

    def _add_lora(self, layer: AdapterLinear, name: str, x: Tensor) -> Tensor:
        """Two products of a matrix and a vector for each expert, onto the frozen layer's output."""
        assert self._route is not None
        y = layer.base_layer(x)
        flat, token = y.view(-1), x.reshape(-1)
        if token.dtype != y.dtype:  # under autocast
            token = token.to(y.dtype)
        for expert, weight in zip(self._route.experts, self._weights, strict=True):
            A, B = self._expert(name, expert, y.dtype)
            flat.addmv_(B, torch.mv(A, token), alpha=weight * self.spec.scaling)
        return y

    def _expert(self, name: str, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of one expert in this dtype: views, or copies that are kept."""
        key = name, expert, dtype
        if key not in self._factors:
            params = self.params[name]
            self._factors[key] = params["A"][expert].to(dtype), params["B"][expert].to(dtype)
        return self._factors[key]

    def _plain_adapter(self, layer: AdapterLinear, name: str, x: Tensor) -> Tensor:
        assert self._route is not None
        target, spec = self.pool.targets[name], self.spec
        joined = joined_experts(self.params[name], self._route.experts, self._weights, spec)
        params: Params = {param: values[None] for param, values in joined.items()}
        site = Site(
            base=layer.base_layer,
            weight=lambda: layer.weight_context(linear_dtype(x)),
            bias=layer.bias,
            dropout=lambda tokens: tokens,
        )
        y = expert_method(spec).forward(
            x.reshape(1, -1), site, params, specs=[spec], feedforward=target.feedforward, segments=ONE
        )
        return y.view(*x.shape[:-1], -1)
