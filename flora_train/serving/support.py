"""What happens where vLLM lacks what the plugin changes: fLoRA and IA3 are refused, and LoRA is left to vLLM
alone."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SUPPORTED = "0.32"
"""Versions of vLLM that are tested."""
OWN_TYPES = ("HIRA", "FLORA", "IA3")
"""PEFT types that vLLM does not know."""
ENGINES = (("vllm.v1.engine.async_llm", "AsyncLLM"), ("vllm.v1.engine.llm_engine", "LLMEngine"))
WAYS_IN = ("add_lora", "add_request")

_missing: list[str] = []


def report_missing(part: str, reason: str) -> None:
    """A part of the plugin cannot be installed."""
    _missing.append(reason)
    logger.warning("flora_train: %s is not installed: %s", part, unsupported_versions())


def unsupported_versions() -> str:
    """Why fLoRA and IA3 cannot be served here."""
    return f"it needs vLLM {SUPPORTED}, and this is another version ({'; '.join(_missing)})"


def install_refusal() -> None:
    """Let vLLM's engines refuse the types that vLLM does not know, before a request of them is queued."""
    for module, name in ENGINES:
        try:
            engine = getattr(import_module(module), name)
        except (ImportError, AttributeError):
            continue
        for way in WAYS_IN:
            method = getattr(engine, way, None)
            if method is not None:
                setattr(engine, way, _refusing(method))


def _refusing(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method of an engine, which first looks at the adapter among its arguments."""

    def check(values: tuple[Any, ...]) -> None:
        for value in values:
            path = getattr(value, "lora_path", None)
            if path is not None and (peft_type := type_of(Path(path))) in OWN_TYPES:
                raise ValueError(f"{path} is an adapter of type {peft_type}: {unsupported_versions()}")

    @functools.wraps(method)
    async def asynchronous(*args: Any, **kwargs: Any) -> Any:
        check((*args, *kwargs.values()))
        return await method(*args, **kwargs)

    @functools.wraps(method)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        check((*args, *kwargs.values()))
        return method(*args, **kwargs)

    return asynchronous if inspect.iscoroutinefunction(method) else synchronous


def type_of(folder: Path) -> str | None:
    """The PEFT type of an adapter's folder; None if it cannot be read."""
    try:
        content = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content.get("peft_type") if isinstance(content, dict) else None
