"""PEFT adapters of one type as equal adapters of another, and without ranks that are 0."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from flora_train.adapters.methods.flora import as_hira
from flora_train.adapters.peft_config import ADALORA_EPSILON, ANY_TYPE, SOME_LAYERS, PeftConfig
from flora_train.adapters.peft_tensors import PREFIX, SUFFIXES
from flora_train.adapters.targets import shortest_suffixes
from flora_train.config.json_format import JsonObject

PeftAdapter = tuple[PeftConfig, dict[str, Tensor]]
"""Content of adapter_config.json, and the tensors by PEFT's names."""


def flora_as_hira(config: PeftConfig, tensors: dict[str, Tensor]) -> PeftAdapter:
    """The HIRA that computes the same as this FLORA."""
    converted: dict[str, Tensor] = {}
    for name, A in tensors.items():
        if name.endswith("flora_A"):
            stem = name.removesuffix("flora_A")
            factors = as_hira(A, tensors[f"{stem}flora_B"], float(config.variant == "residual"))
            converted |= {f"{stem}{suffix}": tensor for suffix, tensor in factors.items()}
    assert config.rank is not None, "check_harmless requires it"
    more = int(config.variant == "pure")
    ranks: JsonObject = {pattern: rank + more for pattern, rank in config.rank_pattern.items()}
    dropout = config.options.get("flora_dropout", 0.0)
    own: JsonObject = {"peft_type": "HIRA", "r": config.rank + more, "rank_pattern": ranks}
    return PeftConfig({**_common_keys(config), **own, "hira_dropout": dropout}), converted


def as_lora(config: PeftConfig, tensors: dict[str, Tensor]) -> PeftAdapter:
    """The LORA that computes the same as this ADALORA, which adds alpha / (r + 1e-5) B (E * A) with E [r,
    1]."""
    rank = config.rank
    assert rank is not None, "check_harmless requires it"
    assert config.alpha is not None, "check_harmless requires it"
    converted: dict[str, Tensor] = {}
    for name, E in tensors.items():
        if name.endswith("lora_E"):
            stem = name.removesuffix("lora_E")
            A = tensors[f"{stem}lora_A"].double() * E.double() * (rank / (rank + ADALORA_EPSILON))
            converted |= {f"{stem}lora_A.weight": A.float(), f"{stem}lora_B.weight": tensors[f"{stem}lora_B"]}
    dropout = config.options.get("lora_dropout", 0.0)
    scale = {"r": rank, "lora_alpha": config.alpha, "lora_dropout": dropout}
    options = {**_common_keys(config), "peft_type": "LORA", **scale}
    trimmed, tensors = without_zero_ranks(PeftConfig(options), converted)
    return _with_one_scale(trimmed, config.alpha / rank), tensors


def _with_one_scale(config: PeftConfig, scale: float) -> PeftConfig:
    """The LORA with alphas that scale every module alike, whatever its rank."""
    alphas: JsonObject = {pattern: scale * rank for pattern, rank in config.rank_pattern.items()}
    assert config.rank is not None, "without_zero_ranks sets it"
    return PeftConfig({**config.options, "lora_alpha": scale * config.rank, "alpha_pattern": alphas})


def _common_keys(config: PeftConfig) -> JsonObject:
    """The keys that do not depend on the PEFT type."""
    return {name: value for name, value in config.options.items() if name in ANY_TYPE or name in SOME_LAYERS}


def without_zero_ranks(config: PeftConfig, tensors: Mapping[str, Tensor]) -> PeftAdapter:
    """The same adapter without the last ranks of a module that are 0 in both factors, with the ranks of its
    tensors in adapter_config.json.

    Exported HIRAs and ADALORAs have such ranks where the ranks differ between modules, because PEFT gives all
    modules of these types one rank.
    """
    down, up = SUFFIXES[config.peft_type][:2]
    rank_of: dict[str, int] = {}
    trimmed: dict[str, Tensor] = {}
    for name, A in tensors.items():
        if not name.endswith(f".{down}"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(f".{down}")
        B = tensors[f"{PREFIX}{module}.{up}"]
        used = (A.any(dim=1) | B.any(dim=0)).nonzero()
        rank = int(used.max()) + 1 if len(used) else len(A)
        rank_of[module] = rank
        trimmed |= {name: A[:rank], f"{PREFIX}{module}.{up}": B[:, :rank]}
    return PeftConfig({**config.options, **_ranks(rank_of)}), trimmed


def _ranks(rank_of: Mapping[str, int]) -> JsonObject:
    """The most frequent rank as `r`, and a rank_pattern of the others."""
    (rank, _), *others = Counter(rank_of.values()).most_common()
    pattern: JsonObject = {}
    for other, _ in others:
        modules = [module for module, its_rank in rank_of.items() if its_rank == other]
        pattern |= {re.escape(suffix): other for suffix in shortest_suffixes(rank_of, modules)}
    return {"r": rank, "rank_pattern": pattern}
