"""Encodes rows in order: in this process, or in several where that is faster."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Self

from flora_train.config.errors import UserError, user_error
from flora_train.data.documents import EncodedExample, LocatedRow, RowEncoder
from flora_train.data.encoding_worker import Answer, EncoderArguments, receive, send

Chunk = tuple[int, list[LocatedRow]]
"""Number of a split, and some of its rows."""
Encoded = tuple[int, Sequence[EncodedExample]]

TRIAL_CHUNKS = 2
"""Chunks that are encoded in this process before it is decided whether others join."""
EFFICIENCY = 0.8
"""Share of a processor that another process turns into tokens; the rest is passing rows and tokens on."""
WORTHWHILE = 1.25
"""Gain in speed from which on other processes are started."""
START_SECONDS = 20.0
"""Work for each process from which on other processes are started."""
MOST_WORKERS = 16
AHEAD = 2
"""Chunks for each process that are read before they are needed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Speed:
    """Processor seconds of encoding some rows."""

    all_threads: float
    this_thread: float
    """What Python does, on one processor."""

    def gain(self, processors: int) -> float:
        """How many times as fast that many processes are as one with as many threads."""
        serial = min(1.0, self.this_thread / max(self.all_threads, 1e-9))
        return (serial + (1 - serial) / processors) * processors * EFFICIENCY


def encode_chunks(
    chunks: Iterator[Chunk], encoder: RowEncoder, arguments: EncoderArguments, *, rows: int, processors: int
) -> Generator[Encoded]:
    """The encoded rows of every chunk, in order. arguments: those of `encoder`; rows: of all chunks;
    processors: that other processes may use.
    """
    done = 0
    all_threads = this_thread = 0.0
    for count, (split, of_split) in enumerate(chunks, start=1):
        process, thread = time.process_time(), time.thread_time()
        examples = list(encoder.encode(of_split))
        all_threads += time.process_time() - process
        this_thread += time.thread_time() - thread
        done += len(examples)
        yield split, examples
        left = all_threads * (rows - done) / done
        if count != TRIAL_CHUNKS or left < START_SECONDS * processors:
            continue
        if Speed(all_threads, this_thread).gain(processors) < WORTHWHILE:
            continue
        with Workers(arguments, min(processors, MOST_WORKERS)) as workers:
            if workers.are_ready():
                yield from workers.encode(chunks)
                return


class Workers:
    """Processes that encode rows. They import nothing of the main program, and no GPU is used in them. Use it
    as a context."""

    def __init__(self, arguments: EncoderArguments, count: int) -> None:
        self.arguments, self.count = arguments, count
        self._processes: list[subprocess.Popen[bytes]] = []
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def __enter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self.count)
        command = [sys.executable, "-c", "from flora_train.data.encoding_worker import main; main()"]
        for _ in range(self.count):
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=_environment()
            )
            self._processes.append(process)
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()

    def are_ready(self) -> bool:
        """Whether the encoder could be made in every process. A tokenizer of a module that only the main
        program has cannot."""
        try:
            answers = list(self._threads.map(self._start, self._processes))
        except Exception as error:  # pickle raises many types
            logger.debug("rows are encoded in one process: %s", error)
            return False
        return not any(answer.failure or answer.problems for answer in answers)

    def encode(self, chunks: Iterator[Chunk]) -> Iterator[Encoded]:
        """The encoded rows of every chunk, in order. Raises UserError for rows that cannot be used."""
        waiting: deque[tuple[int, Future[Answer]]] = deque()
        for split, rows in chunks:
            waiting.append((split, self._threads.submit(self._encode, rows)))
            if len(waiting) >= AHEAD * self.count:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def _result(self, split: int, answer: Future[Answer]) -> Encoded:
        try:
            result = answer.result()
        except (EOFError, OSError) as error:
            hint = "a process that encodes rows ended: is there enough memory? Run again"
            raise user_error(self.arguments.key, None, hint) from error
        if result.problems:
            raise UserError(*result.problems)
        if result.failure is not None:
            raise RuntimeError(result.failure)
        return split, result.examples

    def _start(self, process: subprocess.Popen[bytes]) -> Answer:
        answer = _ask(process, self.arguments)
        self._idle.put(process)
        return answer

    def _encode(self, rows: Sequence[LocatedRow]) -> Answer:
        """The answer of an idle process."""
        process = self._idle.get()
        try:
            return _ask(process, rows)
        finally:
            self._idle.put(process)


def _ask(process: subprocess.Popen[bytes], request: object) -> Answer:
    assert process.stdin is not None
    assert process.stdout is not None
    send(process.stdin, request)
    answer: Answer = receive(process.stdout)
    return answer


def _environment() -> dict[str, str]:
    """Of a process with one thread and without a GPU that imports what this one can."""
    package = str(Path(__file__).resolve().parents[2])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([package, *filter(None, sys.path)]),
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
