"""Admits adapters to vLLM: whatever the way in, an adapter is copied, checked and loaded before a request of
it is queued.

A bad adapter is refused with its reason, and the engine lives on. Requests that run keep the content with
which they began, whatever happens to the folder.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from flora_train.config.errors import UserError
from flora_train.serving.base_match import ServedBase, check_base
from flora_train.serving.served_adapters import AdapterKey, ServedAdapter, ServedAdapters
from flora_train.serving.snapshots import SnapshotStore

logger = logging.getLogger(__name__)

INSTALLED = "_flora_train_admission"
"""Attribute of an engine class that is patched, and of an engine with its Admission."""
REFUSALS: ContextVar[list[str] | None] = ContextVar("refusals", default=None)
"""Reasons of refusals, for the answer to the HTTP request of the same task."""
WRAPPED = (
    re.compile(r"^Call to \w+ method failed: (?P<reason>.*)$", re.DOTALL),
    re.compile(r"^Worker failed with error '(?P<reason>.*)', please check the stack trace.*$", re.DOTALL),
)
"""What vLLM's processes put around the message of an error."""


def install() -> None:
    """Patch vLLM's engines and its list of served models. A second call changes nothing."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.llm_engine import LLMEngine

    from flora_train.serving import admission_patches

    admission_patches.patch_engine(AsyncLLM, admission_patches.async_patches)
    admission_patches.patch_engine(LLMEngine, admission_patches.sync_patches)
    admission_patches.patch_core(EngineCore)
    admission_patches.patch_models(OpenAIServingModels)


def check_seams() -> None:
    """Raises ImportError or TypeError where vLLM lacks what is patched or called."""
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve import create_error_response  # noqa: F401
    from vllm.exceptions import LoRAAdapterNotFoundError, VLLMValidationError  # noqa: F401
    from vllm.lora.request import LoRARequest
    from vllm.lora.utils import get_adapter_absolute_path  # noqa: F401
    from vllm.v1.engine import EngineCoreRequest  # noqa: F401
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.exceptions import EngineDeadError  # noqa: F401
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.executor.abstract import Executor

    expected: list[tuple[Any, str, tuple[str, ...]]] = [
        (OpenAIServingModels, "load_lora_adapter", ("request",)),
        (OpenAIServingModels, "unload_lora_adapter", ("request",)),
        (OpenAIServingModels, "resolve_lora", ("lora_name",)),
        (EngineCore, "add_lora", ("lora_request",)),
        (Executor, "collective_rpc", ("method", "args")),
        (LoRARequest, "__init__", ("lora_name", "lora_int_id", "lora_path", "load_inplace")),
    ]
    for engine in (AsyncLLM, LLMEngine):
        expected += [
            (engine, "add_request", ("request_id", "prompt", "lora_request")),
            (engine, "add_lora", ("lora_request",)),
            *((engine, name, ("lora_id",)) for name in ("remove_lora", "pin_lora")),
            (engine, "list_loras", ()),
        ]
    missing = [
        f"{owner.__name__}.{name}" for owner, name, names in expected if not _takes(owner, name, names)
    ]
    if missing:
        raise TypeError(f"it has no {', '.join(missing)} as it is patched here")


def _takes(owner: Any, name: str, parameters: tuple[str, ...]) -> bool:
    """Whether a class has a method with these parameters."""
    method = getattr(owner, name, None)
    if method is None:
        return False
    target = owner if name == "__init__" else method
    try:
        return set(parameters) <= set(inspect.signature(target).parameters)
    except (TypeError, ValueError):
        return False


class Admission:
    """The adapters that one engine serves."""

    def __init__(self, engine: Any) -> None:
        """Raises UserError if no folder for copies can be made."""
        config = engine.vllm_config.model_config
        self.base = ServedBase(str(config.model), config.revision)
        self.adapters = ServedAdapters(SnapshotStore())
        self.locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._engine = weakref.ref(engine)

    def current(self, request: Any) -> ServedAdapter | None:
        """What an admitted adapter is served as; None for one that has to be admitted (again)."""
        served = self.adapters.get(_key(request))
        if served is not None and request.load_inplace and served.source_has_changed:
            return None
        return served

    def prepare(self, request: Any) -> ServedAdapter:
        """Copy and check the adapter of a LoRARequest. Raises errors of vLLM's kind."""
        from vllm.exceptions import LoRAAdapterNotFoundError
        from vllm.lora.utils import get_adapter_absolute_path

        source = Path(get_adapter_absolute_path(request.lora_path))
        if not _exists(source):
            raise LoRAAdapterNotFoundError(request.lora_name, request.lora_path)
        try:
            served = self.adapters.copy(_key(request), source, salt=str(request.is_3d_lora_weight))
            warning = check_base(Path(served.path), self.base, request.lora_name)
        except UserError as error:
            raise refused(str(error)) from error
        if warning is not None:
            logger.warning(warning)
        return served

    def failure(self, error: Exception, request: Any, served: ServedAdapter) -> Exception:
        """The error for the client, made from one that the engine raised when it loaded the adapter."""
        from vllm.exceptions import LoRAAdapterNotFoundError
        from vllm.v1.engine.exceptions import EngineDeadError

        if isinstance(error, EngineDeadError | LoRAAdapterNotFoundError):
            return error
        reason = str(error)
        for pattern in WRAPPED:
            match = pattern.match(reason)
            if match is not None:
                reason = match["reason"]
        reason = reason.replace(served.path, request.lora_path).replace(served.name, request.lora_name)
        return refused(reason)

    def running(self) -> Iterator[str]:
        """The paths of the adapters of unfinished requests."""
        engine = self._engine()
        if engine is None:
            return
        for state in list(engine.output_processor.request_states.values()):
            if state.lora_request is not None:
                yield state.lora_request.lora_path

    def admit(self, request: Any, served: ServedAdapter) -> None:
        """Serve the adapter from now on, and delete copies that are no longer needed."""
        self.adapters.admit(_key(request), served)
        self.adapters.delete_unneeded(self.running())


def refused(reason: str) -> Exception:
    """An error that vLLM answers with status 400."""
    from vllm.exceptions import VLLMValidationError

    refusals = REFUSALS.get()
    if refusals is not None:
        refusals.append(reason)
    return VLLMValidationError(reason)


def admission_of(engine: Any) -> Admission:
    """The engine's adapters. Raises an error of vLLM's kind if they cannot be copied."""
    admission: Admission | None = vars(engine).get(INSTALLED)
    if admission is None:
        try:
            admission = Admission(engine)
        except UserError as error:
            raise refused(str(error)) from error
        setattr(engine, INSTALLED, admission)
    return admission


def _key(request: Any) -> AdapterKey:
    return AdapterKey(request.lora_name, request.lora_int_id, request.lora_path)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no file has such a name
        return False


def engine_request(request: Any, served: ServedAdapter) -> Any:
    """The LoRARequest that the engine gets."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(
        lora_name=served.name,
        lora_int_id=served.int_id,
        lora_path=served.path,
        base_model_name=request.base_model_name,
        is_3d_lora_weight=request.is_3d_lora_weight,
    )
