"""Options of a command, checked like a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import ValidationError

from flora_train.config.base import ConfigModel
from flora_train.config.errors import UserError
from flora_train.config.paths import check_texts
from flora_train.config.validation_errors import to_user_errors

Options = TypeVar("Options", bound=ConfigModel)


def read_options(kind: type[Options], values: Mapping[str, object]) -> Options:
    """values: option -> value, None where the option's default holds. Raises UserError for unknown options
    and wrong values."""
    given = {name: value for name, value in values.items() if value is not None}
    check_texts(given)
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise UserError(*to_user_errors(error, given)) from None
