"""Who solves the problems? The base model, a run's adapters, and PEFT adapters that anybody trained."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_config import check_init, peft_type_of
from flora_train.adapters.peft_tensors import read_files
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import UserError, first_line, user_error
from flora_train.config.paths import find_file
from flora_train.config.schema import RunConfig


@dataclass(frozen=True)
class Contender:
    """name: in files; family: what it is compared as (base, a key of `adapters:`, or its own name); adapter: id in the bank;
    languages: it solves problems in these; sha: of its numbers, "" for the base."""

    name: str
    family: str
    adapter: int
    languages: tuple[str, ...]
    sha: str


Route = Callable[[Sequence[int]], AbstractContextManager[Any]]


def languages_of(config: RunConfig) -> dict[str, str]:
    """Task -> programming language, of the tasks that name one and that some adapter learns."""
    learnt = {task for adapter in config.adapters.values() for task in adapter.tasks or config.tasks}
    return {name: task.language for name, task in config.tasks.items() if task.language is not None and name in learnt}


def contenders_of(config: RunConfig, bank: AdapterBank, languages: Sequence[str]) -> list[Contender]:
    """The base model in all of these languages, and every adapter whose task is in one of them."""
    language_of = languages_of(config)
    found = [Contender("base", "base", BASE_ID, tuple(languages), "")]
    for adapter, spec in enumerate(bank.specs):
        if (language := language_of.get(spec.task)) in languages:
            found.append(Contender(spec.name, spec.family, adapter, (str(language),), bank.digest(adapter)))
    return found


def check_peft_contenders(sources: Sequence[str], taken: Sequence[str]) -> None:
    """Raises UserError for a source that holds no PEFT adapter, or whose name (its last part) another contender has."""
    from peft import PeftConfig

    names = [Path(source).name for source in sources]
    for source, name in zip(sources, names, strict=True):
        if name in taken or names.count(name) > 1:
            raise user_error("contenders", source, f"the name {name!r} is taken by another contender: rename its folder")
        written, _ = read_files(source, "contenders")
        if peft_type_of(written) == "LORA":
            check_init(written, source, "contenders")
        try:
            config = PeftConfig.from_pretrained(_place(source))
        except Exception as error:  # PEFT and the hub's client each have their own
            raise user_error(
                "contenders", source, f"is no PEFT adapter, in a folder or on the hub: {first_line(error)}"
            ) from error
        if config.is_prompt_learning:
            raise user_error(
                "contenders", source, f"{config.peft_type} puts tokens before every prompt: only adapters of layers take part"
            )


@contextmanager
def peft_contender(
    source: str, load_base: Callable[[], nn.Module], languages: Sequence[str]
) -> Iterator[tuple[Contender, nn.Module, Route]]:
    """A PEFT adapter of layers (LoRA, IA3, HiRA, ...), from a folder or the hub, on a base model of its own: some kinds change the base model
    when they are loaded, and no kind is sure to leave it as it was.

    Raises UserError if it does not fit the base model, or if some of its tensors would have no effect there.
    """
    from peft.utils import get_peft_model_state_dict

    name = Path(source).name
    gc.collect()  # a PEFT model is a cycle: without this, the base of an earlier contender takes memory still
    model = _load(source, load_base())
    digest = sha256()
    for key, tensor in sorted(get_peft_model_state_dict(model, save_embedding_layers=False).items()):
        digest.update(key.encode() + tensor.detach().cpu().float().numpy().tobytes())
    yield Contender(name, name, BASE_ID, tuple(languages), digest.hexdigest()), model, lambda adapters: nullcontext()


def check_fit(sources: Sequence[str], load_base: Callable[[], nn.Module]) -> None:
    """Raises UserError for the first of these PEFT adapters that cannot be loaded onto the base model, or that cannot run there: before any of
    them writes anything."""
    for source in sources:
        gc.collect()  # nothing refers to the model before, and its base is freed before the next is loaded
        _check_runs(_load(source, load_base()), source)


def _check_runs(model: Any, source: str) -> None:
    tokens = torch.ones((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad():
            finite = bool(model(input_ids=tokens).logits.isfinite().all())
    except Exception as error:  # whatever the adapter's kind needs beside tokens
        raise user_error("contenders", source, f"does not run on tokens alone: {first_line(error)}") from error
    if not finite:
        raise user_error("contenders", source, "computes numbers that are not finite on this base model")


def _load(source: str, base: nn.Module) -> Any:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(base, _place(source))
        _check_every_tensor_counts(model, source, [str(warning.message) for warning in heard])
    except UserError:
        raise
    except Exception as error:  # PEFT, safetensors, torch and the hub's client each have their own
        raise user_error("contenders", source, f"does not fit this base model: {first_line(error)}") from error
    return model


def _place(source: str) -> str:
    """The folder, or the name on the hub."""
    local = find_file(source)
    return str(local) if local.exists() else source


def _check_every_tensor_counts(model: Any, source: str, warned: Sequence[str]) -> None:
    """Raises UserError where PEFT left tensors of the file out, or found none for a layer: it only warns then, or says nothing."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    hint = "does not fit this base model: PEFT would leave its tensors out"
    tensors = load_peft_weights(_place(source), device=str(next(model.parameters()).device))
    if left_out := set_peft_model_state_dict(model, tensors).unexpected_keys:
        raise user_error("contenders", source, f"{hint}, {left_out[0]} for one")
    if any("missing adapter keys" in text for text in warned):
        raise user_error("contenders", source, hint)
