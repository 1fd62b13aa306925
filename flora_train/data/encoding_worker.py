"""Program of a process that encodes rows for another one: requests on standard input, answers on standard
output, each a pickle after its length.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from flora_train.config.errors import Problem, UserError, first_line
from flora_train.config.task_schema import TaskConfig
from flora_train.data.documents import EncodedExample, RowsOutline

LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class EncoderArguments:
    """What an encoder is made of, the first request."""

    task: TaskConfig
    tokenizer: Any
    rows: RowsOutline
    max_length: int
    key: str


@dataclass(frozen=True)
class Answer:
    """Encoded rows, or why there are none."""

    examples: Sequence[EncodedExample] = ()
    problems: tuple[Problem, ...] = ()
    failure: str | None = None
    """An error that is not the user's."""


def send(file: IO[bytes], content: object) -> None:
    data = pickle.dumps(content, protocol=pickle.HIGHEST_PROTOCOL)
    file.write(LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """Raises EOFError where the other process has ended."""
    header = file.read(LENGTH.size)
    if len(header) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(header)
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)


def main() -> None:
    """Answer requests until the other process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    logging.disable(logging.WARNING)  # the other process has said it
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    requests = sys.stdin.buffer
    try:
        try:
            encode = _encoder(receive(requests))
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            # of a module that only the other process has, which encodes the rows itself
            send(answers, Answer(failure=first_line(error)))
            return
        send(answers, Answer())
        while True:
            send(answers, encode(receive(requests)))
    except (EOFError, BrokenPipeError):
        return


def _encoder(arguments: EncoderArguments) -> Any:
    from flora_train.data.row_encoders import make_row_encoder

    encoder = make_row_encoder(
        arguments.task,
        arguments.tokenizer,
        rows=arguments.rows,
        max_length=arguments.max_length,
        key=arguments.key,
    )

    def encode(rows: Any) -> Answer:
        try:
            return Answer(examples=list(encoder.encode(rows)))
        except UserError as error:
            return Answer(problems=tuple(error.problems))
        except Exception as error:  # for the other process, which ends with it
            return Answer(failure=f"{type(error).__name__}: {first_line(error)}")

    return encode
