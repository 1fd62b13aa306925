"""Which adapters can be exported in which form."""

from __future__ import annotations

from collections.abc import Sequence

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.export.mixlora_format import check_settings

UNROUTED = ("merged", "lora-svd")
"""Forms that no routed adapter has."""
ROUTES = "a router chooses the experts of each token, so that no single change of the weights is equal to it"
LANGUAGE_MODELS = "has a head: --as lora-svd writes adapters of language models; --as peft writes all"


def check_forms(specs: Sequence[AdapterSpec], names: Sequence[str], as_: str) -> None:
    """Raises UserError, before anything is loaded, for an adapter that cannot be written so, and for a run
    without one that can.

    specs: all adapters of the run; names: those to export, or none for all. Unknown names are left to others.
    """
    by_name = {spec.name: spec for spec in specs}
    chosen = [by_name[name] for name in names if name in by_name]
    for spec in chosen:
        _check(spec, as_)
    if names or possible_names(specs, as_):
        return
    if all(spec.is_routed for spec in specs) and as_ in UNROUTED:
        raise user_error(
            "as", as_, f"all adapters of the run are routed: {ROUTES}; --as peft writes their parts"
        )
    if as_ == "lora-svd":
        hint = "writes adapters of language models without target_parameters, and all adapters of the run "
        hint += "have those, or heads: use peft"
        raise user_error("as", as_, hint)
    if as_ in ("flora", "mixlora"):
        raise user_error("as", as_, f"the run has no adapter of method {as_}: use peft")


def possible_names(specs: Sequence[AdapterSpec], as_: str) -> list[str]:
    """The adapters that are exported in this form where none is named."""
    possible = list(specs)
    if as_ in ("flora", "mixlora"):
        possible = [spec for spec in possible if spec.method == as_]
    if as_ in UNROUTED:
        possible = [spec for spec in possible if not spec.is_routed]
    if as_ == "lora-svd":
        possible = [spec for spec in possible if spec.head is None and not spec.target_parameters]
    return [spec.name for spec in possible]


def _check(spec: AdapterSpec, as_: str) -> None:
    """Raises UserError for an adapter that cannot be written so."""
    if as_ in UNROUTED and spec.is_routed:
        raise user_error("adapter", spec.name, f"is {spec.method}: {ROUTES}; --as peft writes its parts")
    if as_ == "lora-svd" and spec.head is not None:
        raise user_error("adapter", spec.name, LANGUAGE_MODELS)
    if as_ == "lora-svd" and spec.target_parameters:
        hint = "has target_parameters, on which no closest LoRA is computed: --as peft or --as merged"
        raise user_error("adapter", spec.name, hint)
    if as_ == "flora" and spec.method != "flora":
        hint = f"is {spec.method}: --as flora writes fLoRA only; --as peft writes all methods"
        raise user_error("adapter", spec.name, hint)
    if as_ == "mixlora":
        check_settings(spec)
