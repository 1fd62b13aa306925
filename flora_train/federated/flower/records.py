"""Arrays and facts as records of Flower's messages, in both directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from flora_train.config.errors import user_error
from flora_train.federated.remote import Answer, Fact, told

VALUES, FACTS = "values", "facts"
"""Names of the records: the values of an adapter, and what is said about them."""
ERROR = "error"
"""The fact of a client that can send no values: why."""


def array_record(arrays: Sequence[NDArray[Any]]) -> ArrayRecord:
    """Arrays in their order."""
    named = {f"{place:06}": Array.from_numpy_ndarray(array) for place, array in enumerate(arrays)}
    return ArrayRecord(named)


def arrays_in(content: RecordDict, name: str) -> list[NDArray[Any]]:
    """The arrays of a record in their order.

    Args:
        content: Of a message.
        name: Of the record.

    Returns:
        The arrays.

    Raises:
        UserError: There is no such record, or it does not hold arrays.
    """
    record = content.array_records.get(name)
    if record is None:
        raise user_error(name, None, "is missing in the message")
    try:
        return [record[key].numpy() for key in sorted(record)]
    except (TypeError, ValueError, EOFError, OSError) as error:
        raise user_error(name, None, f"does not hold arrays ({type(error).__name__})") from error


def facts_in(content: RecordDict, name: str = FACTS) -> dict[str, Any]:
    """The facts of a record; none if there is no such record."""
    record = content.config_records.get(name)
    return {} if record is None else dict(record)


def packed(answer: Answer) -> RecordDict:
    """A client's answer."""
    facts: Mapping[str, Fact] = answer.facts
    return RecordDict({VALUES: array_record(answer.arrays), FACTS: ConfigRecord(dict(facts))})


def unpacked(content: RecordDict) -> Answer:
    """The answer in a message. Raises UserError if it is none."""
    facts = facts_in(content)
    if ERROR in facts:
        raise user_error("client", None, told(facts[ERROR]))
    return Answer(arrays_in(content, VALUES), facts)
