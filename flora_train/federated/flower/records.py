"""Arrays and facts as records of Flower's messages, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.federated.arrays import Shape, bytes_of_numbers, read_array
from flora_train.federated.remote import Answer, Fact, told

VALUES, FACTS = "values", "facts"
"""Names of the records: the values of an adapter, and what is said about them."""
ERROR = "error"
"""The fact of a client that can send no values: why."""
NUMPY = "numpy.ndarray"
"""How Flower calls bytes of numpy's format."""


def array_record(arrays: Sequence[NDArray[Any]]) -> ArrayRecord:
    """Arrays in their order."""
    named = {f"{place:06}": Array.from_numpy_ndarray(array) for place, array in enumerate(arrays)}
    return ArrayRecord(named)


def arrays_in(
    content: RecordDict, name: str, shapes: Mapping[str, Shape] | None = None
) -> list[NDArray[Any]]:
    """The arrays of a record in their order.

    Args:
        content: Of a message.
        name: Of the record.
        shapes: Tensor -> the shape that its array must have, in their order. Default: any arrays.

    Returns:
        The arrays, which cannot be written to.

    Raises:
        UserError: There is no such record, it does not hold arrays of real numbers, or others than expected.
    """
    record = content.array_records.get(name)
    if record is None:
        raise user_error(name, None, "is missing in the message")
    keys = sorted(record)
    if shapes is None:
        return [_array(record[key], f"{name}.{key}", None) for key in keys]
    if len(keys) != len(shapes):
        raise user_error("arrays", len(keys), f"this adapter has {len(shapes)} tensors")
    found = []
    for key, (tensor, shape) in zip(keys, shapes.items(), strict=True):
        found.append(_array(record[key], tensor, shape))
    return found


def _array(array: Array, name: str, shape: Shape | None) -> NDArray[Any]:
    if array.stype != NUMPY:
        raise user_error(name, array.stype, f"is not of numpy's format, {NUMPY}")
    return read_array(array.data, name, shape)


def bytes_in(content: RecordDict, name: str = VALUES) -> int:
    """The bytes of the numbers in a record, whether or not they can be read; 0 if there is none."""
    record = content.array_records.get(name)
    if record is None:
        return 0
    return sum(bytes_of_numbers(array.data) for array in record.values())


def facts_in(content: RecordDict, name: str = FACTS) -> dict[str, Any]:
    """The facts of a record; none if there is no such record."""
    record = content.config_records.get(name)
    return {} if record is None else dict(record)


def packed(answer: Answer) -> RecordDict:
    """A client's answer."""
    facts: Mapping[str, Fact] = answer.facts
    return RecordDict({VALUES: array_record(answer.arrays), FACTS: ConfigRecord(dict(facts))})


def unpacked(content: RecordDict, shapes: Mapping[str, Shape] | None = None) -> Answer:
    """The answer in a message.

    Args:
        content: Of the message.
        shapes: Tensor -> its shape, as for `arrays_in`.

    Returns:
        The answer.

    Raises:
        UserError: It is none, or the client says why it has none.
    """
    facts = facts_in(content)
    if ERROR in facts:
        raise user_error("client", None, told(facts[ERROR]))
    return Answer(arrays_in(content, VALUES, shapes), facts)
