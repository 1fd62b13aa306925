"""Adapters of PiSSA, OLoRA, CorDA and LoRA-GA as plain LORAs of the original base model.

These initialisations subtract the initial update s B0 A0 from the base's weight, so that s B A is relative to
the remainder. On the original base the adapter is s (B A - B0 A0): a LORA of twice the rank.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flora_train.adapters.peft_config import CONFIG, REPEATABLE_INITS, PeftConfig
from flora_train.adapters.peft_equivalents import PeftAdapter
from flora_train.adapters.peft_tensors import PREFIX, read_files
from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import JsonObject
from flora_train.models.hub_files import adapter_folder
from flora_train.runtime.progress import ProgressBar

DOWN, UP = ".lora_A.weight", ".lora_B.weight"

WeightOf = Callable[[str], Tensor]
"""Module -> its frozen weight [out, in]."""


def plain_config(config: PeftConfig) -> PeftConfig:
    """The configuration of the plain LORA: twice the rank, with the same factor of B A in every module."""
    if config.subtracted_init is None:
        return config
    assert config.rank is not None, "check_harmless requires it"
    assert config.alpha is not None, "check_harmless requires it"
    factor = 2**0.5 if config.rslora else 2.0
    ranks: JsonObject = {pattern: 2 * rank for pattern, rank in config.rank_pattern.items()}
    alphas: JsonObject = {pattern: factor * alpha for pattern, alpha in config.alpha_pattern.items()}
    sizes: JsonObject = {"r": 2 * config.rank, "lora_alpha": factor * config.alpha}
    patterns: JsonObject = {"rank_pattern": ranks, "alpha_pattern": alphas}
    return PeftConfig({**config.options, **sizes, **patterns, "init_lora_weights": True})


def find_initial(config: PeftConfig, source: str, key: str) -> PeftAdapter | None:
    """The initial adapter that was saved beside a PiSSA or similar; None if it is not there and not needed.

    Raises UserError where it is needed and missing, or is not the initial state of this adapter.
    """
    method = config.subtracted_init
    if method is None:
        return None
    folder = adapter_folder(source)
    names = [folder / f"{method}_init", folder.parent / f"{method}_init"]
    found = next((path for path in names if (path / CONFIG).is_file()), None)
    if found is not None:
        return _read_initial(config, found, source, key=key)
    init = config.options["init_lora_weights"]
    if init in REPEATABLE_INITS:
        return None
    hint = (
        f"has init_lora_weights={init!r} in {CONFIG}: its tensors are relative to a base model that random "
        f"numbers or data have changed. Put its initial adapter, as saved before training, into {names[0]}, "
        "or save it again with PEFT's save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
    )
    raise user_error(key, source, hint)


def _read_initial(config: PeftConfig, folder: Path, source: str, *, key: str) -> PeftAdapter:
    try:
        initial, tensors = read_files(str(folder), key)
    except UserError as error:
        raise user_error(key, source, f"has an initial adapter that cannot be read: {error}") from error
    modules = [
        name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in tensors if "lora_A" in name
    ]
    fits = (
        initial.peft_type == "LORA"
        and initial.rank is not None
        and initial.alpha is not None
        and modules
        and all(initial.rank_at(module) == config.rank_at(module) for module in modules)
        and all(abs(initial.scale_at(module) - config.scale_at(module)) < 1e-9 for module in modules)
    )
    if not fits:
        hint = f"does not begin as {folder}, whose layers, ranks or alphas differ: replace that folder"
        raise user_error(key, source, hint)
    return initial, tensors


@torch.no_grad()
def on_original_base(
    adapter: PeftAdapter, weight_of: WeightOf, *, initial: PeftAdapter | None, source: str, key: str
) -> PeftAdapter:
    """The LORA (or DoRA) that computes on the original base what a PiSSA or similar computes on its changed
    one; other adapters unchanged.

    Without an initial adapter, it is computed from the base's weights. Raises UserError where a tensor does
    not fit them. Collective, if the base model is sharded.
    """
    config, tensors = adapter
    if config.subtracted_init is None:
        return adapter
    converted = dict(tensors)
    names = [name for name in tensors if name.endswith(DOWN)]
    progress = ProgressBar(f"initial {config.subtracted_init} of {Path(source).name}", len(names))
    with progress:
        for done, name in enumerate(names, start=1):
            other = f"{name.removesuffix(DOWN)}{UP}"
            A, B = tensors[name].float(), tensors[other].float()
            if initial is not None:
                A0, B0 = initial[1].get(name), initial[1].get(other)
            else:
                B0, A0 = _initial_factors(config, _module_of(name), weight_of(_module_of(name)))
            if A0 is None or B0 is None or A0.shape != A.shape or B0.shape != B.shape:
                hint = f"{name} has shape {tuple(A.shape)}, which its initial adapter has not: "
                raise user_error(key, source, f"{hint}the base model differs")
            converted[name] = torch.cat([A, A0.to(A)])
            converted[other] = torch.cat([B, -B0.to(B)], dim=1)
            progress.update(done)
    return plain_config(config), converted


def _module_of(name: str) -> str:
    return name.removeprefix(PREFIX).removesuffix(DOWN)


def _initial_factors(config: PeftConfig, module: str, weight: Tensor) -> tuple[Tensor, Tensor]:
    """B0 and A0 that PEFT's initialisation computes from the weight [out, in], but for the division of the
    product between them."""
    rank = config.rank_at(module)
    assert rank is not None, "check_harmless requires it"
    wide = weight.detach().float()
    if config.subtracted_init == "olora":
        Q, R = torch.linalg.qr(wide)
        return Q[:, :rank], R[:rank]
    U, S, V = torch.linalg.svd(wide, full_matrices=False)
    root = (S[:rank] / config.scale_at(module)).sqrt()
    return U[:, :rank] * root, root[:, None] * V[:rank]
