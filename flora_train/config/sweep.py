"""Sweeps: an entry of `adapters` with lists of values becomes one adapter for every combination."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from itertools import product
from math import prod
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.base import LONGEST_NAME, MOST_STEPS, ConfigModel
from flora_train.config.errors import choices, user_error
from flora_train.config.paths import RawConfig

SWEPT = (
    "lr",
    "rank",
    "alpha",
    "variant",
    "expert",
    "experts",
    "top_k",
    "top_p",
    "balance_loss",
    "jitter",
    "gate_loss",
    "dropout",
    "neftune_noise_alpha",
    "lr_ratio",
    "weight_decay",
    "max_grad_norm",
    "lr_schedule",
    "warmup_steps",
    "warmup_ratio",
    "max_steps",
    "ema_decay",
)
"""Settings of an adapter that may be lists of values, each of which becomes an adapter."""
SEED = "seed"
"""The key that may be a list as well, and is no setting: no seed is better than another."""
MOST_MEMBERS = 10_000
"""Largest number of adapters from the sweeps of one run."""
LIMIT = f"at most {MOST_MEMBERS:,} adapters are made by sweeps in one run"
LISTS = (
    "tasks",
    "over",
    "target_modules",
    "target_parameters",
    "feedforward_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "over",
    "members",
)
"""Keys whose value is a list."""


class SweepConfig(ConfigModel):
    strategy: Literal["all", "halving"] = "all"
    """What happens to the adapters that a list of values (adapters.NAME.lr=[1e-3,2e-3]) makes. all: they are
    trained to the end. halving: at every rung the adapters of a task with the higher held-out losses are no
    longer trained, and the others share their part of the batch (successive halving, Jamieson & Talwalkar
    2016)."""
    factor: int | None = Field(None, ge=2, le=1_000_000, validate_default=True)
    """With strategy=halving: one in `factor` adapters continues after a rung. Default: 2."""
    rungs: list[Annotated[int, Field(le=MOST_STEPS)]] | None = Field(
        None, min_length=1, max_length=1000, validate_default=True
    )
    """With strategy=halving: steps at which adapters are compared. Default: enough rungs to leave one winner,
    the last at training.steps / factor, each earlier one at 1 / factor of the next."""

    @field_validator("factor", "rungs")
    @classmethod
    def _belongs_to_halving(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("strategy") == "all":
            raise ValueError("requires strategy=halving: set it, or remove this key")
        return value

    @field_validator("rungs")
    @classmethod
    def _one_after_the_other(cls, rungs: list[int] | None) -> list[int] | None:
        if rungs is not None and (rungs[0] < 1 or sorted(set(rungs)) != rungs):
            raise ValueError("must be ascending steps from 1")
        return rungs


def expand_sweeps(adapters: Any) -> Any:
    """`adapters` of a raw configuration with every sweep expanded; `sweep` of a member names its entry, and
    `seeds_of` what it would be called without its seed.

    Raises UserError for a list of a key that cannot be swept, an empty list, and one with a value twice.
    """
    if not isinstance(adapters, Mapping):
        return adapters
    expanded: RawConfig = {}
    for name, adapter in adapters.items():
        values = (
            {key: value for key, value in adapter.items() if isinstance(value, list)}
            if isinstance(adapter, Mapping)
            else {}
        )
        for key, value in values.items():
            _check(f"adapters.{name}.{key}", key, value)
        swept = {key: value for key, value in values.items() if key in SWEPT or key == SEED}
        count = prod(map(len, swept.values()))
        if count + len(expanded) > MOST_MEMBERS:
            hint = f"is a sweep over {count:,} combinations of values: {LIMIT}"
            raise user_error(f"adapters.{name}", None, hint)
        for combination in product(*swept.values()):
            chosen = dict(zip(swept, combination, strict=True))
            member = _member_name(str(name), chosen)
            if member in expanded or (chosen and member in adapters):
                raise user_error(
                    "adapters",
                    member,
                    f"is the name of two adapters, one of them from the sweep adapters.{name}: rename one",
                )
            origin = _origin(str(name), chosen)
            group = origin.get("seeds_of", name)
            if group != name and group in adapters:
                hint = f"is also the name under which reports show the seeds of adapters.{name}: rename one"
                raise user_error("adapters", group, hint)
            expanded[member] = {**adapter, **chosen, **origin} if chosen else adapter
    return expanded


def _member_name(entry: str, chosen: Mapping[str, Any]) -> str:
    return "_".join([entry, *(f"{key}{_short(value)}" for key, value in chosen.items())])


def _origin(entry: str, chosen: Mapping[str, Any]) -> dict[str, str]:
    """The keys that say which entry a member of a sweep was expanded from. chosen: its values of the lists.

    A list of seeds alone is no sweep: there is nothing to choose.
    """
    settings = {key: value for key, value in chosen.items() if key != SEED}
    origin = {}
    if settings:
        origin["sweep"] = entry
    if SEED in chosen:
        origin["seeds_of"] = _member_name(entry, settings)
    return origin


def _check(key: str, option: str, values: list[Any]) -> None:
    if option in LISTS or option not in AdapterConfig.model_fields:
        return  # of unknown keys, the schema says what they are called here
    if option not in (*SWEPT, SEED):
        hint = f"cannot be swept: a list of values may stand for {choices((*SWEPT, SEED))}"
        raise user_error(key, values, hint)
    if not values:
        raise user_error(key, values, "is an empty sweep: give one or several values")
    if len(values) > MOST_MEMBERS:
        raise user_error(
            key,
            None,
            f"is a sweep over {len(values):,} values: {LIMIT}",
        )
    seen: set[str] = set()
    for value in values:
        if (name := _short(value)) in seen:
            raise user_error(key, value, "is in this sweep twice: remove one")
        seen.add(name)


def _short(value: Any) -> str:
    """A value as part of a name, which has no decimal point: 16, 2e-3, 15e-4, cosine."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)[: LONGEST_NAME + 1]  # longer ones are refused as names
    number = Decimal(str(value))
    if not number.is_finite() or number == number.to_integral_value():
        return f"{number:f}".partition(".")[0]
    _, digits, exponent = number.normalize().as_tuple()
    return f"{''.join(map(str, digits))}e{exponent}"
