"""RunInfo: the content of run.json."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)


def _none_if_invalid(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:
        return None


Lenient = WrapValidator(_none_if_invalid)
"""Reads a value of another type, which another version may have written, as None."""
Number = Annotated[StrictInt | None, Lenient]
Text = Annotated[StrictStr | None, Lenient]


class RunPart(BaseModel):
    """A frozen part of run.json. Keys of other versions are ignored."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")


class BaseFiles(RunPart):
    """SHA-256 of a base model's files."""

    weights: StrictStr
    config: StrictStr


class SplitSize(RunPart):
    """Counts of a split."""

    rows: Number = None
    examples: Number = None
    tokens: Number = None


class TaskData(RunPart):
    """What identifies a task's examples."""

    sha256: Text = None
    """Of all examples."""
    train: Annotated[SplitSize | None, Lenient] = None
    validation: Annotated[SplitSize | None, Lenient] = None
    test: Annotated[SplitSize | None, Lenient] = None
    labels: Annotated[list[StrictStr] | None, Lenient] = None
    """Of a task whose adapters have heads: its labels, in the order of their outputs."""


class TrainingCosts(BaseModel):
    """Where, with what and at what cost the run was trained; the report validates the other keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="allow")

    seconds: dict[str, JsonValue] = {}
    """Stage -> wall-clock time."""

    @property
    def evaluation_seconds(self) -> float:
        """Time of the evaluations during training."""
        seconds = self.seconds.get("evaluate during training")
        if isinstance(seconds, int | float):
            return float(seconds)
        return 0.0


class EndedRun(RunPart):
    """What a run that ended needs in order to be extended."""

    joined: dict[str, StrictInt] = {}
    """Task -> the first step with it, counted from 0."""
    identity: dict[str, JsonValue] = {}
    """What the run that continues it must have in common with it."""


class RunInfo(RunPart):
    """The content of run.json that is read again. What was not recorded is None or empty."""

    finished: StrictBool
    started: StrictStr = ""
    """ISO 8601 time."""
    base_dtype: Text = None
    base: Annotated[BaseFiles | None, Lenient] = None
    tokenizer: Text = None
    """SHA-256 of the tokenizer."""
    data: Annotated[dict[str, Annotated[TaskData | None, Lenient]] | None, Lenient] = None
    """Task -> its examples."""
    hub_commits: Annotated[dict[str, StrictStr] | None, Lenient] = None
    """Repository on the hub and revision -> the commit that was read."""
    training: TrainingCosts = TrainingCosts()
    ended: EndedRun | None = None
    """None: the run has not finished, or an older version finished it."""
    allowed: Annotated[list[JsonValue] | None, Lenient] = None
    """Differences that commands were allowed to ignore."""
    metrics_size: Number = None
    """Bytes of metrics.jsonl when the run finished."""
    metrics_sha256: Text = None


def first_problem(error: ValidationError) -> str:
    """Key and reason of the first error."""
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    return f"{key}: {problem['msg']}"
