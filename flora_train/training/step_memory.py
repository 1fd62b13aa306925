"""What the forward of a micro-batch keeps for its backward, and its operations, from shapes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flora_train.adapters.fused_experts import fused_experts
from flora_train.adapters.methods.meteora import member_stacks
from flora_train.adapters.pool import Pool
from flora_train.adapters.routed.blocks import FeedForwardBlock, feedforward_blocks
from flora_train.adapters.spec import AdapterSpec, Gate
from flora_train.adapters.targets import Target, linear_layers
from flora_train.config.errors import first_line, user_error
from flora_train.config.model_schema import ModelConfig
from flora_train.kernels.flora.cost_model import Work, choose_formulation
from flora_train.models.loading import build_model, disable_dropout, load_model_config
from flora_train.models.probe_inputs import feature_shape
from flora_train.models.speech_encoder import is_speech_model
from flora_train.training.fsdp import layers_of
from flora_train.training.planned_experts import ExpertShare, PlannedBlock
from flora_train.training.planned_layers import PlannedExperts, PlannedLinear


@dataclass(frozen=True)
class BatchShape:
    """The rows of a micro-batch."""

    rows: int
    tokens: int
    """Of one row."""
    window: int = 0
    """Encoder positions of one row; 0 for text."""

    @property
    def length(self) -> int:
        """Tokens and encoder positions of one row, which training.tokens_per_microbatch counts."""
        return self.tokens + self.window


@dataclass
class StepMemory:
    """Bytes that the forward of a micro-batch keeps, and its floating point operations."""

    batch: BatchShape
    kept: int = 0
    """By all layers and what is around them."""
    inputs: int = 0
    """Of the layers' inputs, which checkpointing keeps instead."""
    largest_layer: int = 0
    """Kept by the layer that keeps the most."""
    in_layers: int = 0
    """Kept by all layers."""
    flops: int = 0
    """Of the linear layers, fused experts and attention in one forward, without the output head."""

    def of_rows(self, rows: int, *, checkpointing: bool) -> int:
        """Bytes that a micro-batch of `rows` rows takes at most, from the forward to the end of the backward.

        The backward of a layer needs about as much as the layer keeps. With checkpointing, a layer is
        computed again before.
        """
        share = rows / self.batch.rows
        if checkpointing:
            outside = self.kept - self.in_layers
            return int(share * (outside + self.inputs + 2 * self.largest_layer))
        return int(share * (self.kept + self.largest_layer))


def dtype_on_gpu(config: ModelConfig) -> torch.dtype:
    """The dtype of the base on a GPU that multiplies bfloat16 fast, whatever this machine has."""
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def measure_shapes(config: ModelConfig, pools: Sequence[Pool], batch: BatchShape) -> StepMemory:
    """Run the model on tensors that have shapes and no data, in the dtype that it has on a GPU.

    Layers with adapters keep what the adapters' kernels keep. The methods are mixed in a micro-batch as the
    adapters are in the run. Raises UserError for an architecture that cannot run without data.
    """
    published = load_model_config(config)
    disable_dropout(published)
    try:
        memory = _measure(published, config, pools, batch, with_mask=True)
    except Exception:  # some architectures take masks of their own shape
        try:
            memory = _measure(published, config, pools, batch, with_mask=False)
        except Exception as error:
            hint = f"cannot be planned from its shapes ({type(error).__name__}: {first_line(error)})"
            raise user_error("model.path", config.path, hint) from error
    memory.flops += _attention_flops(published, batch)
    return memory


def _measure(
    published: Any, config: ModelConfig, pools: Sequence[Pool], batch: BatchShape, *, with_mask: bool
) -> StepMemory:
    """with_mask: of packed documents, which do not attend to each other."""
    with FakeTensorMode(), torch.enable_grad():
        model: Any = build_model(published, config, dtype=dtype_on_gpu(config))
        model.requires_grad_(False).eval()
        _replace_layers(model, pools, batch, keeps_inputs=config.quantization == "8bit")
        memory = StepMemory(batch)
        inputs = _inputs(model, batch)
        if not with_mask:
            inputs.pop("attention_mask", None)
        with _recorded(model, memory):
            model.base_model(**inputs, use_cache=False)
    return memory


def _inputs(model: Any, batch: BatchShape) -> dict[str, Tensor]:
    tokens = torch.zeros(batch.rows, batch.tokens, dtype=torch.long)
    if not is_speech_model(model.config):
        mask = torch.ones(batch.rows, 1, batch.tokens, batch.tokens, dtype=torch.bool)
        return {"input_ids": tokens, "attention_mask": mask}
    shape = feature_shape(model.config)
    assert shape is not None
    return {
        model.main_input_name: torch.zeros(batch.rows, *shape, dtype=model.dtype),
        "decoder_input_ids": tokens,
    }


def _replace_layers(model: Any, pools: Sequence[Pool], batch: BatchShape, *, keeps_inputs: bool) -> None:
    """keeps_inputs: a layer without adapters keeps its input, too, as bitsandbytes' 8-bit layers do."""
    adapters = sum(len(pool.specs) for pool in pools)
    available = linear_layers(model)
    for name, target in available.items():
        features: float | None = 0 if keeps_inputs else None
        for pool in pools:
            if name in pool.targets and pool.targets[name].block is None:
                share = len(pool.specs) / adapters
                kept = _kept_features(
                    pool.specs[0].at(name),
                    pool.targets[name],
                    batch.rows * batch.length,
                    segments=batch.rows,
                    dtype=model.dtype,
                )
                features = (features or 0) + share * kept
        parent, _, child = name.rpartition(".")
        layer = model.get_submodule(name)
        whole = None if features is None else round(features)
        setattr(model.get_submodule(parent), child, PlannedLinear(layer, target, whole))
    _replace_blocks(model, pools, batch, available)
    _replace_experts(model, pools, batch)


def _replace_blocks(
    model: Any, pools: Sequence[Pool], batch: BatchShape, available: Mapping[str, Target]
) -> None:
    """Part of the rows go through the experts of routed adapters."""
    adapters = sum(len(pool.specs) for pool in pools)
    shares = {id(pool): len(pool.specs) / adapters for pool in pools}
    for name, block in feedforward_blocks(model, available).items():
        routed = [pool for pool in pools if any(t.block == name for t in pool.targets.values())]
        if routed:
            layers = {layer: model.get_submodule(layer) for layer in block.layers}
            parts = [
                _expert_share(pool, block, batch, share=shares[id(pool)], dtype=model.dtype)
                for pool in routed
            ]
            PlannedBlock(model.get_submodule(name), block, layers, parts)


def _replace_experts(model: Any, pools: Sequence[Pool], batch: BatchShape) -> None:
    """An adapted weight keeps the inputs of its pairs of a token and an expert."""
    adapters = sum(len(pool.specs) for pool in pools)
    tokens = batch.rows * batch.length
    for name, layout in fused_experts(model).items():
        features = None
        for pool in pools:
            for part in layout.weights:
                target = pool.targets.get(f"{name}.{part}")
                if target is None:
                    continue
                spec = pool.specs[0].at(target.name)
                own = _kept_features(spec, target, tokens, segments=batch.rows, dtype=model.dtype)
                features = (features or 0) + (target.in_features + own) * len(pool.specs) / adapters
        whole = None if features is None else round(features)
        model.set_submodule(name, PlannedExperts(model.get_submodule(name), layout, whole))


def _expert_share(
    pool: Pool, block: FeedForwardBlock, batch: BatchShape, *, share: float, dtype: torch.dtype
) -> ExpertShare:
    """The rows that the adapters of a pool have in a block."""
    experts = pool.specs[0].experts
    assert experts is not None
    segments, tokens = batch.rows * experts.count, batch.rows * batch.length * experts.top_k
    features = {}
    for name in block.layers:
        target = pool.targets.get(name)
        if target is not None and target.block is not None:
            of_one = pool.specs[0].at(name)
            features[name] = _kept_features(of_one, target, tokens, segments=segments, dtype=dtype)
    return ExpertShare(pool, share, features)


def _kept_by_gate(spec: AdapterSpec, gate: Gate, target: Target) -> int:
    """Numbers that a layer with a gate keeps for a token: logits, probabilities and weights of all members,
    hidden features and weights of those of LoRA, and inputs and outputs of fLoRA members, pair by pair."""
    kept = 3 * len(gate.members)
    for stack in member_stacks(spec, target):
        if stack.kind == "lora":
            kept += 3 * len(stack.numbers) * stack.rank + target.out_features
        elif stack.kind == "flora":
            kept += gate.top_k * (target.in_features + target.out_features)
        else:
            kept += 2 * (target.in_features if stack.kind == "ia3_in" else target.out_features)
    return kept


def _kept_features(
    spec: AdapterSpec, target: Target, tokens: int, *, segments: int, dtype: torch.dtype
) -> int:
    """Numbers that an adapter's kernel keeps for a token, beside the layer's input."""
    if spec.gate is not None:
        return _kept_by_gate(spec, spec.gate, target)
    method = spec.layer_method
    if method == "lora":
        return spec.rank
    if method == "dora":
        return spec.rank + target.out_features
    if method == "ia3":
        return 0 if target.feedforward else target.out_features
    work = Work(
        rank=spec.rank,
        residual=bool(spec.offset),
        tokens=tokens,
        segments=segments,
        in_features=target.in_features,
        out_features=target.out_features,
        bytes_each=dtype.itemsize,
        split=dtype == torch.bfloat16,
        device="cuda",
    )
    if choose_formulation(work) != "rank_expanded":
        return 0
    return spec.rank * target.out_features


@dataclass
class _Record:
    """The storages that autograd keeps, each counted in the layer that keeps it first."""

    ignored: set[int]
    layer: int = -1
    sizes: dict[int, int] = field(default_factory=dict)
    """Layer (-1: outside) -> bytes."""
    seen: dict[int, Tensor] = field(default_factory=dict)
    """Key of a storage -> a tensor that keeps the key from being used again."""

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen and key not in self.ignored:
            self.seen[key] = tensor
            self.sizes[self.layer] = self.sizes.get(self.layer, 0) + storage.nbytes()
        return tensor


@contextmanager
def _recorded(model: nn.Module, memory: StepMemory) -> Iterator[None]:
    """Fill `memory` from what runs in the context."""
    record = _Record({parameter.untyped_storage()._cdata for parameter in model.parameters()})
    handles = []

    def enter(number: int) -> Any:
        def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record.layer = number
            hidden = args[0] if args else kwargs["hidden_states"]
            memory.inputs += hidden.numel() * hidden.element_size()

        return begin

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        record.layer = -1

    for number, layer in enumerate(layers_of(model)):
        handles.append(layer.register_forward_pre_hook(enter(number), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(record.pack, lambda tensor: tensor):
            yield
    finally:
        for handle in handles:
            handle.remove()
    planned = [layer for layer in model.modules() if isinstance(layer, PlannedLinear | PlannedExperts)]
    memory.flops = sum(layer.flops for layer in planned)
    memory.kept = sum(record.sizes.values())
    of_layers = {number: size for number, size in record.sizes.items() if number >= 0}
    memory.in_layers = sum(of_layers.values())
    memory.largest_layer = max(of_layers.values(), default=0)


def _attention_flops(published: Any, batch: BatchShape) -> int:
    """Of the products of queries with keys and of weights with values, in one forward."""
    text = published.get_text_config(decoder=True)
    if not batch.window:
        causal = batch.tokens**2 // 2
        return 4 * batch.rows * text.num_hidden_layers * text.hidden_size * causal
    encoder = published.encoder_layers * batch.window**2
    decoder = published.decoder_layers * batch.tokens * (batch.tokens // 2 + batch.window)
    return 4 * batch.rows * published.d_model * (encoder + decoder)
