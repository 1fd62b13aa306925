"""Checks an adapter against the layers of the served model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from flora_train.config.errors import user_error
from flora_train.serving.adapter_files import KEY, LoraFolder
from flora_train.serving.multipliers import MultiplicativeAdapter, Multiplier

RANK_LIMITS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM accepts as max_lora_rank."""
LayerKind = Literal["linear", "embedding", "head", "experts"]
OTHERS: Mapping[LayerKind, str] = {
    "embedding": "an embedding",
    "head": "the output layer",
    "experts": "a layer of experts",
}
"""Kind of a layer that multiplicative adapters cannot be served on -> its description."""


@dataclass(frozen=True)
class LayerFacts:
    """What an adapter's layer must agree with: a module of the served model, as transformers names it."""

    inputs: int
    """Of the whole layer: not of the part that one process holds, and of q_proj, not of qkv_proj."""
    outputs: int
    kind: LayerKind = "linear"
    obstacle: str | None = None
    """Why a product with this layer's weight cannot be exact, such as a quantised weight that no method of
    vLLM applies to changed inputs."""
    bias_is_added_later: bool = False
    """Whether the layer has a bias that the model adds itself, so that an IA3 cannot scale it."""


def check_fits(
    adapter: LoraFolder | MultiplicativeAdapter,
    layers: Mapping[str, LayerFacts],
    *,
    max_rank: int,
    source: str,
    ignored_prefixes: Iterable[str] = (),
) -> None:
    """Raises UserError, naming `source`, unless the adapter can be served exactly on these layers.

    ignored_prefixes: modules that vLLM leaves out on purpose, such as those of multi-token prediction.
    """
    if adapter.rank > max_rank:
        raise _refused(
            source, f"has rank {adapter.rank}, and the limit is {max_rank}: {_rank_hint(adapter.rank)}"
        )
    sizes: dict[str, tuple[int | None, int | None]]
    if isinstance(adapter, LoraFolder):
        sizes = {name: (shapes.inputs, shapes.outputs) for name, shapes in adapter.layers.items()}
    else:
        sizes = {name: _sizes(multiplier) for name, multiplier in adapter.multipliers.items()}
    ignored = tuple(ignored_prefixes)
    for name, (inputs, outputs) in sizes.items():
        if any(name.startswith(prefix) or f".{prefix}" in name for prefix in ignored):
            continue
        facts = layers.get(name)
        if facts is None:
            raise _refused(source, _missing(name, sizes, layers))
        if isinstance(adapter, MultiplicativeAdapter):
            _check_product(name, adapter.multipliers[name], facts, source=source)
        if inputs not in (None, facts.inputs) or outputs not in (None, facts.outputs):
            given = f"{outputs or 'any'} x {inputs or 'any'}"
            hint = f"adapts {name} as {given}, and here it is {facts.outputs} x {facts.inputs}"
            raise _refused(source, f"{hint}: it belongs to another base model")


def _sizes(multiplier: Multiplier) -> tuple[int | None, int | None]:
    """Inputs and outputs of the layer, None where the adapter's factor is one number for all."""
    inputs, outputs = multiplier.A.shape[1], multiplier.B.shape[0]
    if multiplier.scales_output:
        return None, outputs
    if outputs == 1:
        return inputs, None
    return inputs, outputs


def _check_product(name: str, multiplier: Multiplier, facts: LayerFacts, *, source: str) -> None:
    if facts.kind != "linear":
        hint = f"adapts {name}, {OTHERS[facts.kind]}: fLoRA and IA3 are served on linear layers only"
        raise _refused(source, f"{hint}; serve it as a model (flora-train export RUN --as merged)")
    if facts.obstacle is not None:
        hint = f"adapts {name}, which {facts.obstacle}: serve the base model in another format"
        raise _refused(source, hint)
    if multiplier.scales_output and facts.bias_is_added_later:
        hint = f"scales the output of {name}, whose bias vLLM adds elsewhere, so that it would not be scaled"
        raise _refused(source, f"{hint}: serve it as a model (flora-train export RUN --as merged)")


def _missing(name: str, names: Iterable[str], layers: Mapping[str, LayerFacts]) -> str:
    if "experts" in name.split("."):
        hint = f"adapts {name}, a layer of experts: fLoRA and IA3 are served on linear layers only"
        return f"{hint}; serve it as a model (flora-train export RUN --as merged)"
    total = list(names)
    missing = [other for other in total if other not in layers]
    hint = f"adapts {name}, which the served model lacks ({len(missing)} of {len(total)} layers are missing)"
    return f"{hint}: it belongs to another base model"


def _rank_hint(rank: int) -> str:
    limit = next((limit for limit in RANK_LIMITS if limit >= rank), None)
    if limit is None:
        return f"vLLM serves ranks up to {RANK_LIMITS[-1]}"
    return f"start vLLM with --max-lora-rank {limit}"


def _refused(source: str, hint: str) -> Exception:
    return user_error(KEY, source, hint)
