"""What do all sections of the configuration have in common?"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationInfo, field_validator, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
Text = Annotated[str, StringConstraints(min_length=1)]


class Section(BaseModel):
    """An unknown key is an error, a validated section never changes, and fields carry their own help.

    Values that contradict each other are found field by field, in the order of the fields: a validator sees in
    `info.data` the valid ones above it, so that one wrong value never hides another.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
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
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation not in (bool, bool | None):
            raise ValueError("is true or false to YAML: give a number, or text in quotes")
        return value
