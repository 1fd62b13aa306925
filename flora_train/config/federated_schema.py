"""The section `federated`: clients, rounds, and how the server combines what the clients learn."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.base import ConfigModel, Name

MOST_CLIENTS = 10_000
MOST_ROUNDS = 1_000_000
DEFAULT_DENSITY = 0.01
DEFAULT_CLIENTS = 10
GLOBAL_TASK = "global"
"""What stands for the task in the names of global adapters."""
Algorithm = Literal["factor_mean", "product_mean", "fedex", "slora", "full"]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]
Value = TypeVar("Value")


class StrategyConfig(ConfigModel):
    adapter: Name
    """The entry of `adapters` that every client trains. Full fine-tuning: one of method head, whose learning
    rate and weight decay hold for all weights of the base, too."""
    algorithm: Algorithm = "product_mean"
    """How the clients' adapters become one. product_mean: the mean of the products (of the modulations, for
    flora), at the adapter's rank. factor_mean: the mean of A and of B, the usual way, whose product is not
    the mean of the products. fedex: factor_mean, and what it misses is added to the base. slora: rounds of
    sparse values, then product_mean of adapters that begin with what those have learnt. full: every weight
    of the base. The values of ia3 and the heads are averaged as they are."""
    central: bool = False
    """Train one adapter on the examples of all clients, for as many steps, to compare with. There are no
    rounds."""
    sparse_rounds: int | None = Field(None, ge=1, le=MOST_ROUNDS, validate_default=True)
    """slora: number of rounds with sparse values; they are the first of federated.rounds."""
    density: float | None = Field(None, gt=0, le=1)
    """slora: share of the entries of each weight that the first stage trains. Default: 0.01."""
    sparse_lr: float | None = Field(None, gt=0, le=1e30)
    """slora: learning rate of the sparse values. Default: that of the adapter."""

    @field_validator("central")
    @classmethod
    def _rounds_make_sense(cls, central: bool, info: ValidationInfo) -> bool:
        algorithm = info.data.get("algorithm")
        if central and algorithm in ("slora", "fedex", "factor_mean"):
            raise ValueError(
                f"has nothing to average, so that algorithm={algorithm} has no meaning: remove one of them"
            )
        return central

    @field_validator("sparse_rounds")
    @classmethod
    def _slora_has_two_stages(cls, rounds: int | None, info: ValidationInfo) -> int | None:
        algorithm = info.data.get("algorithm")
        if algorithm == "slora" and rounds is None:
            raise ValueError("is required by algorithm=slora: set it to a part of federated.rounds")
        return _only_of_slora(rounds, algorithm)

    @field_validator("density", "sparse_lr")
    @classmethod
    def _belongs_to_slora(cls, value: float | None, info: ValidationInfo) -> float | None:
        return _only_of_slora(value, info.data.get("algorithm"))


def _only_of_slora(value: Value | None, algorithm: str | None) -> Value | None:
    if value is not None and algorithm not in (None, "slora"):
        raise ValueError(f"has no meaning for algorithm={algorithm}; it belongs to slora: remove it")
    return value


class FederatedConfig(ConfigModel):
    rounds: int = Field(ge=1, le=MOST_ROUNDS)
    """Number of rounds: in each, clients train training.steps steps from the global adapter, and the server
    combines what they have learnt."""
    split: Literal["dirichlet", "tasks"] = "dirichlet"
    """How examples belong to clients. dirichlet: the labelled texts of the only task are divided, each label
    by shares that are drawn from Dirichlet(alpha). tasks: every task is a client; tasks.*.split_by makes a
    task of each value of a column, such as a user."""
    num_clients: int | None = Field(None, ge=1, le=MOST_CLIENTS)
    """Number of clients. Default: 10 for split=dirichlet, all tasks for split=tasks; fewer than there are
    tasks are chosen by the seed."""
    dirichlet_alpha: float | None = Field(None, gt=0, le=1e6, validate_default=True)
    """Required by split=dirichlet. Small values give a label to few clients (0.1), large ones give all
    clients the same labels (100)."""
    clients_per_round: int | None = Field(None, ge=1, le=MOST_CLIENTS)
    """Number of clients of a round, chosen by the seed. Default: all."""
    batch_examples: int = Field(8, ge=1, le=1_000_000)
    """Number of examples of a client's step."""
    local_epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Passes of a client over its own examples in a round, instead of training.steps steps."""
    client_ranks: Annotated[list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=1)] | None = None
    """Ranks of the clients' adapters, in their order; where there are fewer than clients, they repeat. At
    most the rank of the adapter, which is that of the global one. Default: that rank."""
    clients_at_once: int | None = Field(None, ge=1, le=MOST_CLIENTS)
    """Number of clients that share forward passes, which limits memory and changes results only by rounding.
    Default: all of a round."""
    min_clients: int = Field(1, ge=1, le=MOST_CLIENTS)
    """Number of usable updates that a round needs. With fewer it changes nothing."""
    failed_rounds: int = Field(0, ge=0, le=MOST_ROUNDS)
    """Number of rounds that may fail so before the run ends with an error."""
    interval: int = Field(1, ge=1, le=MOST_ROUNDS)
    """Number of rounds between two evaluations of the global adapter. The last round is always evaluated."""
    seeds: Annotated[list[Seed], Field(min_length=1, max_length=1000)] = [0]
    """Every strategy runs once with each seed, which decides on the division of the examples, on the clients
    of each round, on the order of examples and on initial values."""
    strategies: dict[Name, StrategyConfig] = Field(min_length=1)
    """What is compared, by name."""

    @field_validator("dirichlet_alpha")
    @classmethod
    def _alpha_belongs_to_dirichlet(cls, alpha: float | None, info: ValidationInfo) -> float | None:
        split = info.data.get("split")
        if split == "dirichlet" and alpha is None:
            raise ValueError("is required by federated.split=dirichlet: set it, for instance to 0.1")
        if split == "tasks" and alpha is not None:
            raise ValueError("has no meaning for federated.split=tasks: remove it")
        return alpha

    @field_validator("clients_per_round")
    @classmethod
    def _at_most_all(cls, count: int | None, info: ValidationInfo) -> int | None:
        clients = info.data.get("num_clients")
        if count is not None and clients is not None and count > clients:
            raise ValueError(f"is more than federated.num_clients = {clients}")
        return count

    @field_validator("min_clients")
    @classmethod
    def _at_most_those_of_a_round(cls, least: int, info: ValidationInfo) -> int:
        clients = info.data.get("clients_per_round") or info.data.get("num_clients")
        if clients is not None and least > clients:
            raise ValueError(f"is more than the {clients} clients of a round")
        return least

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("has a seed twice: remove one of them")
        return seeds

    @field_validator("strategies")
    @classmethod
    def _agree_with_rounds(
        cls, strategies: dict[str, StrategyConfig], info: ValidationInfo
    ) -> dict[str, StrategyConfig]:
        rounds = info.data.get("rounds")
        for name, strategy in strategies.items():
            if rounds is not None and (strategy.sparse_rounds or 0) >= rounds:
                raise ValueError(
                    f"{name}.sparse_rounds = {strategy.sparse_rounds} leaves no round of federated.rounds = "
                    f"{rounds} for the second stage"
                )
            if strategy.central and info.data.get("split") == "tasks":
                raise ValueError(f"{name}.central needs federated.split=dirichlet: an adapter has one task")
        return strategies

    @property
    def runs(self) -> dict[str, tuple[str, int]]:
        """Name of every run of a strategy -> the strategy and the seed."""
        if len(self.seeds) == 1:
            return {name: (name, self.seeds[0]) for name in self.strategies}
        return {f"{name}-seed{seed}": (name, seed) for name in self.strategies for seed in self.seeds}
