"""The base class of all sections of the configuration, and limits and types that several of them use."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

LONGEST_NAME = 200
"""Characters of a name. Files are named after it, and a file name has at most 255 bytes with ending and
prefix."""
LONGEST_PART, LONGEST_PATH = 255, 3500
"""Bytes of a part of a path, and of a path, which leaves room for the files of a run below it."""
MOST_STEPS = 10_000_000
MOST_ROWS = 1_000_000_000
"""Rows or examples of one split."""
MOST_TOKENS = 100_000_000
"""Tokens of a step."""
MOST_PROCESSES = 1024
"""Threads or processes that work at the same time on one machine."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=LONGEST_NAME)]


def _possible_path(text: str) -> str:
    """A path that the file system accepts, which would otherwise fail in the middle of a run."""
    if (
        max(len(part.encode()) for part in text.split("/")) > LONGEST_PART
        or len(text.encode()) > LONGEST_PATH
    ):
        raise ValueError(
            f"is too long for a path: at most {LONGEST_PATH:,} bytes, and {LONGEST_PART} between two slashes"
        )
    return text


Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
PathText = Annotated[Text, AfterValidator(_possible_path)]
"""A file, a folder, a glob, or a name on the hub."""


def _as_written(value: Any) -> Any:
    """A tag such as 1.10 would otherwise be another one."""
    if isinstance(value, float):
        raise ValueError(
            "is a number to YAML, which leaves no trace of how it was written: put it in quotes "
            "(on a command line in two kinds: '\"1.10\"')"
        )
    return value


Revision = Annotated[str | None, BeforeValidator(_as_written)]
"""A branch, tag or commit on the hub."""


class ConfigModel(BaseModel):
    """Base of all sections: unknown keys are errors, sections are immutable, and fields have docstrings.

    Contradictions are found field by field, in the order of the fields: a validator sees the valid fields
    above it in `info.data`, so that one wrong value never hides another.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="before")
    @classmethod
    def _nothing_is_no_keys(cls, value: Any) -> Any:
        """`training:` with nothing below it."""
        return {} if value is None else value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Without this, `steps: yes` would be one step."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (
            bool,
            bool | None,
        ):
            raise ValueError("is true or false to YAML: give a number, or text in quotes")
        return value
