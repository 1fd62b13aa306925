"""What `flwr run` is told: the recipe, one of its strategies with one seed, and limits of time."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.federated_schema import FederatedConfig
from flora_train.config.load import load_config
from flora_train.config.schema import RunConfig

Value = bool | int | float | str
Kind = TypeVar("Kind", bool, int, str)

FIRST_SEED = -1
"""seed: the first of federated.seeds."""


@dataclass(frozen=True)
class Settings:
    """A deployment: the recipe with one strategy and one seed."""

    config: RunConfig
    strategy: str
    seed: int
    round_timeout: float
    """Seconds within which the clients of a round have to answer."""
    start_timeout: float
    """Seconds that the server waits for the clients of a round to be connected: for all of them before its
    first round, for federated.min_clients before a later one."""
    server_data: bool
    """Whether the server has the recipe's data, to evaluate the global adapter on."""

    @property
    def federated(self) -> FederatedConfig:
        """The section of the recipe, with the only strategy and seed."""
        assert self.config.federated is not None
        return self.config.federated


def read_settings(run_config: Mapping[str, Value]) -> Settings:
    """The deployment that a run configuration asks for.

    Args:
        run_config: The keys of `[tool.flwr.app.config]` in launch/flower/pyproject.toml.

    Returns:
        The deployment.

    Raises:
        UserError: A key is missing or of another type, or the recipe cannot be deployed.
    """
    recipe = _typed(run_config, "recipe", str, "is the name of a recipe, or the path of its file")
    if not recipe:
        hint = "is required: --run-config 'recipe=\"path/to/recipe.yaml\"'"
        raise user_error("recipe", None, hint)
    overrides = _typed(run_config, "overrides", str, "is text, such as 'federated.rounds=5 resume=true'")
    config = load_config([f"recipe={recipe}", *shlex.split(overrides)])
    if config.federated is None:
        raise user_error("recipe", recipe, "has no section federated, whose rounds Flower runs: add it")
    strategy = _strategy(config.federated, _typed(run_config, "strategy", str, "is the name of a strategy"))
    seed = _seed(config.federated, _typed(run_config, "seed", int, "is one of federated.seeds"))
    only = {"strategies": {strategy: config.federated.strategies[strategy]}, "seeds": [seed]}
    config = config.model_copy(update={"federated": config.federated.model_copy(update=only)})
    server_data = _typed(run_config, "server-data", bool, "is true or false")
    if not server_data:
        _check_tasks_are_listed(config)
    return Settings(
        config,
        strategy,
        seed,
        round_timeout=_seconds(run_config, "round-timeout"),
        start_timeout=_seconds(run_config, "start-timeout"),
        server_data=server_data,
    )


def _check_tasks_are_listed(config: RunConfig) -> None:
    """Raises UserError for tasks that are made of the values in a file, which this server does not read."""
    for name, task in config.tasks.items():
        if task.is_split:
            hint = (
                f"reads no data, and tasks.{name}.split_by makes a task of each value in its file: list the "
                "tasks in the recipe, or set server-data=true"
            )
            raise user_error("server-data", False, hint)


def _strategy(federated: FederatedConfig, name: str) -> str:
    names = list(federated.strategies)
    if not name and len(names) > 1:
        hint = f"is required, since the recipe has several: set it to one of {choices(names)}"
        raise user_error("strategy", None, hint)
    name = name or names[0]
    if name not in names:
        hint = f"is no strategy of the recipe, which has {choices(names)}.{did_you_mean(name, names)}"
        raise user_error("strategy", name, hint)
    strategy = federated.strategies[name]
    if strategy.algorithm == "full":
        hint = "trains all weights of the base, which Flower does not carry here: choose one with an adapter"
        raise user_error("strategy", name, hint)
    if strategy.central:
        hint = "trains one adapter on all examples, and no client has them: use train.py for it"
        raise user_error("strategy", name, hint)
    return name


def _seed(federated: FederatedConfig, seed: int) -> int:
    if seed == FIRST_SEED:
        return federated.seeds[0]
    if seed not in federated.seeds:
        raise user_error("seed", seed, f"is none of federated.seeds = {federated.seeds}: choose one of them")
    return seed


def _typed(run_config: Mapping[str, Value], key: str, kind: type[Kind], hint: str) -> Kind:
    value = run_config.get(key)
    if type(value) is not kind:
        raise user_error(key, value, hint)
    return value


def _seconds(run_config: Mapping[str, Value], key: str) -> float:
    value = run_config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise user_error(key, value, "is a number of seconds above 0")
    return float(value)
