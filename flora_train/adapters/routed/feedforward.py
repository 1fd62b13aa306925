"""Feed-forward blocks with experts: computes the rows of routed adapters, and leaves all others to the block.

The output of a block for a token is sum_e w_e FFN_e(x): each expert is the whole block with its own adapters
on the block's layers. For experts of LoRA and IA3 the frozen layers are computed once for a token, whatever
the number of its experts: those that read the block's input are the same for all of them, and the output
layer is linear, so that sum_e w_e W2 h_e = W2 sum_e w_e h_e, with h_e the hidden features of an expert and
its adapter on W2 beside it. fLoRA experts, whose W2 * (1 + B_e A_e) differ, are computed once for each pair
of a token and an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.methods import Params, Site, Target
from flora_train.adapters.methods.routed import ROUTER, expert_method
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.balance import with_balance
from flora_train.adapters.routed.blocks import FeedForwardBlock, hidden_states
from flora_train.adapters.routed.choice import Choice, choose, router_logits
from flora_train.adapters.routed.few_tokens import add_experts, add_experts_of_pairs, is_few
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
from flora_train.kernels.ia3.op import ia3_scale
from flora_train.kernels.lora.op import lora_add


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
        few = is_few(choice, routing)
        if few and len(span.specs) == 1 and experts.method == "lora" and experts.top_p == 1.0:
            return self._run_few(span, x, choice)
        make = pairs_in_order if few else group_pairs
        pairs = make(choice.experts, segments, experts.count)
        run = _Experts(self, span, pairs, routing, tokens_per_row)
        hidden = hidden_states(self.block.form, self._activation, run.inputs(x))
        y = run.output(hidden, choice.weights)
        return with_balance(y, choice, self.block.name, routing, span, tokens_per_row=tokens_per_row)

    def _run_few(self, span: Span, x: Tensor, choice: Choice) -> Tensor:
        """`_run` for few tokens [T, d] of one adapter with LoRA experts."""
        experts, weights, slots = choice.experts, choice.weights, choice.experts.shape[1]
        repeated = x if len(x) == 1 else x.repeat_interleave(slots, dim=0)
        of_pairs = experts.reshape(-1, 1)
        ones = torch.ones_like(of_pairs, dtype=weights.dtype)

        def factors(name: str) -> tuple[Tensor, Tensor, float] | None:
            assert span.pool is not None
            if name not in span.pool.targets:
                return None
            stacks = span.gather(name)
            return stacks["A"][0], stacks["B"][0], span.specs[0].at(name).scaling

        parts = []
        for name in self.block.inputs:
            part = self.layers[name].base_layer(x).repeat_interleave(slots, dim=0)
            if (own := factors(name)) is not None:
                A, B, scaling = own
                part = add_experts(part, repeated, A, B, of_pairs, ones * scaling)
            parts.append(part)
        hidden = hidden_states(self.block.form, self._activation, parts)
        weighted = torch.bmm(weights.to(hidden.dtype)[:, None], hidden.view(len(x), slots, -1))[:, 0]
        y = self.layers[self.block.output].base_layer(weighted)
        if (own := factors(self.block.output)) is not None:
            A, B, scaling = own
            y = add_experts_of_pairs(y, hidden, A, B, experts, weights * scaling)
        return y


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

    def output(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """[T, d]: the weighted sum of the output layer of all experts. hidden: its input, [P, ff]; weights:
        [T, k]."""
        name, pairs = self.block.output, self.pairs
        target, layer = self._adapted(name), self.layers[self.block.output]
        if target is None:
            return self._shared_base(hidden, weights)
        spec = self.span.specs[0]
        method = expert_method(spec).name
        if method == "ia3":
            assert target.feedforward  # its scales are of the layer's inputs
            scales = self._params(name)["l"]
            return self._shared_base(ia3_scale(hidden, scales, pairs.segments), weights)
        if method != "lora":
            return combine_pairs(self._layer(name, hidden, layer.base_layer), weights, pairs)
        y, params = self._shared_base(hidden, weights), self._params(name)
        delta = lora_add(
            y.new_zeros(pairs.count, y.shape[1]),
            self._dropped(hidden, name).to(y.dtype),
            params["A"],
            params["B"],
            scaling=[spec.scaling for spec in self._specs(name)],
            segments=pairs.segments,
        )
        return y + combine_pairs(delta, weights, pairs)

    def _shared_base(self, hidden: Tensor, weights: Tensor) -> Tensor:
        """[T, d]: sum_e w_e (W2 h_e + b) of the frozen output layer, from hidden [P, ff], in one product for
        each token."""
        layer = self.layers[self.block.output]
        y: Tensor = layer.base_layer(combine_pairs(hidden, weights, self.pairs))
        if layer.bias is None:
            return y
        # The weights add up to 1, but one expert alone has the gradient of its probability.
        return y + ((weights.sum(1, keepdim=True) - 1.0) * layer.bias).to(y.dtype)

    def _layer(self, name: str, x: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """A layer of all pairs x [P, in]. base: what the frozen layer makes of them."""
        target = self._adapted(name)
        if target is None:
            return base(x)
        layer, params, specs = self.layers[name], self._params(name), self._specs(name)
        site = Site(
            base=base,
            weight=lambda: layer.weight_context(linear_dtype(x)),
            bias=layer.bias,
            dropout=lambda rows: self._dropped(rows, name),
        )
        return expert_method(specs[0]).forward(
            x, site, params, specs=specs, feedforward=target.feedforward, segments=self.pairs.segments
        )

    def _adapted(self, name: str) -> Target | None:
        """The layer as the adapters change it; None if they do not."""
        target = self.pool.targets.get(name)
        return None if target is None or target.block is None else target

    def _params(self, name: str) -> Params:
        """The parameters of the experts on a layer, of each segment of the pairs."""
        stacks = self.span.gather(name)
        return {param: self._of_segments(stack.flatten(0, 1)) for param, stack in stacks.items()}

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
