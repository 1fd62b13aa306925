"""Results of federated runs, as eval/federated.json has them."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import StrictBool

from flora_train.evaluation.result_model import (
    Confidence,
    Count,
    Interval,
    Measurement,
    ResultModel,
    Seconds,
    Text,
)

SCHEMA_VERSION: Final = 1


class Incident(ResultModel):
    """A client whose update is not part of a round's average."""

    client: Text
    status: Literal["excluded", "absent"]
    reason: Text


class RoundResult(ResultModel):
    """One round."""

    round: Count
    """From 0."""
    stage: Literal["sparse", "adapter", "full", "central"]
    loss: Measurement | None
    """Mean training loss of the accepted clients, by examples; None for a round that failed."""
    accepted: Count
    incidents: list[Incident] = []
    bytes_up: Count
    bytes_down: Count
    seconds_clients: Seconds
    seconds_server: Seconds
    left_out: Measurement | None
    """The largest share of a layer's mean that the rank left out; None where nothing is fitted."""
    failure: str = ""
    """Why the round changed nothing."""
    figures: dict[str, Interval] = {}
    """Figure -> its value for the global adapter on all held-out examples; empty if it was not evaluated."""
    clients: dict[str, Interval] = {}
    """Client -> the first figure for the global adapter on the held-out examples of that client."""


class SeedResult(ResultModel):
    """A strategy with one seed."""

    name: Text
    """Name of the run, as in adapters/ and federated/."""
    seed: Count
    rounds: list[RoundResult]
    examples: dict[str, Count]
    """Client -> number of its training examples."""
    label_entropy: Measurement | None
    """Mean entropy of a client's labels, in nats; None where examples are not divided by label."""

    @property
    def last(self) -> RoundResult:
        return self.rounds[-1]

    @property
    def seconds(self) -> float:
        """Seconds of all rounds, without evaluations."""
        return sum(own.seconds_clients + own.seconds_server for own in self.rounds)

    @property
    def bytes_up(self) -> int:
        return sum(own.bytes_up for own in self.rounds)

    @property
    def bytes_down(self) -> int:
        return sum(own.bytes_down for own in self.rounds)


class StrategyResult(ResultModel):
    """A strategy with all its seeds."""

    name: Text
    algorithm: Text
    central: StrictBool
    method: Text
    rank: Count | None
    values: Count
    """Numbers that a client sends in a round of the last stage."""
    seeds: list[SeedResult]
    figures: dict[str, Interval]
    """Figure -> its mean over seeds after the last round, with the interval over held-out examples."""


class StrategyDifference(ResultModel):
    """The first figure of one strategy minus that of another, both means over seeds."""

    first: Text
    second: Text
    value: Interval


class FederatedReport(ResultModel):
    """A federated run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    name: Text
    model: Text
    dtype: Text
    machine: Text
    packages: dict[str, str]
    created: Text
    split: Literal["dirichlet", "tasks"]
    alpha: Measurement | None
    num_clients: Count
    clients_per_round: Count
    rounds: Count
    local: Text
    """What a client does in a round, such as `5 steps of 8 examples`."""
    heldout_examples: Count
    confidence: Confidence
    figures: list[Text]
    """Names of the figures, the first of which is that of clients and differences; empty where the server of
    a deployment has no held-out examples."""
    lower_is_better: StrictBool
    strategies: list[StrategyResult]
    differences: list[StrategyDifference]
    notes: list[str] = []
