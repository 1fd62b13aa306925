"""What happens to an adapter that goes wrong? When its step counts as bad, and what follows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from flora_train.config.section import Section


class GuardConfig(Section):
    policy: Literal["skip", "rollback", "quarantine"] = "skip"
    """What follows a bad step: a loss or gradient that is not finite, or a spike. skip: the adapter is left as it was. rollback: it
    goes back to where it was at the last checkpoint step, moments included, and trains on. quarantine: it goes back and learns no
    more; its rows stay in the batch, so that other adapters are the same to the last bit whatever happens to it."""
    spike: float | None = Field(None, gt=1, le=1e9)
    """A step's loss more than so many times the median of the adapter's last good ones is a spike. Default: none is."""
    window: int | None = Field(None, ge=4, le=10_000, validate_default=True)
    """spike: how many losses the median is of; nothing is a spike until there are so many. Default: 16."""
    rollbacks: int | None = Field(None, ge=1, le=1_000_000, validate_default=True)
    """rollback: after so many the next bad step is quarantine. Default: 3."""

    @field_validator("window", "rollbacks")
    @classmethod
    def _belongs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.field_name == "window" and info.data.get("spike") is None:
            raise ValueError("says what a spike is measured by, and no spike is looked for: give guard.spike, too, or remove it")
        if value is not None and info.field_name == "rollbacks" and info.data.get("policy") not in ("rollback", None):
            raise ValueError("has no meaning but for policy=rollback: remove it")
        return value
