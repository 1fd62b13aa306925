"""A copy of a model's modules that shares its weights."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain
from typing import Any


def shared_copy(model: Any) -> Any:
    """A copy whose modules can be wrapped without changing the model, and whose weights are the model's."""
    tensors = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})
