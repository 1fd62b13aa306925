"""Adapters of a catalogue in vLLM's server: a request names one, and it is fetched and loaded."""

from __future__ import annotations

import asyncio
import functools
from http import HTTPStatus
from typing import Any

from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.pooling.base.serving import PoolingBaseServing
from vllm.entrypoints.serve import create_error_response
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelPermission
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from flora_train.config.errors import UserError
from flora_train.runtime.hub_snapshot import HubError
from flora_train.serving.catalogue import Catalogue

NAME = "flora_train"
"""Of the resolver in vLLM's registry."""


class CatalogueResolver(LoRAResolver):
    """vLLM's interface to a catalogue. The server numbers the requests."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Raises HubError and UserError."""
        folder = await asyncio.to_thread(self.catalogue.fetch, lora_name)
        if folder is None:
            return None
        return LoRARequest(lora_name, lora_int_id=1, lora_path=str(folder.absolute()))

    async def names(self) -> list[str]:
        """The names to list; none where the hub cannot be read now."""
        try:
            return await asyncio.to_thread(self.catalogue.names)
        except HubError:
            return []


def install(catalogue: Catalogue) -> None:
    """Register the catalogue, and let servers consult it for names that they do not know.

    vLLM consults resolvers only with VLLM_ALLOW_RUNTIME_LORA_UPDATING, which also lets every client load any
    folder of the server. A catalogue is a closed list, so that it is consulted without it. An adapter that
    cannot be loaded is answered with the reason, which vLLM only logs.
    """
    if NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    resolver = CatalogueResolver(catalogue)
    LoRAResolverRegistry.register_resolver(NAME, resolver)
    _install_in_completions(resolver)
    _install_in_pooling(resolver)
    _install_in_list(resolver)


async def load(models: OpenAIServingModels, resolver: CatalogueResolver, name: str) -> ErrorResponse | None:
    """Load an adapter of the catalogue, unless it is loaded. Returns why it cannot be, or None, also where
    the catalogue has no such name."""
    async with models.lora_resolver_lock[name]:
        if name in models.lora_requests:
            return None
        try:
            request = await resolver.resolve_lora(models.model_config.model, name)
            if request is None:
                return None
            request.lora_int_id = models.lora_id_counter.inc(1)
            await models.engine_client.add_lora(request)
        except HubError as error:
            return _refusal(name, f"the catalogue {error}", HTTPStatus.SERVICE_UNAVAILABLE)
        except UserError as error:
            return _refusal(name, "; ".join(problem.hint for problem in error.problems))
        except Exception as error:  # of the engine, which has many
            return _refusal(name, str(error) or type(error).__name__)
        models.lora_requests[name] = request
        return None


def _refusal(name: str, reason: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> ErrorResponse:
    kind = "BadRequestError" if status == HTTPStatus.BAD_REQUEST else "ServiceUnavailableError"
    message = f"The adapter `{name}` cannot be loaded: {reason}"
    return create_error_response(message=message, err_type=kind, status_code=status, param="model")


async def _load_unknown(serving: Any, resolver: CatalogueResolver, name: str | None) -> ErrorResponse | None:
    """`load`, where a request names neither a served model nor a loaded adapter."""
    models = serving.models
    if not isinstance(models, OpenAIServingModels) or serving._is_model_supported(name):
        return None
    if not name or name in models.lora_requests:
        return None
    try:
        known = await asyncio.to_thread(resolver.catalogue.names)
    except HubError as error:
        return _refusal(name, f"the catalogue {error}", HTTPStatus.SERVICE_UNAVAILABLE)
    return await load(models, resolver, name) if name in known else None


def _install_in_completions(resolver: CatalogueResolver) -> None:
    check_model = BaseServing._check_model

    @functools.wraps(check_model)
    async def check(self: BaseServing, request: Any) -> ErrorResponse | None:
        refusal = await _load_unknown(self, resolver, request.model)
        return refusal or await check_model(self, request)

    BaseServing._check_model = check


def _install_in_pooling(resolver: CatalogueResolver) -> None:
    check_model = PoolingBaseServing._check_model

    @functools.wraps(check_model)
    async def check(self: PoolingBaseServing, request: Any) -> ErrorResponse | None:
        refusal = await _load_unknown(self, resolver, request.model)
        if refusal is not None:
            raise ValueError(refusal.error.message)
        return await check_model(self, request)

    PoolingBaseServing._check_model = check


def _install_in_list(resolver: CatalogueResolver) -> None:
    """/v1/models also lists what can be requested."""
    show_models = OpenAIServingModels.show_available_models

    @functools.wraps(show_models)
    async def show(self: OpenAIServingModels) -> Any:
        models = await show_models(self)
        listed = {card.id for card in models.data}
        parent = self.base_model_paths[0].name
        for name in await resolver.names():
            if name not in listed:
                models.data.append(ModelCard(id=name, parent=parent, permission=[ModelPermission()]))
        return models

    OpenAIServingModels.show_available_models = show
