"""Who solves the problems? The base model, a run's adapters, and PEFT adapters that anybody trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import fail, first_line
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
            raise fail("contenders", source, f"the name {name!r} is taken by another contender: rename its folder")
        try:
            config = PeftConfig.from_pretrained(source)
        except Exception as error:  # PEFT and the hub's client each have their own
            raise fail("contenders", source, f"is no PEFT adapter, in a folder or on the hub: {first_line(error)}") from error
        if config.is_prompt_learning:
            raise fail(
                "contenders", source, f"{config.peft_type} puts tokens before every prompt: only adapters of layers take part"
            )


@contextmanager
def peft_contender(source: str, base: nn.Module, languages: Sequence[str]) -> Iterator[tuple[Contender, nn.Module, Route]]:
    """A PEFT adapter of layers (LoRA, IA3, HiRA, ...), from a folder or the hub, on a plain base model; afterwards it is bare again.

    Raises UserError if it does not fit the base model.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    name = Path(source).name
    try:
        model = PeftModel.from_pretrained(base, source)
    except Exception as error:  # PEFT, safetensors, torch and the hub's client each have their own
        raise fail("contenders", source, f"does not fit this base model: {first_line(error)}") from error
    digest = sha256()
    for key, tensor in sorted(get_peft_model_state_dict(model).items()):
        digest.update(key.encode() + tensor.detach().cpu().float().numpy().tobytes())
    try:
        yield Contender(name, name, BASE_ID, tuple(languages), digest.hexdigest()), model, lambda adapters: nullcontext()
    finally:
        model.unload()
