"""Memory of a run on GPUs that this machine does not have, and the settings with which it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

from flora_train.adapters.targets import linear_layers
from flora_train.config.schema import RunConfig
from flora_train.models.speech_encoder import is_speech_model
from flora_train.training.fsdp import largest_part
from flora_train.training.loss import CHUNK
from flora_train.training.step_memory import StepMemory, dtype_on_gpu

Quantization = Literal["none", "8bit", "4bit"]

QUANTIZED_BYTES = {"8bit": 1.0, "4bit": 0.5}
"""Bytes of a weight of a quantized linear layer."""
CONTEXT = 1.0e9
"""Bytes of CUDA, its libraries and compiled kernels on a GPU."""
FRAGMENTATION = 0.05
"""Share of what is allocated beside the base that the allocator cannot use."""
FULL_SPEED = 4096
"""Tokens of a micro-batch from which on a GPU is fully used: the speed of the hours was measured with as
many."""
PROMPT_TOKENS = 300
"""Of a prompt of MultiPL-E, with room to spare."""


@dataclass(frozen=True)
class GpuSetup:
    """GPUs that a run could have."""

    gigabytes: int
    """Of each GPU."""
    gpus: int = 1
    is_sharded: bool = False
    """Whether the GPUs share the base (model.fsdp), instead of holding all of it each."""
    quantization: Quantization = "none"

    @property
    def name(self) -> str:
        name = f"{self.gpus} x {self.gigabytes} GB"
        if self.is_sharded:
            name += ", fsdp"
        if self.quantization != "none":
            name += f", {self.quantization}"
        return name

    def overrides(self, config: RunConfig) -> list[str]:
        """Keys that the setup itself needs, and that the recipe does not have."""
        if self.is_sharded and not config.model.fsdp:
            return ["model.fsdp=true"]
        if self.quantization != config.model.quantization:
            return [f"model.quantization={self.quantization}"]
        return []


SETUPS = (GpuSetup(80), GpuSetup(24), GpuSetup(80, 2), GpuSetup(80, 8))
"""Text models are sharded over several GPUs; speech models have to be whole on each."""


@dataclass(frozen=True)
class Settings:
    """The keys of a recipe that decide how much memory activations take."""

    checkpointing: bool
    tokens_per_microbatch: int
    batch_rows: int

    @classmethod
    def of(cls, config: RunConfig) -> Settings:
        return cls(
            checkpointing=config.model.gradient_checkpointing != "off",
            tokens_per_microbatch=config.training.tokens_per_microbatch,
            batch_rows=config.evaluation.batch_rows,
        )

    def overrides(self, config: RunConfig) -> list[str]:
        """The keys that differ from the recipe."""
        before, keys = Settings.of(config), []
        if self.checkpointing != before.checkpointing:
            keys.append("model.gradient_checkpointing=non_reentrant")
        if self.tokens_per_microbatch != before.tokens_per_microbatch:
            keys.append(f"training.tokens_per_microbatch={self.tokens_per_microbatch}")
        if self.batch_rows != before.batch_rows:
            keys.append(f"evaluation.batch_rows={self.batch_rows}")
        return keys


@dataclass(frozen=True)
class GpuMemory:
    """Bytes on one GPU."""

    base: int
    whole_base: int
    """While texts are generated, a sharded base is whole on every GPU."""
    adapters: int
    """With gradients and moments, and the copies that a micro-batch uses."""
    activations: int
    """Of a training step."""
    generation: int
    """Keys and values of the texts that are generated, and reading their prompts."""

    @property
    def training(self) -> int:
        """The most that training takes."""
        return self._with_overhead(self.base, self.activations)

    @property
    def generating(self) -> int:
        """The most that generation takes; 0 if there is none."""
        return self._with_overhead(self.whole_base, self.generation) if self.generation else 0

    @property
    def total(self) -> int:
        return max(self.training, self.generating)

    def _with_overhead(self, base: int, working: int) -> int:
        return int(CONTEXT + base + (1 + FRAGMENTATION) * (self.adapters + working))


@dataclass(frozen=True)
class GpuPlan:
    """Memory of a run on one setup, as the recipe stands, and the settings with which it fits."""

    setup: GpuSetup
    memory: GpuMemory
    settings: Settings | None
    """The first that fit, of the recipe or changed; None: none do."""
    fitting: GpuMemory | None
    """Memory with `settings`."""

    @property
    def fits(self) -> bool:
        """As the recipe stands."""
        return self.memory.total <= self.setup.gigabytes * 1e9


@dataclass(frozen=True)
class Needs:
    """What does not depend on the GPUs."""

    config: RunConfig
    model: nn.Module
    """Without weights."""
    adapter_bytes: int
    gathered_bytes: int
    """Of the largest adapter's parameters: each that is in a micro-batch is copied for it."""
    step: StepMemory

    def plan(self, setup: GpuSetup) -> GpuPlan:
        """Settings that cost no time are tried before those that do: smaller micro-batches, then
        checkpointing."""
        now = Settings.of(self.config)
        memory, limit = self.memory(setup, now), setup.gigabytes * 1e9
        for settings in self._choices(now):
            fitting = self.memory(setup, settings)
            while fitting.generating > limit and settings.batch_rows > 1:
                settings = replace(settings, batch_rows=settings.batch_rows // 2)
                fitting = self.memory(setup, settings)
            if fitting.total <= limit:
                return GpuPlan(setup, memory, settings, fitting)
        return GpuPlan(setup, memory, None, None)

    def memory(self, setup: GpuSetup, settings: Settings) -> GpuMemory:
        whole = base_bytes(self.model, self._itemsize, setup.quantization)
        share = largest_part(self.model, setup.gpus) if setup.is_sharded else 1.0
        rows = max(1, settings.tokens_per_microbatch // self.step.batch.length)
        activations = self.step.of_rows(rows, checkpointing=settings.checkpointing)
        return GpuMemory(
            base=int(share * whole),
            whole_base=whole,
            adapters=self.adapter_bytes + rows * self.gathered_bytes,
            activations=activations + self._loss_bytes(rows) + self._weight_bytes(setup),
            generation=settings.batch_rows * self._bytes_of_a_text(),
        )

    @property
    def _itemsize(self) -> int:
        """Bytes of a value of the base."""
        return dtype_on_gpu(self.config.model).itemsize

    def _choices(self, now: Settings) -> Iterator[Settings]:
        length = self.step.batch.length
        sizes = []
        tokens = now.tokens_per_microbatch
        while tokens >= length:
            sizes.append(tokens)
            tokens //= 2
        sizes = sizes or [now.tokens_per_microbatch]
        fast = [size for size in sizes if size >= FULL_SPEED or size == sizes[0]]
        slow = [size for size in sizes if size not in fast]
        for checkpointing, choice in ((now.checkpointing, fast), (True, sizes), (now.checkpointing, slow)):
            for size in choice:
                yield replace(now, checkpointing=checkpointing, tokens_per_microbatch=size)

    def _loss_bytes(self, rows: int) -> int:
        """Of the hidden states before the output head, their gradient, and the logits of CHUNK tokens."""
        vocabulary, width = self._head()
        hidden = 2 * self._itemsize * rows * self.step.batch.tokens * width
        return hidden + CHUNK * vocabulary * (self._itemsize + 3 * 4)

    def _weight_bytes(self, setup: GpuSetup) -> int:
        """Of the largest weight that is dequantized."""
        if setup.quantization == "none":
            return 0
        targets = linear_layers(self.model).values()
        return self._itemsize * max(target.in_features * target.out_features for target in targets)

    def _bytes_of_a_text(self) -> int:
        """Keys and values of one text that is generated, and reading its prompt or encoding its clip."""
        model: Any = self.model
        evaluation, settings = self.config.evaluation, model.config.get_text_config(decoder=True)
        width = settings.hidden_size
        widest = max(target.out_features for target in linear_layers(model).values())
        if is_speech_model(model.config):
            read = self.step.batch.window
            states = 2 * model.config.decoder_layers * width
        elif evaluation.problems:
            read = PROMPT_TOKENS
            states = 2 * settings.num_hidden_layers * key_width(settings)
        else:
            return 0
        kept = self._itemsize * states * (read + evaluation.max_new_tokens)
        return kept + self._itemsize * read * (2 * widest + 6 * width)

    def _head(self) -> tuple[int, int]:
        """Vocabulary and width of the output head; of an encoder, which has none, no vocabulary."""
        model: Any = self.model
        if model.get_output_embeddings() is None:
            return 0, model.get_input_embeddings().weight.shape[1]
        vocabulary, width = model.get_output_embeddings().weight.shape
        return vocabulary, width


def key_width(settings: Any) -> int:
    """Numbers of the keys of one token in one layer."""
    heads: int = settings.num_attention_heads
    head_width = getattr(settings, "head_dim", None) or settings.hidden_size // heads
    if getattr(settings, "multi_query", False):
        return head_width
    return head_width * (getattr(settings, "num_key_value_heads", None) or heads)


def base_bytes(model: nn.Module, itemsize: int, quantization: str) -> int:
    """Of the base's parameters. Quantization leaves embeddings, norms and the output head as they are."""
    values = sum(parameter.numel() for parameter in model.parameters())
    if quantization == "none":
        return itemsize * values
    targets = linear_layers(model).values()
    quantized = sum(target.in_features * target.out_features for target in targets)
    return int(QUANTIZED_BYTES[quantization] * quantized + itemsize * (values - quantized))


def plan_gpus(needs: Needs) -> list[GpuPlan]:
    """A plan for each of SETUPS. A GPU that is too small for the base gets it in 8 bit."""
    plans = []
    is_text = not is_speech_model(needs.model.config)
    for setup in SETUPS:
        setup = replace(setup, is_sharded=is_text and setup.gpus > 1)
        if not setup.is_sharded and needs.config.model.quantization != "none":
            setup = replace(setup, quantization=needs.config.model.quantization)
        plan = needs.plan(setup)
        if plan.settings is None and not setup.is_sharded and setup.quantization == "none":
            plan = needs.plan(replace(setup, quantization="8bit"))
        plans.append(plan)
    return plans
