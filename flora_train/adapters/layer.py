"""The wrapper of a frozen linear layer, which passes every row through its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flora_train.adapters.methods import Site, Target
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.gated import run_gated
from flora_train.adapters.routed.switch import switched_layer
from flora_train.adapters.routing import BatchRouting, Routing, Span
from flora_train.adapters.spec import AdapterSpec
from flora_train.adapters.targets import dense_weight
from flora_train.kernels.autocast import linear_dtype
from flora_train.models.quantized import dequantized, is_quantized

Single = Callable[[Tensor], Tensor]


class AdapterLinear(nn.Module):
    """`base_layer` (frozen) and the pools that target it. Without a routing it computes what the base layer
    computes.

    Adapter parameters are not parameters of this module. The bank holds them, so that state_dict, sharding
    and device moves of the model affect only the frozen base.
    """

    def __init__(self, base_layer: nn.Module, target: Target, router: BatchRouting) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.target = target
        self.router = router
        self._quantised = is_quantized(base_layer)
        self.pools: dict[int, Pool] = {}
        self._pool_ids: frozenset[int] = frozenset()
        self._last_single: tuple[AdapterSpec, int, Tensor, Single | None] | None = None
        """The adapter that computed rows alone last, its slot, the pool's values then, and
        `AdapterMethod.single`."""

    def add_pool(self, pool: Pool) -> None:
        self.pools[id(pool)] = pool
        self._pool_ids = frozenset(self.pools)

    # Some architectures read a layer's weight to choose a dtype, or its sizes.
    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.target.in_features

    @property
    def out_features(self) -> int:
        return self.target.out_features

    @torch.compiler.disable(reason="the routing of rows to adapters changes with every batch")
    def forward(self, x: Tensor) -> Tensor:
        """x: [B, ..., in], or [B * L, in] row by row, for the B rows of the current routing. Returns [...,
        out].

        Raises RuntimeError if x does not hold B rows. torch.compile compiles the code between adapted layers,
        but not these layers.
        """
        routing = self.router.routing
        if routing is None:
            return self.base_layer(x)
        if routing.merged is not None and not torch.is_grad_enabled():
            merged = routing.merged.get(self.target.name)
            if merged is not None:
                return F.linear(x, merged.weight, merged.bias)
        if routing.token_step is not None and x.numel() == x.shape[-1] and not torch.is_grad_enabled():
            return routing.token_step.forward(self, x)
        if routing.only_span is not None and not torch.is_grad_enabled():
            single = self._single(routing.only_span, x, routing)
            if single is not None:
                return single(x)
        spans = routing.spans_for(self._pool_ids)
        if len(spans) == 1 and spans[0].pool is None:
            return self.base_layer(x)
        tokens_per_row, remainder = divmod(x.numel() // x.shape[-1], routing.rows)
        if remainder or (x.dim() > 2 and x.shape[0] != routing.rows):
            raise RuntimeError(
                f"{self.target.name} got an input of shape {tuple(x.shape)}, "
                f"which does not hold the {routing.rows} routed rows; "
                "call bank.route with one adapter per row of this batch"
            )
        rows = x.reshape(routing.rows, tokens_per_row, x.shape[-1])
        if routing.order is not None:
            rows = rows.index_select(0, routing.order)
        # One split of all rows: the backward of a slice for each span would fill the whole batch with zeros
        # as many times.
        parts = rows.split([span.end - span.start for span in spans])
        outputs = []
        for span, part in zip(spans, parts, strict=True):
            tokens = part.reshape(-1, x.shape[-1])
            outputs.append(self._run(span, tokens, tokens_per_row, routing=routing))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if routing.inverse is not None:
            y = y.view(routing.rows, tokens_per_row, -1).index_select(0, routing.inverse)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _single(self, span: Span, x: Tensor, routing: Routing) -> Callable[[Tensor], Tensor] | None:
        """The shortest way to compute rows of one adapter without gradients; None if there is none."""
        pool = span.pool
        if pool is None or span.slot_range is None or id(pool) not in self._pool_ids:
            return None
        if x.dim() != 3 or x.shape[0] != routing.rows or routing.noise is not None:
            return None
        if not x.is_contiguous() or torch.is_autocast_enabled(x.device.type):
            return None
        spec, slot, last = span.specs[0], span.slot_range.start, self._last_single
        if last is not None and last[0] is spec and last[1] == slot and last[2] is pool.values:
            return last[3]
        name = self.target.name
        params = {param: view[0] for param, view in span.gather(name).items()}
        single = pool.method.single(self.base_layer, params, spec.at(name), pool.targets[name].feedforward)
        self._last_single = spec, slot, pool.values, single
        return single

    def weight_context(self, dtype: torch.dtype) -> AbstractContextManager[Tensor]:
        """A context that provides the frozen weight as [out, in]; a quantized one in this dtype."""
        if self._quantised:
            return dequantized(self.base_layer, dtype, keep=self.router.recomputes)
        return nullcontext(dense_weight(self.base_layer, self.target))

    def _run(self, span: Span, x: Tensor, tokens_per_row: int, *, routing: Routing) -> Tensor:
        if span.pool is None or span.slots is None:
            return self.base_layer(x)
        target = span.pool.targets[self.target.name]
        site = Site(
            base=self.base_layer,
            weight=lambda: self.weight_context(linear_dtype(x)),
            bias=self.bias,
            dropout=lambda rows: routing.dropout(rows, target.name, span, tokens_per_row=tokens_per_row),
        )
        if span.specs[0].gate is not None:
            return run_gated(
                x,
                site,
                target.name,
                span=span,
                routing=routing,
                recorder=self.router.recorder,
                tokens_per_row=tokens_per_row,
            )
        if span.pool.method.decides_once:
            return switched_layer(
                x,
                site,
                target,
                span=span,
                routing=routing,
                router=self.router,
                tokens_per_row=tokens_per_row,
            )
        params = span.gather(target.name)
        segments = span.segments.scaled(tokens_per_row)
        specs = [spec.at(target.name) for spec in span.specs]
        feedforward = target.feedforward
        return span.pool.method.forward(
            x, site, params, specs=specs, feedforward=feedforward, segments=segments
        )
