"""Feed-forward blocks with experts: computes the rows of routed adapters, and leaves all others to the block.

The output of a block for a token is sum_e w_e FFN_e(x): each expert is the whole block with its own adapters
on the block's layers. The base's products of the input layers are computed once for a token, whatever the
number of its experts (those of LoRA and IA3); those of the output layer once for each pair of a token and an
expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.methods import Params, Site
from flora_train.adapters.methods.routed import ROUTER, expert_method
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.balance import with_balance
from flora_train.adapters.routed.blocks import FeedForwardBlock, hidden_states
from flora_train.adapters.routed.choice import Choice, choose, router_logits
from flora_train.adapters.routed.few_tokens import add_experts, input_layer
from flora_train.adapters.routed.jitter import jittered
from flora_train.adapters.routed.recording import record_choice
from flora_train.adapters.routing import BatchRouting, Routing, Span
from flora_train.adapters.spec import AdapterSpec
from flora_train.kernels.autocast import linear_dtype
from flora_train.kernels.expert_pairs import (
    Pairs,
    combine_pairs,
    gather_pairs,
    group_pairs,
    pairs_in_order,
)

FEW_PAIRS = 32
"""Pairs up to which, without gradients, each gets its expert's parameters instead of being sorted by
expert."""


class ExpertBlock:
    """Replaces the forward of one feed-forward block."""

    def __init__(
        self,
        module: nn.Module,
        block: FeedForwardBlock,
        layers: Sequence[AdapterLinear],
        router: BatchRouting,
    ) -> None:
        """layers: the wrapped layers of the block, in the order of `block.layers`."""
        self.block = block
        self.router = router
        self.layers = dict(zip(block.layers, layers, strict=True))
        self._activation: Callable[[Tensor], Tensor] = getattr(module, block.activation)
        self._original = module.forward
        self._pools: frozenset[int] = frozenset()
        module.forward = self.forward

    def add_pool(self, pool: Pool) -> None:
        self._pools |= {id(pool)}

    @torch.compiler.disable(reason="the routing of tokens to experts changes with every batch")
    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """x: [B, L, d], or [B * L, d] row by row, for the B rows of the current routing."""
        routing = self.router.routing
        own = [] if routing is None else [span for span in routing.spans if id(span.pool) in self._pools]
        if routing is None or not own:
            return self._original(x, *args, **kwargs)
        tokens_per_row, remainder = divmod(x.numel() // x.shape[-1], routing.rows)
        if remainder:
            shape = tuple(x.shape)
            raise RuntimeError(f"{self.block.name} got {shape}, which does not hold {routing.rows} rows")
        rows = x.reshape(routing.rows, tokens_per_row, x.shape[-1])
        if routing.order is not None:
            rows = rows.index_select(0, routing.order)
        outputs: list[Tensor] = []
        positions: list[int] = []
        for span in own:
            tokens = rows[span.start : span.end].reshape(-1, x.shape[-1])
            y = self._run(span, tokens, tokens_per_row, routing=routing)
            outputs.append(y.view(span.end - span.start, tokens_per_row, -1))
            positions += range(span.start, span.end)
        rest = routing.without(self._pools)
        if rest is not None:
            index, others = rest
            with self._routed(others):
                outputs.append(self._original(rows[index.to(x.device)], *args, **kwargs))
            positions += index.tolist()
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        if len(outputs) > 1:
            y = y.index_select(0, torch.tensor(positions, device=x.device).argsort())
        if routing.inverse is not None:
            y = y.index_select(0, routing.inverse)
        return y.view(*x.shape[:-1], y.shape[-1])

    @contextmanager
    def _routed(self, routing: Routing) -> Iterator[None]:
        before = self.router.routing
        self.router.routing = routing
        try:
            yield
        finally:
            self.router.routing = before

    def _run(self, span: Span, x: Tensor, tokens_per_row: int, *, routing: Routing) -> Tensor:
        """[T, d] -> [T, d] for the tokens of the adapters of a span."""
        experts = span.specs[0].experts
        assert experts is not None
        segments = span.segments.scaled(tokens_per_row)
        routers = span.gather(self.block.name)[ROUTER]
        read = jittered(x, self.block.name, routing, span, tokens_per_row=tokens_per_row)
        choice = choose(router_logits(read, routers, segments), experts)
        record_choice(
            self.router.recorder,
            choice,
            self.block.name,
            routing=routing,
            span=span,
            tokens_per_row=tokens_per_row,
        )
        # Reentrant checkpointing runs the first forward of a training step without gradients, too.
        is_inference = not torch.is_grad_enabled() and routing.noise is None and routing.draws is None
        is_few = is_inference and choice.experts.numel() <= FEW_PAIRS
        if is_few and len(span.specs) == 1 and experts.method == "lora" and experts.top_p == 1.0:
            return self._run_few(span, x, choice)
        make = group_pairs
        if is_few:
            make = pairs_in_order
        pairs = make(choice.experts, segments, experts.count)
        run = _Experts(self, span, pairs, routing, tokens_per_row)
        hidden = hidden_states(self.block.form, self._activation, run.inputs(x))
        y = combine_pairs(run.output(hidden), choice.weights, pairs)
        return with_balance(y, choice, self.block.name, routing, span, tokens_per_row=tokens_per_row)

    def _run_few(self, span: Span, x: Tensor, choice: Choice) -> Tensor:
        """`_run` for few tokens [T, d] of one adapter with LoRA experts."""
        experts = choice.experts.flatten()

        def part(name: str) -> tuple[dict[str, Tensor] | None, float]:
            assert span.pool is not None
            if name not in span.pool.targets:
                return None, 1.0
            stacks = {param: stack[0] for param, stack in span.gather(name).items()}
            return stacks, span.specs[0].at(name).scaling

        parts = []
        for name in self.block.inputs:
            stacks, scaling = part(name)
            parts.append(input_layer(self.layers[name], x, stacks, experts, scaling=scaling))
        hidden = hidden_states(self.block.form, self._activation, parts)
        stacks, scaling = part(self.block.output)
        y = self.layers[self.block.output].base_layer(hidden)
        if stacks is not None:
            y = add_experts(y, hidden, stacks, experts, scaling)
        slots = y.view(len(x), -1, y.shape[1])
        return torch.bmm(choice.weights.to(y.dtype)[:, None], slots)[:, 0]


class _Experts:
    """The experts of the adapters of a span, for one forward pass of a block."""

    def __init__(
        self, owner: ExpertBlock, span: Span, pairs: Pairs, routing: Routing, tokens_per_row: int
    ) -> None:
        assert span.pool is not None
        self.block, self.layers, self.pool = owner.block, owner.layers, span.pool
        self.span, self.pairs, self.routing = span, pairs, routing
        self.tokens_per_row = tokens_per_row

    def inputs(self, x: Tensor) -> list[Tensor]:
        """[P, .] of each input layer, from the tokens x [T, d]."""
        gathered = gather_pairs(x, self.pairs)
        outputs = []
        for name in self.block.inputs:
            layer = self.layers[name]

            def base(_: Tensor, layer: AdapterLinear = layer) -> Tensor:
                return gather_pairs(layer.base_layer(x), self.pairs)

            outputs.append(self._layer(name, gathered, base))
        return outputs

    def output(self, hidden: Tensor) -> Tensor:
        """[P, d] of the output layer, from its input [P, ff]."""
        name = self.block.output
        return self._layer(name, hidden, self.layers[name].base_layer)

    def _layer(self, name: str, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """A layer of all pairs x [P, in]. base: what the frozen layer makes of them."""
        target = self.pool.targets.get(name)
        if target is None or target.block is None:
            return base(x)
        layer = self.layers[name]
        stacks = self.span.gather(name)
        params: Params = {param: self._of_segments(stack.flatten(0, 1)) for param, stack in stacks.items()}
        specs = self._specs(name)
        site = Site(
            base=base,
            weight=lambda: layer.weight_context(linear_dtype(x)),
            bias=layer.bias,
            dropout=lambda rows: self._dropped(rows, name),
        )
        return expert_method(specs[0]).forward(
            x, site, params, specs=specs, feedforward=target.feedforward, segments=self.pairs.segments
        )

    def _of_segments(self, stack: Tensor) -> Tensor:
        """[K E, ...] -> the entries of the segments of the pairs."""
        return stack if self.pairs.stacks is None else stack.index_select(0, self.pairs.stacks)

    def _specs(self, name: str) -> list[AdapterSpec]:
        """The adapter of each segment of the pairs."""
        specs: list[AdapterSpec] = []
        slots = self.pairs.position.shape[1]
        for spec, rows in zip(self.span.specs, self.span.segments.lengths, strict=True):
            assert spec.experts is not None
            repeats = spec.experts.count
            if self.pairs.stacks is not None:
                repeats = rows * self.tokens_per_row * slots
            specs += [spec.at(name)] * repeats
        return specs

    def _dropped(self, rows: Tensor, name: str) -> Tensor:
        """Dropout on pairs [P, in]: the pairs of a token have one mask."""
        if self.routing.noise is None or not any(spec.dropout for spec in self.span.specs):
            return rows
        tokens = rows.new_ones(self.pairs.position.shape[0], rows.shape[1])
        mask = self.routing.dropout(tokens, name, self.span, tokens_per_row=self.tokens_per_row)
        return rows * gather_pairs(mask, self.pairs)
