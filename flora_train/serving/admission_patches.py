"""The patched methods of vLLM's engines and of its list of served models: what `Admission` does, in order."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any

from flora_train.serving.admission import INSTALLED, REFUSALS, admission_of, engine_request
from flora_train.serving.served_adapters import ServedAdapter

logger = logging.getLogger(__name__)

METHODS = ("add_request", "add_lora", "remove_lora", "list_loras", "pin_lora")
"""What is patched in an engine."""


def _adapter_of(engine: Any, arguments: dict[str, Any]) -> Any:
    """The LoRARequest in the arguments of add_request; None without one, or if vLLM will refuse it."""
    from vllm.v1.engine import EngineCoreRequest

    if engine.vllm_config.lora_config is None:
        return None
    prompt = arguments["prompt"]
    if isinstance(prompt, EngineCoreRequest):
        return prompt.lora_request
    return arguments.get("lora_request")


def _replace_adapter(arguments: dict[str, Any], adapter: Any) -> None:
    from vllm.v1.engine import EngineCoreRequest

    prompt = arguments["prompt"]
    if isinstance(prompt, EngineCoreRequest):
        prompt.lora_request = adapter
    else:
        arguments["lora_request"] = adapter


def async_patches(originals: dict[str, Callable[..., Awaitable[Any]]]) -> dict[str, Callable[..., Any]]:
    """The methods of AsyncLLM."""
    signature = inspect.signature(originals["add_request"])

    async def load(engine: Any, request: Any, *, fresh: bool) -> ServedAdapter:
        admission = admission_of(engine)
        async with admission.locks[request.lora_name]:
            served = admission.current(request)
            if served is not None and not fresh:
                return served
            served = await asyncio.to_thread(admission.prepare, request)
            with admission.adapters.in_admission(served):
                try:
                    await originals["add_lora"](engine, engine_request(request, served))
                except Exception as error:
                    if not admission.adapters.serves(served):
                        with suppress(Exception):  # it may be loaded in part
                            await originals["remove_lora"](engine, served.int_id)
                    raise admission.failure(error, request, served) from error
                admission.admit(request, served)
            return served

    async def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        request = _adapter_of(self, bound.arguments)
        if request is None:
            return await originals["add_request"](self, *args, **kwargs)
        admission = admission_of(self)
        served = admission.current(request) or await load(self, request, fresh=False)
        if isinstance(bound.arguments["prompt"], AsyncGenerator):
            admission.adapters.keep(served)  # its requests come one after another
        with admission.adapters.in_admission(served):
            _replace_adapter(bound.arguments, engine_request(request, served))
            return await originals["add_request"](*bound.args, **bound.kwargs)

    async def add_lora(self: Any, lora_request: Any) -> bool:
        if self.vllm_config.lora_config is None:
            return bool(await originals["add_lora"](self, lora_request))
        await load(self, lora_request, fresh=True)
        lora_request.load_inplace = False  # the server sends it with every request
        return True

    async def remove_lora(self: Any, lora_id: int) -> bool:
        adapters = admission_of(self).adapters
        removed = [await originals["remove_lora"](self, name) for name in adapters.engine_ids(lora_id)]
        return bool(adapters.forget(int_id=lora_id)) or any(removed)

    async def list_loras(self: Any) -> set[int]:
        adapters = admission_of(self).adapters
        return adapters.client_ids(await originals["list_loras"](self))

    async def pin_lora(self: Any, lora_id: int) -> bool:
        names = admission_of(self).adapters.engine_ids(lora_id)
        pinned = [await originals["pin_lora"](self, name) for name in names]
        return all(pinned)

    methods = (add_request, add_lora, remove_lora, list_loras, pin_lora)
    return dict(zip(METHODS, methods, strict=True))


def sync_patches(originals: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The methods of LLMEngine."""
    signature = inspect.signature(originals["add_request"])

    def load(engine: Any, request: Any) -> ServedAdapter:
        admission = admission_of(engine)
        served = admission.prepare(request)
        with admission.adapters.in_admission(served):
            try:
                originals["add_lora"](engine, engine_request(request, served))
            except Exception as error:
                if not admission.adapters.serves(served):
                    with suppress(Exception):  # it may be loaded in part
                        originals["remove_lora"](engine, served.int_id)
                raise admission.failure(error, request, served) from error
            admission.admit(request, served)
        return served

    def add_request(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        request = _adapter_of(self, bound.arguments)
        if request is None:
            return originals["add_request"](self, *args, **kwargs)
        served = admission_of(self).current(request) or load(self, request)
        _replace_adapter(bound.arguments, engine_request(request, served))
        return originals["add_request"](*bound.args, **bound.kwargs)

    def add_lora(self: Any, lora_request: Any) -> bool:
        if self.vllm_config.lora_config is None:
            return bool(originals["add_lora"](self, lora_request))
        load(self, lora_request)
        return True

    def remove_lora(self: Any, lora_id: int) -> bool:
        adapters = admission_of(self).adapters
        removed = [originals["remove_lora"](self, name) for name in adapters.engine_ids(lora_id)]
        return bool(adapters.forget(int_id=lora_id)) or any(removed)

    def list_loras(self: Any) -> set[int]:
        adapters = admission_of(self).adapters
        return adapters.client_ids(originals["list_loras"](self))

    def pin_lora(self: Any, lora_id: int) -> bool:
        names = admission_of(self).adapters.engine_ids(lora_id)
        return all(originals["pin_lora"](self, name) for name in names)

    methods = (add_request, add_lora, remove_lora, list_loras, pin_lora)
    return dict(zip(METHODS, methods, strict=True))


def patch_engine(engine: Any, patches: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Patch an engine class, once."""
    if INSTALLED in vars(engine):
        return
    originals = {name: getattr(engine, name) for name in METHODS}
    for name, method in patches(originals).items():
        setattr(engine, name, functools.wraps(originals[name])(method))
    setattr(engine, INSTALLED, True)


def patch_core(core: Any) -> None:
    """Let the process that commands the workers ask them for the reason of a refusal.

    An error that workers raise is read from the first of them alone: the answers of the others would be
    taken for those of the next call (seen with vLLM 0.32 and tensor parallelism).
    """
    if INSTALLED in vars(core):
        return
    original = core.add_lora

    @functools.wraps(original)
    def add_lora(self: Any, lora_request: Any) -> bool:
        for reason in self.model_executor.collective_rpc(refusal_of_worker, args=(lora_request,)):
            if reason is not None:
                raise ValueError(reason)
        return True

    core.add_lora = add_lora
    setattr(core, INSTALLED, True)


def refusal_of_worker(worker: Any, lora_request: Any) -> str | None:
    """Load an adapter in a worker. Returns the reason if it cannot be."""
    try:
        worker.add_lora(lora_request)
    except Exception as error:  # of vLLM's loader, which raises many types
        logger.info("%s is not loaded", lora_request.lora_name, exc_info=True)
        return str(error) or type(error).__name__
    return None


def patch_models(models: Any) -> None:
    """Answer HTTP requests with the reason of a refusal, and forget adapters that are unloaded."""
    if INSTALLED in vars(models):
        return
    from http import HTTPStatus

    from vllm.entrypoints.serve import create_error_response

    load, unload, resolve = models.load_lora_adapter, models.unload_lora_adapter, models.resolve_lora

    @functools.wraps(load)
    async def load_lora_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        refusals: list[str] = []
        token = REFUSALS.set(refusals)
        try:
            answer = await load(self, *args, **kwargs)
        finally:
            REFUSALS.reset(token)
        if refusals and not isinstance(answer, str):
            return create_error_response(refusals[-1], "BadRequestError", HTTPStatus.BAD_REQUEST)
        return answer

    @functools.wraps(resolve)
    async def resolve_lora(self: Any, lora_name: str) -> Any:
        refusals: list[str] = []
        token = REFUSALS.set(refusals)
        try:
            answer = await resolve(self, lora_name)
        finally:
            REFUSALS.reset(token)
        if refusals and hasattr(answer, "error"):
            return create_error_response(refusals[-1], "BadRequestError", HTTPStatus.BAD_REQUEST)
        return answer

    @functools.wraps(unload)
    async def unload_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await unload(self, request, *args, **kwargs)
        if isinstance(answer, str):
            admission_of(self.engine_client).adapters.forget(name=request.lora_name)
        return answer

    models.load_lora_adapter = load_lora_adapter
    models.resolve_lora = resolve_lora
    models.unload_lora_adapter = unload_lora_adapter
    setattr(models, INSTALLED, True)
