"""Rows are encoded in several processes as in one, and their errors are the same."""

from __future__ import annotations

import io
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import TaskConfig
from flora_train.data import encoding
from flora_train.data.documents import LocatedRow, outline
from flora_train.data.encoding import Chunk, Speed, Workers, encode_chunks
from flora_train.data.encoding_worker import Answer, EncoderArguments, send
from flora_train.data.row_encoders import make_row_encoder

CHUNKS = [
    (number % 2, [LocatedRow({"text": f"row {number} {i}"}, "a.jsonl", i) for i in range(20)])
    for number in range(9)
]


def arguments_for(tokenizer: Any) -> EncoderArguments:
    rows = outline(row for _, chunk in CHUNKS for row in chunk)
    return EncoderArguments(TaskConfig(train="a.jsonl"), tokenizer, rows, 64, "tasks.t")


def encoder_of(arguments: EncoderArguments) -> Any:
    return make_row_encoder(
        arguments.task, arguments.tokenizer, rows=arguments.rows, max_length=64, key="tasks.t"
    )


def contents(encoded: Iterator[Any]) -> list[Any]:
    return [
        (split, example.fate, document.tokens.tolist(), list(document.spans), document.label_bytes)
        for split, examples in encoded
        for example in examples
        for document in example.documents
    ]


def test_two_processes_encode_as_one_in_the_same_order(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = arguments_for(tokenizer)
    encoder = encoder_of(arguments)
    alone = contents(encode_chunks(iter(CHUNKS), encoder, arguments, rows=180, processors=1))
    assert len(alone) == 180
    chunks_of: list[int] = []
    encode = Workers._encode

    def counted(self: Workers, rows: list[LocatedRow]) -> Any:
        chunks_of.append(self.count)
        return encode(self, rows)

    monkeypatch.setattr(Workers, "_encode", counted)
    monkeypatch.setattr(encoding, "START_SECONDS", 0.0)
    monkeypatch.setattr(encoding, "WORTHWHILE", 0.0)
    together = contents(encode_chunks(iter(CHUNKS), encoder, arguments, rows=180, processors=2))
    assert together == alone
    assert chunks_of == [2] * (len(CHUNKS) - encoding.TRIAL_CHUNKS)


def test_an_unusable_row_is_the_same_error_in_another_process(tokenizer: Any) -> None:
    arguments = arguments_for(tokenizer)
    chunks: list[Chunk] = [*CHUNKS[:2], (0, [LocatedRow({"text": ["a list"]}, "a.jsonl", 7)]), *CHUNKS[2:]]
    with pytest.raises(UserError) as here:
        contents(encode_chunks(iter(chunks), encoder_of(arguments), arguments, rows=181, processors=1))
    with Workers(arguments, 1) as workers:
        assert workers.are_ready()
        with pytest.raises(UserError) as there:
            contents(workers.encode(iter(chunks)))
        (process,) = workers._processes
    assert str(there.value) == str(here.value)
    assert process.returncode is not None


def test_a_process_that_is_killed_is_an_error(tokenizer: Any) -> None:
    with Workers(arguments_for(tokenizer), 1) as workers:
        assert workers.are_ready()
        workers._processes[0].kill()
        with pytest.raises(UserError, match=r"tasks\.t: a process that encodes rows ended"):
            contents(workers.encode(iter(CHUNKS)))


def test_a_process_that_is_killed_while_it_answers_is_an_error(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of its answer is there, and not the rest."""
    whole = io.BytesIO()
    send(whole, Answer(failure="x" * 100))
    begun = tmp_path / "answer"
    begun.write_bytes(whole.getvalue()[:-50])
    with Workers(arguments_for(tokenizer), 1) as workers:
        assert workers.are_ready()
        with begun.open("rb") as answer:
            monkeypatch.setattr(workers._processes[0], "stdout", answer)
            with pytest.raises(UserError, match=r"tasks\.t: a process that encodes rows ended"):
                contents(workers.encode(iter(CHUNKS)))


def test_what_cannot_be_sent_is_encoded_here(tokenizer: Any) -> None:
    tokenizer.unsendable = lambda: None
    with Workers(arguments_for(tokenizer), 1) as workers:
        assert not workers.are_ready()


class OfThisProcess:
    """A part of a tokenizer whose module another process cannot import."""

    def __reduce__(self) -> Any:
        return import_module, ("a_module_of_the_main_process",)


def test_what_cannot_be_received_is_encoded_here(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    tokenizer.unknown = OfThisProcess()
    with Workers(arguments_for(tokenizer), 1) as workers:
        assert not workers.are_ready()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("this_thread", "processors", "is_faster"),
    [(0.1, 2, False), (0.1, 16, True), (0.9, 2, True), (1.0, 1, False), (0.0, 16, False)],
)
def test_processes_are_started_where_python_is_the_bottleneck(
    this_thread: float, processors: int, is_faster: bool
) -> None:
    assert (Speed(1.0, this_thread).gain(processors) >= encoding.WORTHWHILE) == is_faster
