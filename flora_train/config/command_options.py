"""What was a command told besides its run or file? `key=value` words, checked like a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from pydantic import ValidationError

from flora_train.config.base import ConfigModel
from flora_train.config.errors import Problem, UserError, choices, did_you_mean
from flora_train.config.paths import check_texts
from flora_train.config.validation_errors import to_user_errors

Options = TypeVar("Options", bound=ConfigModel)


def read_options(kind: type[Options], raw: Mapping[str, object], also: Sequence[str] = ()) -> Options:
    """raw: what `parse_words` found. also: further keys that the command knows, for the error. Raises UserError for unknown keys
    and wrong values."""
    known = [field.alias or name for name, field in kind.model_fields.items()]
    if unknown := [key for key in raw if key not in known]:
        here = choices([*known, *also])
        raise UserError(
            *(Problem(key, None, f"unknown key; here are {here}.{did_you_mean(key, [*known, *also])}") for key in unknown)
        )
    check_texts(raw)
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        raise UserError(*to_user_errors(error, dict(raw))) from None
