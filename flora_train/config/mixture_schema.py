"""Which task does the next example come from?"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.section import MOST_STEPS, Section


class MixtureConfig(Section):
    strategy: Literal["uniform", "proportional", "temperature", "fair"] = "fair"
    """Which task the next example comes from. uniform: by weight. proportional: by weight x examples.
    temperature: proportional ** (1 / temperature). fair: the task with the fewest tokens served so far,
    per weight (virtual token counter)."""
    temperature: float | None = Field(None, ge=0.01, le=1_000_000, validate_default=True)
    """temperature strategy only (1 is proportional, large is uniform)."""
    examples_per_draw: int = Field(1, ge=1, le=1_000_000)
    """Consecutive examples of a task that enter a step together: the least batch of an adapter's step."""

    active_tasks: int | None = Field(None, ge=1, le=1_000_000)
    """fair only: so many tasks take part at a time, those with the fewest tokens so far; the others wait for their turn. With many more
    adapters than the device has room for (adapters.device_slots) their numbers then move once a turn, not every step. Default: all."""
    turn_steps: int | None = Field(None, ge=1, le=MOST_STEPS, validate_default=True)
    """active_tasks: steps of a turn. Default: 20."""

    @field_validator("active_tasks", "turn_steps")
    @classmethod
    def _turns_belong_to_fair(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("strategy", "fair") != "fair":
            raise ValueError("is for strategy=fair, which knows whose turn it is: remove it")
        if value is not None and info.field_name == "turn_steps" and info.data.get("active_tasks") is None:
            raise ValueError("is how long active_tasks take part, and all do: give both, or remove it")
        return value

    @field_validator("temperature")
    @classmethod
    def _belongs_to_its_strategy(cls, temperature: float | None, info: ValidationInfo) -> float | None:
        if "strategy" in info.data and (temperature is not None) != (info.data["strategy"] == "temperature"):
            raise ValueError("temperature and strategy=temperature go together: give both or neither")
        return temperature
