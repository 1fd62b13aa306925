"""Settings of fair scheduling: prices of tokens, weights of clients, and which API keys are clients."""

from __future__ import annotations

import os
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from flora_train.config.base import ConfigModel, Text
from flora_train.config.errors import Problem, UserError, did_you_mean, user_error
from flora_train.config.paths import read_mapping, read_yaml
from flora_train.serving.client_identity import client_of_hash, create_secret, secret
from flora_train.serving.fair_queue import MOST_IDLE, Prices

VARIABLE = "FLORA_TRAIN_FAIRNESS"
"""Environment variable: a YAML or JSON file with the settings, or the settings themselves as JSON."""
ADAPTER = "adapter:"
BASE_CLIENT = "base"
"""The client of requests without an adapter and without an API key."""


def _no_boolean(value: Any) -> Any:
    """`lua: yes` would otherwise be the weight 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


Weight = Annotated[float, BeforeValidator(_no_boolean), Field(ge=1e-6, le=1e6)]
Price = Annotated[float, Field(ge=0, le=1e6)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def adapter_client(name: str) -> str:
    """The client of requests to an adapter without an API key."""
    return f"{ADAPTER}{name}"


def is_adapter(client: Hashable) -> bool:
    """Whether a client is an adapter, so that all its requests need the same slot."""
    return isinstance(client, str) and client.startswith(ADAPTER)


class PriceSettings(ConfigModel):
    """What a token costs its client."""

    prompt: Price = 1.0
    """Of a token of the prompt, charged when the request is admitted."""
    output: Annotated[float, Field(gt=0, le=1e6)] = 2.0
    """Of a generated token, charged in the step that generates it."""
    cached: Price | None = None
    """Of a token of the prompt that the prefix cache has. By default the price of any token of the prompt: it
    needs no computation, but memory."""


class FairnessSettings(ConfigModel):
    """The content of the file or variable."""

    prices: PriceSettings = PriceSettings()
    weights: dict[Text, Weight] = {}
    """Weight of an adapter by its name. With weight 2 it is given twice the service."""
    base_weight: Weight = 1.0
    """Weight of the requests without adapter."""
    key_weights: dict[Sha256, Weight] = {}
    """Weight of an API key by its SHA-256 in hexadecimal: `printf %s "$KEY" | sha256sum`."""
    default_weight: Weight = 1.0
    """Weight of adapters and API keys that are not listed."""
    unlisted_keys: bool = False
    """Whether each API key is a client on a server that checks none (`--api-key`), such as behind a proxy
    that checks them. Where nobody checks them, one user could be many clients."""
    slot_lead: Annotated[float, Field(ge=0, le=1e12)] = 8192.0
    """Service that an adapter in one of the `--max-loras` slots is given while a client that is behind waits
    for a slot. Then its next requests wait until the slot is free."""
    most_idle_clients: Annotated[int, Field(ge=1, le=100_000_000)] = MOST_IDLE
    """Largest number of clients without requests that are remembered because they are ahead."""

    def token_prices(self) -> Prices:
        """The prices for the queue."""
        return Prices(self.prices.prompt, self.prices.output, self.prices.cached)

    def weights_by_client(self) -> dict[Hashable, float]:
        """The weights of all listed clients."""
        weights: dict[Hashable, float] = {BASE_CLIENT: self.base_weight}
        for name, weight in self.weights.items():
            weights[adapter_client(name)] = weight
        for digest, weight in self.key_weights.items():
            weights[client_of_hash(digest, secret())] = weight
        return weights


def install() -> None:
    """Prepare what all processes of a server share, before it starts them.

    Raises UserError for wrong settings: at once, and not only in the process of the scheduler.
    """
    create_secret()
    load_settings().weights_by_client()


def check_policy(policy: str | None) -> None:
    """Raises UserError for an order of requests that contradicts a fair one."""
    if policy not in (None, "fcfs"):
        raise user_error(
            "--scheduling-policy",
            policy,
            "FairScheduler has an order of its own: leave this out, and give clients weights "
            f"({VARIABLE}), or leave out --scheduler-cls",
        )


def load_settings() -> FairnessSettings:
    """The settings that the environment variable names; the defaults where it is not set.

    Raises UserError for a file that cannot be read and for every wrong key.
    """
    value = os.environ.get(VARIABLE, "").strip()
    if not value:
        return FairnessSettings()
    if value.startswith("{"):
        return _validated(read_mapping(value, VARIABLE), VARIABLE)
    path = Path(value).expanduser()
    return _validated(read_yaml(path), str(path))


def _validated(content: dict[str, Any], source: str) -> FairnessSettings:
    try:
        return FairnessSettings.model_validate(content)
    except ValidationError as error:
        raise UserError(*(_problem(dict(item), source) for item in error.errors())) from None


def _problem(item: dict[str, Any], source: str) -> Problem:
    key = ".".join(str(part) for part in item["loc"] if part != "[key]")
    if item["type"] == "extra_forbidden":
        allowed = list(FairnessSettings.model_fields)
        if len(item["loc"]) > 1:
            allowed = list(PriceSettings.model_fields)
        hint = f"unknown key; the keys here are {', '.join(allowed)}."
        return Problem(f"{source}: {key}", None, hint + did_you_mean(str(item["loc"][-1]), allowed))
    if "[key]" in item["loc"] and item["type"] == "string_pattern_mismatch":
        # the value may be the API key itself, which no message shows
        return Problem(
            f"{source}: key_weights",
            None,
            'the keys here are SHA-256 of API keys, 64 hexadecimal digits: printf %s "$KEY" | sha256sum',
        )
    hint = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return Problem(f"{source}: {key}", item["input"], hint)
