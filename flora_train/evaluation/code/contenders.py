"""Contenders that solve problems: the base model, a run's adapters, and other PEFT adapters."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_config import check_init
from flora_train.adapters.peft_tensors import read_files
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.schema import RunConfig
from flora_train.models.hub_files import adapter_folder


@dataclass(frozen=True)
class Contender:
    """A model that solves problems."""

    name: str
    """Its name in files."""
    family: str
    """What it is compared as: base, a key of `adapters:`, or its own name."""
    adapter: int
    """Its id in the bank."""
    languages: tuple[str, ...]
    """The languages in which it solves problems."""
    sha: str
    """SHA-256 of its weights; empty for the base model."""


Route = Callable[[Sequence[int]], AbstractContextManager[Any]]
"""Adapter ids of a batch's rows -> a context in which the model applies them."""


def learnt_tasks(config: RunConfig) -> set[str]:
    """The tasks that some adapter learns."""
    learnt: set[str] = set()
    for adapter in config.adapters.values():
        learnt.update(adapter.tasks or config.tasks)
    return learnt


def languages_of(config: RunConfig) -> dict[str, str]:
    """Task -> programming language, for tasks that have one and that some adapter learns."""
    learnt = learnt_tasks(config)
    return {
        name: task.language
        for name, task in config.tasks.items()
        if task.language is not None and name in learnt
    }


def contenders_of(config: RunConfig, bank: AdapterBank, languages: Sequence[str]) -> list[Contender]:
    """The base model in all of these languages, and every adapter whose task is in one of them."""
    language_of = languages_of(config)
    contenders = [Contender("base", "base", BASE_ID, tuple(languages), "")]
    for adapter, spec in enumerate(bank.specs):
        language = language_of.get(spec.task)
        if language is not None and language in languages:
            contenders.append(Contender(spec.name, spec.family, adapter, (language,), bank.digest(adapter)))
    return contenders


def check_peft_contenders(sources: Sequence[str], used_names: Collection[str]) -> None:
    """Raises UserError for a source without a PEFT adapter, or whose name (its last part) another contender
    has.
    """
    from peft import PeftConfig

    names = [Path(source).name for source in sources]
    for source, name in zip(sources, names, strict=True):
        if name in used_names or names.count(name) > 1:
            raise user_error(
                "contenders", source, f"another contender has the name {name!r}: rename its folder"
            )
        written, _ = read_files(source, "contenders")
        if written.peft_type == "LORA":
            check_init(written, source, "contenders")
        try:
            config = PeftConfig.from_pretrained(str(adapter_folder(source)))
        except Exception as error:  # PEFT and the hub's client have their own types
            hint = f"is not a PEFT adapter in a folder or on the hub: {first_line(error)}"
            raise user_error("contenders", source, hint) from error
        if config.is_prompt_learning:
            hint = (
                f"{config.peft_type} adds tokens to every prompt: only adapters of layers can be contenders"
            )
            raise user_error("contenders", source, hint)


@contextmanager
def peft_contender(
    source: str, load_base: Callable[[], nn.Module], languages: Sequence[str]
) -> Iterator[tuple[Contender, nn.Module, Route]]:
    """A PEFT adapter of layers (LoRA, IA3, HiRA, ...), from a folder or the hub, on its own base model.

    Some PEFT methods change the base model when they are loaded, and it may not be restored afterwards.
    Raises UserError if the adapter does not fit the base model, or if some of its tensors would be ignored.
    """
    from peft.utils import get_peft_model_state_dict

    name = Path(source).name
    gc.collect()  # PEFT models contain reference cycles: this frees the base model of an earlier contender
    model = _load(source, load_base())
    digest = sha256()
    for key, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
        digest.update(key.encode() + tensor.detach().cpu().float().numpy().tobytes())
    contender = Contender(name, name, BASE_ID, tuple(languages), digest.hexdigest())
    yield contender, model, lambda adapters: nullcontext()


def check_fit(sources: Sequence[str], load_base: Callable[[], nn.Module]) -> None:
    """Load and run each PEFT adapter, before anything is generated.

    Raises UserError for the first that fails.
    """
    for source in sources:
        gc.collect()  # frees the previous model before the next base model is loaded
        _check_runs(_load(source, load_base()), source)


def _check_runs(model: Any, source: str) -> None:
    tokens = torch.ones((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            finite = bool(model(input_ids=tokens).logits.isfinite().all())
    except Exception as error:  # for methods that need more inputs than tokens
        raise user_error(
            "contenders", source, f"does not run on tokens alone: {first_line(error)}"
        ) from error
    if not finite:
        raise user_error("contenders", source, "computes logits that are not finite on this base model")


def _load(source: str, base: nn.Module) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, str(adapter_folder(source)))
        _check_all_tensors_used(model, source, [str(warning.message) for warning in caught])
    except UserError:
        raise
    except Exception as error:  # PEFT, safetensors, torch and the hub's client have their own types
        hint = f"does not fit this base model: {first_line(error)}"
        raise user_error("contenders", source, hint) from error
    return model


def _check_all_tensors_used(model: Any, source: str, warned: Sequence[str]) -> None:
    """Raises UserError if PEFT ignored tensors of the file or found none for a layer, as it warns at most."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    hint = "does not fit this base model: PEFT would ignore tensors"
    tensors = load_peft_weights(str(adapter_folder(source)), device=str(next(model.parameters()).device))
    if ignored := set_peft_model_state_dict(model, tensors).unexpected_keys:
        raise user_error("contenders", source, f"{hint}, such as {ignored[0]}")
    if any("missing adapter keys" in text for text in warned):
        raise user_error("contenders", source, hint)
