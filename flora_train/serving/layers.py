"""vLLM's LoRA layers, extended by multiplicative adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm import _custom_ops
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    LogitsProcessorWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
    VocabParallelEmbeddingWithLoRA,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from flora_train.serving.batch_rows import BatchRows
from flora_train.serving.fit import LayerFacts
from flora_train.serving.layer_plan import SlotUse
from flora_train.serving.merged_layers import MergedRows, MergedWeight, merged_lora, merged_multipliers
from flora_train.serving.multipliers import Multiplier
from flora_train.serving.projection import LayerFactors, project

RECOVERED_ROWS = 512
"""Inputs whose weights are recovered at once."""

PACKED_BLOCK = 32
"""Rows of vLLM's packed weights that are handled together, as in vLLM's own layers."""

STANDARD = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
"""Layers of vLLM that compute no more than x W^T + bias."""


@dataclass
class CurrentBatch:
    """The multiplicative rows of the batch that runs now: one object for all layers of a model."""

    rows: BatchRows | None = None
    """None where every token uses the base model or a LoRA: every layer is then vLLM's own."""
    merged: MergedRows | None = None
    """The tokens of the adapter that is merged; None where no token uses merged weights."""

    @property
    def is_eager(self) -> bool:
        """Whether code that was compiled or captured for vLLM's own batches cannot compute this one."""
        return self.rows is not None or self.merged is not None


if TYPE_CHECKING:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA as LoraLayer
else:
    LoraLayer = object


class SpareSlotMixin(LoraLayer):
    """One more slot on a CPU, which stays 0: vLLM's CPU code reads the last slot for tokens of the base
    model."""

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        spare = int(_device_of(self).type == "cpu")
        super().create_lora_weights(max_loras + spare, lora_config, model_config)


class MultiplicativeMixin(SpareSlotMixin):
    """Adds multiplicative adapters to one of vLLM's LoRA layers.

    Their factors are in the slots of vLLM's LoRA, which is not computed for their tokens. vLLM's own code
    cuts them for merged layers and tensor parallelism.
    """

    def __init__(self, base_layer: Any) -> None:
        super().__init__(base_layer)
        self.batch = CurrentBatch()
        self.factors: LayerFactors | None = None
        """None until a multiplicative adapter uses the layer."""
        self.merged: MergedWeight | None = None
        """The weight with the merged adapter; None where that leaves the layer as it is."""
        self._recovered: Tensor | None = None
        self._slice_products: list[Callable[[Tensor], Tensor]] = []

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)
        if self.factors is not None:
            self.factors.drop(index)

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.batch.merged is not None:
            return self._apply_merged(x, self.batch.merged, bias)
        if self.batch.rows is None:
            return super().apply(x, bias)
        return self._project(x, self.batch.rows, bias)

    def _apply_merged(self, x: Tensor, rows: MergedRows, bias: Tensor | None) -> Tensor:
        """The tokens of the merged adapter through its weight, all others as ever through the base model's.

        In the rest of the batch, tokens of the merged adapter are those of the base model.
        """
        flat = x.flatten(0, 1) if x.ndim == 3 else x
        if rows.positions is None and self.merged is not None:
            return self.merged.product(flat, bias).view(*x.shape[:-1], -1)
        y = super().apply(x, bias) if self.batch.rows is None else self._project(x, self.batch.rows, bias)
        if rows.positions is not None and self.merged is not None:
            y.view(len(flat), -1)[rows.positions] = self.merged.product(flat[rows.positions], bias)
        return y

    def merged_with(self, slot: int) -> MergedWeight | None:
        """The weight with the adapter in this slot; None if the adapter leaves the layer as it is."""
        factors = self.factors
        uses = {} if factors is None else factors.uses
        if slot not in uses and not any(bool(stacked[slot].any()) for stacked in self.lora_b_stacked):
            return None
        recovered = self._recovered
        weight = self.full_weight()
        self._recovered = recovered  # a copy that nothing else needs is not kept
        if factors is None or slot not in uses:
            A = [stacked[slot, 0] for stacked in self.lora_a_stacked]
            B = [stacked[slot, 0] for stacked in self.lora_b_stacked]
            return merged_lora(weight, A, B)
        A = [part[slot] for part in factors.A]
        B = [part[slot] for part in factors.B]
        return merged_multipliers(weight, A, B, uses[slot])

    def use_multipliers(self, index: int, multipliers: list[Multiplier | None]) -> None:
        """Make a slot multiplicative, after `set_lora` has written its factors.

        multipliers: those of the layer's slices, or the only one of all slices; None: not adapted.
        """
        if len(multipliers) == 1:
            multipliers *= self.n_slices
        if self.factors is None:
            A = [stacked[:, 0] for stacked in self.lora_a_stacked]
            B = [torch.zeros_like(stacked[:, 0].mT).contiguous() for stacked in self.lora_b_stacked]
            self.factors = LayerFactors(A, B)
        for slice_B, stacked in zip(self.factors.B, self.lora_b_stacked, strict=True):
            slice_B[index].copy_(stacked[index, 0].T)
        use = SlotUse(
            tuple(0 if m is None else m.rank for m in multipliers),
            tuple(m is None or m.keep_base for m in multipliers),
            tuple("" if m is None else m.scales for m in multipliers),
            all(m is None or m.is_near_one for m in multipliers),
        )
        self.factors.use(index, use)

    def full_weight(self) -> Tensor:
        """This process's part of the base model's weight, [outputs, inputs].

        On a CPU, vLLM keeps only a packed form of it. It is multiplied by unit vectors, which is exact, and
        kept.
        """
        weight = self.base_layer.weight
        if weight.numel():
            return weight
        if self._recovered is None:
            parts = []
            for start in range(0, self.input_size, RECOVERED_ROWS):
                stop = min(start + RECOVERED_ROWS, self.input_size)
                unit_vectors = torch.zeros(stop - start, self.input_size, dtype=weight.dtype)
                unit_vectors[:, start:stop].fill_diagonal_(1)
                parts.append(self._product(unit_vectors))
            self._recovered = torch.cat(parts).T.contiguous()
        return self._recovered

    def _product(self, x: Tensor, s: int | None = None) -> Tensor:
        """x W^T in vLLM's kernel, or the outputs of slice `s`."""
        if s is None or self.n_slices == 1:
            return self.base_layer.quant_method.apply(self.base_layer, x, None)
        if not self._slice_products:
            self._slice_products = [_product_with(W) for W in self.full_weight().split(self.output_slices)]
        return self._slice_products[s](x)

    def _project(self, x: Tensor, rows: BatchRows, bias: Tensor | None) -> Tensor:
        flat = x.flatten(0, 1) if x.ndim == 3 else x
        if self.factors is None:
            y = self._product(flat)
            if bias is not None:
                y += bias
        else:
            y = project(flat, self.factors, rows, product=self._product, weight=self.full_weight, bias=bias)
        if rows.has_lora:
            self.punica_wrapper.add_lora_linear(
                y, flat, self.lora_a_stacked, self.lora_b_stacked, 1.0, self.output_slices
            )
        return y.view(*x.shape[:-1], y.shape[-1])


def _product_with(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """x -> x W^T. On a CPU with a packed copy of W, as vLLM's own layers have."""
    if weight.is_cpu and _custom_ops._supports_onednn:
        try:
            packed = _custom_ops.create_onednn_mm(weight.T, PACKED_BLOCK)
        except RuntimeError:
            pass  # as in vLLM: not every CPU and dtype has it
        else:
            return partial(_packed_product, packed)
    return lambda x: linear(x, weight)


def _packed_product(packed: Any, x: Tensor) -> Tensor:
    return _custom_ops.onednn_mm(packed, x, None)


def facts_of(layer: MultiplicativeMixin, parts: int) -> list[LayerFacts]:
    """What the adapters' modules must agree with: one entry for each of the `parts` that the layer merges."""
    base = layer.base_layer
    sizes = [base.output_size]
    if isinstance(base, QKVParallelLinear):
        query, key = (heads * base.head_size for heads in (base.total_num_heads, base.total_num_kv_heads))
        sizes = [query, key, key]
    elif isinstance(base, MergedColumnParallelLinear):
        sizes = list(base.output_sizes)
    if parts == 1:
        sizes = [sum(sizes)]
    obstacle = obstacle_to_products(base)
    if parts != len(sizes):
        obstacle = f"is merged with others in a way that only LoRA is served on ({type(base).__name__})"
        sizes = [0] * parts
    later = bool(base.skip_bias_add and base.bias is not None)
    return [LayerFacts(base.input_size, size, obstacle=obstacle, bias_is_added_later=later) for size in sizes]


def obstacle_to_products(base: Any) -> str | None:
    """Why a product with this layer's weight cannot be exact."""
    if type(base.quant_method) is not UnquantizedLinearMethod:
        return f"is quantised ({type(base.quant_method).__name__})"
    if type(base).forward not in [standard.forward for standard in STANDARD]:
        return f"is computed in a way of its own ({type(base).__name__})"
    return None


def _device_of(layer: Any) -> torch.device:
    if isinstance(layer, VocabParallelEmbeddingWithLoRA):
        return layer.base_layer.weight.device
    return layer.device


class SpareSlotEmbedding(SpareSlotMixin, VocabParallelEmbeddingWithLoRA):
    pass


class AdaptedLogits(SpareSlotMixin, LogitsProcessorWithLoRA):
    """vLLM's logits with LoRA, computed only while an adapter has factors for the output layer.

    vLLM always computes them, for one row of each request, and fails where a request also asks for the
    log-probabilities of its prompt.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapted: set[int] = set()
        """Slots whose adapter changes the output layer."""

    def set_lora(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        super().set_lora(index, lora_a, lora_b)
        self.adapted.add(index)

    def reset_lora(self, index: int) -> None:
        super().reset_lora(index)
        self.adapted.discard(index)

    def _get_logits(
        self,
        hidden_states: Tensor,
        lm_head: Any,
        embedding_bias: Tensor | None = None,
        skip_gather: bool = False,
    ) -> Tensor | None:
        if not self.adapted:
            head = getattr(lm_head, "base_layer", lm_head)
            return self.base_layer._get_logits(hidden_states, head, embedding_bias, skip_gather)
        if len(hidden_states) != len(self.punica_wrapper.sampler_indices):
            # A prompt's log-probabilities: which adapter it has is not known here. Numbers that are not
            # finite fail this request alone.
            shape = (len(hidden_states), self.base_layer.org_vocab_size)
            return hidden_states.new_full(shape, torch.nan)
        return super()._get_logits(hidden_states, lm_head, embedding_bias, skip_gather)


class OneModuleMixin(MultiplicativeMixin):
    """A merged layer that is one module of the checkpoint.

    Models of transformers' own code do not name it among their packed modules, and vLLM then serves no LoRA
    on it.
    """

    @classmethod
    def can_replace_layer(
        cls, source_layer: Any, lora_config: Any, packed_modules_list: list[str], model_config: Any = None
    ) -> bool:
        return super().can_replace_layer(
            source_layer=source_layer,
            lora_config=lora_config,
            packed_modules_list=packed_modules_list or [""],
            model_config=model_config,
        )


class MultiplicativeColumnParallelLinear(OneModuleMixin, ColumnParallelLinearWithLoRA):
    pass


class MultiplicativeMergedColumnParallelLinear(MultiplicativeMixin, MergedColumnParallelLinearWithLoRA):
    pass


class MultiplicativeQKVParallelLinear(OneModuleMixin, QKVParallelLinearWithLoRA):
    pass


class MultiplicativeMergedQKVParallelLinear(MultiplicativeMixin, MergedQKVParallelLinearWithLoRA):
    pass


class MultiplicativeRowParallelLinear(MultiplicativeMixin, RowParallelLinearWithLoRA):
    pass


class MultiplicativeReplicatedLinear(MultiplicativeMixin, ReplicatedLinearWithLoRA):
    pass


class MultiplicativeVariableSliceLinear(MultiplicativeMixin, MergedColumnParallelLinearVariableSliceWithLoRA):
    pass


LAYERS = (
    SpareSlotEmbedding,
    MultiplicativeColumnParallelLinear,
    MultiplicativeMergedColumnParallelLinear,
    MultiplicativeQKVParallelLinear,
    MultiplicativeMergedQKVParallelLinear,
    MultiplicativeRowParallelLinear,
    MultiplicativeReplicatedLinear,
    MultiplicativeVariableSliceLinear,
)
"""Classes that vLLM prefers to its own ones of the same layers (see `install` in manager.py)."""
