"""ClientMiddleware: tells the scheduler which API key a request came with.

`vllm serve ... --middleware flora_train.serving.client_middleware.ClientMiddleware`. The key becomes a keyed
hash, which is put before the engine's own id of the request. That id is made after a client's request was
read: no header and no field of a request can set it, and no response shows it.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextvars import ContextVar
from typing import Any, TypeAlias

from flora_train.serving.client_identity import client_of_hash, key_hash, mark, secret
from flora_train.serving.fairness import load_settings

Scope: TypeAlias = MutableMapping[str, Any]
App: TypeAlias = Callable[[Scope, Any, Any], Awaitable[None]]

logger = logging.getLogger(__name__)

current_client: ContextVar[str | None] = ContextVar("current_client", default=None)
"""The client whose request this task handles."""


class ClientMiddleware:
    """An ASGI application around the server's own."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._secret = secret()
        self._unlisted = load_settings().unlisted_keys
        self._listed: list[str] | None = None
        mark_request_ids()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        token = current_client.set(self.client(scope))
        try:
            await self.app(scope, receive, send)
        finally:
            current_client.reset(token)

    def client(self, scope: Scope) -> str | None:
        """The client of a request's API key; None without a key, or with one that nobody checks."""
        key = bearer_key(scope["headers"])
        if key is None:
            return None
        digest = key_hash(key)
        listed = self._listed_keys(scope)
        if not listed and not self._unlisted:
            return None
        if listed and not any(hmac.compare_digest(digest, known) for known in listed):
            return None
        return client_of_hash(digest, self._secret)

    def _listed_keys(self, scope: Scope) -> list[str]:
        """SHA-256 of the keys that the server accepts."""
        if self._listed is None:
            arguments = getattr(scope["app"].state, "args", None)
            keys = getattr(arguments, "api_key", None) or [os.environ.get("VLLM_API_KEY")]
            self._listed = [key_hash(key) for key in keys if key]
            if not self._listed and not self._unlisted:
                logger.warning(
                    "The server checks no API keys (--api-key): requests are counted by adapter. "
                    "If a proxy checks them, set unlisted_keys: true"
                )
        return self._listed


def bearer_key(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The API key of an Authorization header, as vLLM reads it: the first such header counts."""
    for name, value in headers:
        if name.lower() == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and key:
                return key
            return None
    return None


def mark_request_ids() -> None:
    """Make vLLM's front end put the client of a request before its id. A second call changes nothing."""
    from vllm.v1.engine.input_processor import InputProcessor

    original = InputProcessor.assign_request_id
    if getattr(original, "marks_clients", False):
        return

    def assign_request_id(request: Any) -> None:
        original(request)
        request.request_id = mark(request.request_id, current_client.get(), secret())

    assign_request_id.marks_clients = True  # type: ignore[attr-defined]
    InputProcessor.assign_request_id = staticmethod(assign_request_id)
