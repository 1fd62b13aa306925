"""Serves the adapter that dominates the traffic with merged weights, where measured costs say that this
pays."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.lora.layers import LoRAMapping
from vllm.lora.layers.utils import LoRAMappingType

from flora_train.adapters.host_memory import free_memory
from flora_train.config.errors import user_error
from flora_train.runtime.hardware import free_host_memory
from flora_train.serving.layers import MultiplicativeMixin, obstacle_to_products
from flora_train.serving.manager import MultiplicativeManager
from flora_train.serving.merge_policy import MergeCosts, MergePolicy
from flora_train.serving.merged_layers import MergedRows

logger = init_logger(f"vllm.{__name__}")

VARIABLE = "FLORA_TRAIN_MERGE"
"""A number of requests switches merging on: an adapter stays merged at a loss for at most so many of its
own."""
EXACT_DTYPES = (torch.float32, torch.float64)
"""In 16 bits a merged weight loses small changes, and texts would differ."""
MEMORY_SHARE = 0.5
"""Share of the free memory that merged weights may take."""
PROBE_TOKENS = 8
"""Tokens of the larger batch with which layers are timed."""
REPEATS = 2
"""Timed calls of each layer, after one that is not timed; the fastest counts."""
NO_GAIN = MergeCosts(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
"""Of an adapter that cannot be merged."""


def max_requests() -> int | None:
    """The bound in VARIABLE; None: nothing is merged. Raises UserError for another value than a number."""
    value = os.environ.get(VARIABLE, "0")
    if not value.isdecimal():
        raise user_error(
            VARIABLE, value, "set it to a number of requests, such as 32, or to 0 for no merging"
        )
    return int(value) or None


class MergingManager(MultiplicativeManager):
    """Merges the adapter that the policy chooses.

    In a batch of this adapter alone, every token goes through the merged weights. In a mixed batch its tokens
    do, too, if that is faster than the adapter as it is, and all others go through the base model's weights.
    With tensor parallelism every process merges its own part, and decides alone: its part of the result is
    the same either way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.policy = MergePolicy(self.costs_of, max_requests=max_requests() or 0)
        self.merged: int | None = None
        """The id of the adapter that is merged."""
        self._costs: dict[tuple[object, ...], MergeCosts] = {}
        self._costs_of_id: dict[int, MergeCosts] = {}
        self._dummies: set[int] = set()
        self._requests: Counter[int] = Counter()
        """Requests of each adapter in the last step."""

    def set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        ids = mapping.index_mapping
        if mapping.type == LoRAMappingType.LANGUAGE and not self._dummies.intersection(ids):
            requests = Counter(mapping.prompt_mapping)
            rows = Counter(lora_id or None for lora_id in ids)
            choice = self.policy.step(rows, requests - self._requests)
            self._requests = requests
            if choice != self.merged:
                self._switch(choice)
        super().set_adapter_mapping(mapping)

    def _set_adapter_mapping(self, mapping: LoRAMapping) -> None:
        positions = [token for token, lora_id in enumerate(mapping.index_mapping) if lora_id == self.merged]
        if self.merged is not None and positions:
            foreign = len(mapping.index_mapping) - len(positions)
            if self.costs_of(self.merged).gain(len(positions), foreign) > 0:
                self._place(mapping, positions)
                return
        self._place(mapping, [])

    def _place(self, mapping: LoRAMapping, positions: Sequence[int]) -> None:
        """Use merged weights for these tokens, and the adapters of the mapping for all others."""
        self.batch.merged = None
        if positions:
            ids = list(mapping.index_mapping)
            merged = ids[positions[0]]
            tokens: Tensor | None = None
            if len(positions) < len(ids):
                tokens = torch.tensor(positions, device=self.device)
            self.batch.merged = MergedRows(tokens)
            for position in positions:
                ids[position] = 0
            prompts = mapping.prompt_mapping
            if merged not in ids:
                prompts = tuple(0 if lora_id == merged else lora_id for lora_id in prompts)
            mapping = LoRAMapping(tuple(ids), prompts, is_prefill=mapping.is_prefill, type=mapping.type)
        super()._set_adapter_mapping(mapping)

    def costs_of(self, lora_id: int) -> MergeCosts:
        """What merging this adapter costs and saves: measured once for adapters of equal rank and layers."""
        if lora_id in self._costs_of_id:
            return self._costs_of_id[lora_id]
        model = self._registered_adapters.cache.get(lora_id)
        if model is None or lora_id not in self.lora_index_to_id:
            return NO_GAIN
        layers = {name: layer for name, layer in self.modules.items() if model.get_lora(name) is not None}
        key = (self._is_multiplicative(lora_id), model.rank, tuple(layers))
        if key not in self._costs:
            costs = NO_GAIN
            if self._is_mergeable(lora_id, layers.values()):
                costs = self._measure(lora_id, layers.values())
            self._costs[key] = costs
            logger.debug("Merging an adapter of rank %d: %s", model.rank, costs)
        self._costs_of_id[lora_id] = self._costs[key]
        return self._costs[key]

    def _is_mergeable(self, lora_id: int, layers: Collection[Any]) -> bool:
        """Whether merged weights of these layers would be exact, and fit into the memory."""
        if self._without_graphs or self.supports_mm:
            return False
        if self._registered_adapters.cache[lora_id].modules_to_save:
            return False
        for layer in layers:
            if not isinstance(layer, MultiplicativeMixin) or obstacle_to_products(layer.base_layer):
                return False
            if layer.base_layer.weight.dtype not in EXACT_DTYPES:
                return False
        needed = sum(_weight_bytes(layer) for layer in layers)
        return needed <= MEMORY_SHARE * self._free_bytes()

    def _free_bytes(self) -> int:
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            return int(free)
        return min(free_memory(), free_host_memory())

    @torch.inference_mode()
    def _switch(self, choice: int | None) -> None:
        """Merge this adapter instead of the present one; None: merge none."""
        layers = [layer for layer in self.modules.values() if isinstance(layer, MultiplicativeMixin)]
        started = self._now()
        for layer in layers:
            layer.merged = None
        unmerged = self._now()
        if self.merged is not None:
            self._correct(self.merged, unmerge_seconds=unmerged - started)
            logger.info("Unmerged adapter %d", self.merged)
        self.merged = choice
        self._last_mapping = None
        if choice is None:
            return
        slot = self.lora_index_to_id.index(choice)
        for layer in layers:
            layer.merged = layer.merged_with(slot)
        seconds = self._now() - unmerged
        self._correct(choice, merge_seconds=seconds)
        logger.info("Merged adapter %d in %.3f s", choice, seconds)

    def _correct(self, lora_id: int, **seconds: float) -> None:
        """Replace what was measured on samples of the layers."""
        if lora_id in self._costs_of_id:
            self._costs_of_id[lora_id] = replace(self._costs_of_id[lora_id], **seconds)

    def _forget(self, lora_id: int) -> None:
        """The adapter of this id is unloaded or replaced."""
        self._costs_of_id.pop(lora_id, None)
        if lora_id == self.merged:
            self._switch(None)
            self.policy.forget()

    def add_adapter(self, adapter: Any) -> bool:
        is_new = bool(super().add_adapter(adapter))
        if is_new:
            self._forget(adapter.id)
        return is_new

    def remove_adapter(self, adapter_id: int) -> bool:
        self._forget(adapter_id)
        return bool(super().remove_adapter(adapter_id))

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        self._switch(None)
        self.policy.forget()
        self.batch.merged = None
        self._costs_of_id.clear()
        self._dummies.clear()

    def create_dummy_lora(self, lora_id: int, *args: Any, **kwargs: Any) -> Any:
        self._dummies.add(lora_id)
        return super().create_dummy_lora(lora_id, *args, **kwargs)

    @torch.inference_mode()
    def _measure(self, lora_id: int, layers: Iterable[MultiplicativeMixin]) -> MergeCosts:
        """Time one layer of each shape: merging it, and its products for tokens of this adapter."""
        slot = self.lora_index_to_id.index(lora_id)
        groups: dict[tuple[object, ...], list[MultiplicativeMixin]] = defaultdict(list)
        for layer in layers:
            groups[type(layer), layer.input_size, layer.output_slices].append(layer)
        samples = [(group[0], len(group)) for group in groups.values()]
        before = [layer.merged for layer, _ in samples]

        def merge(layer: MultiplicativeMixin) -> None:
            layer.merged = layer.merged_with(slot)

        def unmerge(layer: MultiplicativeMixin) -> None:
            layer.merged = None

        merge_seconds = self._seconds(samples, merge)
        adapted, merged = {}, {}
        for tokens in (1, PROBE_TOKENS):
            adapted[tokens] = self._seconds_of_batch(samples, lora_id, tokens, merged=0)
            merged[tokens] = self._seconds_of_batch(samples, lora_id, tokens, merged=tokens)
        half = PROBE_TOKENS // 2
        mixed = self._seconds_of_batch(samples, lora_id, PROBE_TOKENS, merged=half)
        unmerge_seconds = self._seconds(samples, unmerge)
        for (layer, _), weight in zip(samples, before, strict=True):
            layer.merged = weight
        self._last_mapping = None
        saved = {tokens: adapted[tokens] - merged[tokens] for tokens in adapted}
        per_row = max(0.0, (saved[PROBE_TOKENS] - saved[1]) / (PROBE_TOKENS - 1))
        per_step = saved[1] - per_row
        # The tokens that are not merged are of the same adapter here; the base model's cost no more.
        foreign = max(0.0, per_step + half * per_row - (adapted[PROBE_TOKENS] - mixed))
        return MergeCosts(merge_seconds, unmerge_seconds, per_step, per_row, foreign, 0.0)

    def _seconds_of_batch(
        self, samples: Sequence[tuple[MultiplicativeMixin, int]], lora_id: int, tokens: int, *, merged: int
    ) -> float:
        """Time of all layers for so many tokens of an adapter, of which the first `merged` are merged."""
        self._place(LoRAMapping((lora_id,) * tokens, (lora_id,), is_prefill=True), range(merged))

        def run(layer: MultiplicativeMixin) -> None:
            weight = layer.lora_a_stacked[0]
            layer.apply(torch.ones(tokens, layer.input_size, dtype=weight.dtype, device=weight.device))

        return self._seconds(samples, run)

    def _seconds(
        self,
        samples: Sequence[tuple[MultiplicativeMixin, int]],
        run: Callable[[MultiplicativeMixin], None],
    ) -> float:
        """Time of `run` for all layers. samples: one layer of each shape, and how many there are."""
        total = 0.0
        for layer, count in samples:
            seconds = []
            for _ in range(REPEATS + 1):
                started = self._now()
                run(layer)
                seconds.append(self._now() - started)
            total += count * min(seconds[1:])
        return total

    def _now(self) -> float:
        """The time when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _weight_bytes(layer: MultiplicativeMixin) -> int:
    return sum(layer.output_slices) * layer.input_size * layer.lora_a_stacked[0].element_size()
