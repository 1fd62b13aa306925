"""The client of an API key as a prefix of request ids: keyed hashes that show no key and cannot be forged."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets

from flora_train.config.errors import user_error

SECRET_VARIABLE = "FLORA_TRAIN_CLIENT_SECRET"
"""Environment variable with the secret of the hashes. All processes of a server inherit it; machines that
serve together need the same one."""
SHORTEST_SECRET = 16

PREFIX = "fair"
TAG_DIGITS = 32
SIGNATURE_DIGITS = 16
# vLLM puts a number before the ids of a request's further samples
MARKED = re.compile(rf"(?:\d+_)?{PREFIX}-([0-9a-f]{{{TAG_DIGITS}}})-([0-9a-f]{{{SIGNATURE_DIGITS}}})-")
SIMILAR = re.compile(rf"(?:\d+_)*{PREFIX}-")


def create_secret() -> None:
    """Set the secret for this process and those that it starts, unless it is set."""
    if not os.environ.get(SECRET_VARIABLE):
        os.environ[SECRET_VARIABLE] = secrets.token_hex(32)


def secret() -> bytes:
    """The secret. Raises UserError if it is missing or short."""
    value = os.environ.get(SECRET_VARIABLE, "")
    if len(value) < SHORTEST_SECRET:
        raise user_error(
            SECRET_VARIABLE,
            None,
            f"is missing or shorter than {SHORTEST_SECRET} characters. vLLM's plugin flora_train sets it, "
            "unless VLLM_PLUGINS leaves it out; or set it to a random text: openssl rand -hex 32",
        )
    return value.encode()


def key_hash(api_key: str) -> str:
    """SHA-256 of an API key, as settings list it."""
    return hashlib.sha256(api_key.encode()).hexdigest()


def client_of_hash(digest: str, secret: bytes) -> str:
    """The client of an API key, from the key's SHA-256."""
    return f"key:{_keyed(secret, 'client', digest)[:TAG_DIGITS]}"


def mark(request_id: str, client: str | None, secret: bytes) -> str:
    """A request id that names its client; without a client, one that names none."""
    if client is None:
        if SIMILAR.match(request_id):
            return f"id-{request_id}"
        return request_id
    tag = client.removeprefix("key:")
    return f"{PREFIX}-{tag}-{_signature(tag, secret)}-{request_id}"


def marked_client(request_id: str, secret: bytes) -> str | None:
    """The client that a request id names, None if it names none or is forged."""
    match = MARKED.match(request_id)
    if match is None or not hmac.compare_digest(match[2], _signature(match[1], secret)):
        return None
    return f"key:{match[1]}"


def _signature(tag: str, secret: bytes) -> str:
    return _keyed(secret, "request", tag)[:SIGNATURE_DIGITS]


def _keyed(secret: bytes, purpose: str, text: str) -> str:
    return hmac.new(secret, f"{purpose}:{text}".encode(), hashlib.sha256).hexdigest()
