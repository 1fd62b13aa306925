"""Base class of typed results, intervals, and the reading of results from JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    ValidationError,
    model_serializer,
)

from flora_train.config.errors import did_you_mean, user_error
from flora_train.config.json_format import read_object
from flora_train.runtime.json_types import Count, Text

__all__ = [
    "Confidence",
    "Count",
    "Interval",
    "Measurement",
    "Number",
    "ResultModel",
    "Seconds",
    "SparseModel",
    "Text",
    "read_results",
    "validate_results",
]

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number; true and false are none."""
Measurement = Annotated[Number, Field(ge=-1e100, le=1e100)]
"""A number that can be drawn: sums and multiples of it are finite."""
Seconds = Annotated[Number, Field(ge=0, le=1e12)]
Confidence = Annotated[Number, Field(gt=0, lt=1)]
"""The confidence of intervals, such as 0.95."""


class ResultModel(BaseModel):
    """A frozen part of the results. Unknown keys and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values of some fields, validated."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**{**fields, **changes})


class SparseModel(ResultModel):
    """A part of the results with fields that few runs have, such as those of several seeds."""

    written_if_set: ClassVar[tuple[str, ...]] = ()
    """Fields that files contain only where they differ from their default."""

    @model_serializer(mode="wrap")
    def _without_defaults(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name in self.written_if_set:
            if getattr(self, name) == type(self).model_fields[name].default:
                content.pop(name, None)  # there is none if the caller excludes None
        return content


class Interval(SparseModel):
    """A value and its bootstrap percentile interval. What is not finite is None, as JSON has no NaN."""

    written_if_set = ("deviation",)

    value: Measurement | None
    low: Measurement | None
    high: Measurement | None
    excludes_zero: StrictBool
    """Whether the sign of the value is clear. Never true for an interval from a single example."""
    deviation: Annotated[Measurement, Field(ge=0)] | None = None
    """Standard deviation over seeds, where the value is the mean over several seeds."""

    @property
    def finite(self) -> tuple[float, float, float] | None:
        """Value, low and high; None unless all three are finite."""
        if self.value is None or self.low is None or self.high is None:
            return None
        return self.value, self.low, self.high

    def negated(self) -> Interval:
        """The interval of minus the value."""
        if self.finite is None:
            return self
        value, low, high = self.finite
        return Interval(
            value=-value,
            low=-high,
            high=-low,
            excludes_zero=self.excludes_zero,
            deviation=self.deviation,
        )


Model = TypeVar("Model", bound=ResultModel)


def read_results(path: Path, model: type[Model], hint: str) -> Model:
    """The results in a JSON file. hint: how a user renews a damaged file. Raises UserError, which names the
    first wrong key."""
    return validate_results(path, read_object(path, hint), model, hint)


def validate_results(path: Path, content: object, model: type[Model], hint: str) -> Model:
    """`content` of the file at `path` as results. Raises UserError, which names the first wrong key."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        reason = _first_problem(error, model)
        raise user_error(
            str(path), None, f"is damaged, or was written by another version ({reason}): {hint}"
        ) from error


def _first_problem(error: ValidationError, model: type[ResultModel]) -> str:
    """Key and reason of the first error, such as `results.0.examples: Input should be a valid integer`."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key.{did_you_mean(key, model.model_fields)}"
    return f"{key}: {message}".removeprefix(": ")
