"""Memory and seconds of loading a task of many rows, drawing from it and making batches.

Every size and source is loaded twice in processes of its own: with an empty cache, and from it. Memory is the
peak of RssAnon, the resident memory that no file backs, sampled from /proc/self/status.

Usage: python benchmarks/large_data.py [--rows 10000 100000 1000000] [--sources jsonl parquet hub]
       [--packing] [--byte-tokens] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from large_data_report import Measurement, page, table

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "large_data.md"
MODEL = ROOT / "assets" / "models" / "smollm2-135m"
sys.path.insert(0, str(ROOT))
SOURCES = ("jsonl", "parquet", "hub")
HUB_NAME = "example/many-rows"
SHARD_ROWS = 100_000
"""Rows of a parquet file on the hub."""
TOKENS = 200
"""Tokens of a row, on average, with its end token."""
MAX_LENGTH = 512
STEPS, TOKENS_PER_STEP = 200, 16_384
"""Steps that are drawn and collated after loading."""
SAMPLE_SECONDS = 0.02


class PeakMemory(threading.Thread):
    """Samples RssAnon of this process until `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = self.now()
        self._stopped = threading.Event()

    def run(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self.now())

    def stop(self) -> int:
        """The peak in bytes."""
        self._stopped.set()
        self.join()
        return self.peak

    @staticmethod
    def now() -> int:
        with open("/proc/self/status", encoding="ascii") as file:
            line = next(line for line in file if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024


class FirstWord:
    """A stream that notes when something was first written to it."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.seconds: float | None = None
        self.text: list[str] = []

    def write(self, text: str) -> int:
        if self.seconds is None and text.strip():
            self.seconds = time.monotonic() - self.started
        self.text.append(text)
        return len(text)

    def flush(self) -> None:
        """Nothing is buffered."""

    def isatty(self) -> bool:
        return False


def vocabulary(tokenizer: Any) -> list[str]:
    """Words that are one token each after a space."""
    words = [token[1:] for token in tokenizer.get_vocab() if token.startswith("\u0120")]
    return sorted(word for word in words if word.isascii() and word.isalpha() and len(word) > 2)


def texts(words: Sequence[str], rows: int) -> Iterator[str]:
    """Seeded texts of 100 to 298 words, 199 on average."""
    random = np.random.default_rng(0)
    array = np.array(words, dtype=object)
    for _ in range(rows):
        yield " ".join(array[random.integers(0, len(array), random.integers(100, 299))])


def digits(rows: int) -> Iterator[str]:
    """Different texts of TOKENS - 1 bytes."""
    yield from (f"{number:0{TOKENS - 1}}" for number in range(rows))


def byte_tokenizer() -> Any:
    """A tokenizer with a token for each byte, which is fast."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def write_rows(folder: Path, source: str, rows: int, byte_tokens: bool) -> dict[str, Any]:
    """Write a source. Returns its configuration."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    found = digits(rows)
    if not byte_tokens:
        found = texts(vocabulary(AutoTokenizer.from_pretrained(MODEL)), rows)
    if source == "jsonl":
        path = folder / f"{rows}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in found)
        return {"files": [str(path)]}
    repository = folder / f"hub-{rows}" if source == "hub" else folder
    repository.mkdir(exist_ok=True)
    shards = -(-rows // SHARD_ROWS) if source == "hub" else 1
    schema = pa.schema([("text", pa.string())])
    for shard in range(shards):
        name = f"{rows}.parquet" if source != "hub" else f"train-{shard:05d}-of-{shards:05d}.parquet"
        left = min(rows - shard * SHARD_ROWS, SHARD_ROWS) if source == "hub" else rows
        with pq.ParquetWriter(repository / name, schema) as file:
            while left:
                batch = [next(found) for _ in range(min(left, 10_000))]
                file.write_table(pa.table({"text": batch}, schema=schema))
                left -= len(batch)
    if source == "hub":
        return {"hub": HUB_NAME}
    return {"files": [str(repository / f"{rows}.parquet")]}


@contextmanager
def served(folder: Path, rows: int) -> Iterator[dict[str, str]]:
    """The environment of a hub on loopback with the data set in `folder`."""
    from tests.hub_server import TOKEN, serve

    with serve() as hub, TemporaryDirectory() as cache:
        hub.add_folder(HUB_NAME, folder / f"hub-{rows}", "dataset")
        yield {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": cache,
        }


def configuration(source: dict[str, Any], packing: bool) -> dict[str, Any]:
    return {
        "name": "large",
        "model": {"path": str(MODEL)},
        "tasks": {"t": {"train": source, "packing": packing, "max_validation_examples": 1000}},
        "adapters": {"ia3": {"method": "ia3", "lr": 1e-3}},
        "training": {"steps": STEPS, "max_length": MAX_LENGTH, "tokens_per_step": TOKENS_PER_STEP},
    }


def load_and_draw(raw: dict[str, Any], cache: Path, byte_tokens: bool) -> dict[str, float]:
    """Load a task, then draw and collate. Returns what was measured."""
    from flora_train.config.load import validate
    from flora_train.data.batch import Row, collate
    from flora_train.data.mixture import Stream, TaskMixture
    from flora_train.data.task import load_tasks
    from flora_train.models.loading import load_tokenizer

    config = validate(raw)
    tokenizer = byte_tokenizer()
    if not byte_tokens:
        tokenizer = load_tokenizer(config.model)
    before = PeakMemory.now()
    started = time.monotonic()
    output = FirstWord(started)
    sys.stderr = output  # type: ignore[assignment]
    from flora_train.runtime.logging import init_logging

    init_logging()
    memory = PeakMemory()
    memory.start()
    task = load_tasks(config, tokenizer, cache)["t"]
    loaded = time.monotonic() - started
    split = task.train
    stream = Stream("t", split.lengths, 1.0, {"t-ia3": STEPS})
    mixture = TaskMixture([stream], config.mixture, TOKENS_PER_STEP, 0)
    for step in range(STEPS):
        drawn = [example for draw in mixture.step(step) for example in draw.examples]
        rows = [Row(0, "t", example, int(stream.lengths[example])) for example in drawn]
        collate(rows, lambda task: split, 0)
    sys.stderr = sys.__stderr__
    first = loaded if output.seconds is None else output.seconds
    return {
        "before": before,
        "peak": memory.stop(),
        "load": loaded,
        "draw": time.monotonic() - started - loaded,
        "first_word": first,
        "tokens": task.train.counts.tokens + task.validation.counts.tokens,
        "disk": sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()),
    }


def in_its_own_process(
    raw: dict[str, Any], cache: Path, environment: dict[str, str], byte_tokens: bool
) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", json.dumps(raw), str(cache)]
    command += ["--byte-tokens"] * byte_tokens
    paths = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        command, env={**os.environ, **environment, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"loading failed: {done.stdout}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(folder: Path, source: str, rows: int, *, packing: bool, byte_tokens: bool) -> list[Measurement]:
    """With an empty cache, and from the cache."""
    raw = configuration(write_rows(folder, source, rows, byte_tokens), packing)
    measurements = []
    with ExitStack() as stack, TemporaryDirectory(dir=folder) as cache:
        environment = stack.enter_context(served(folder, rows)) if source == "hub" else {}
        for start in ("empty cache", "cached"):
            measured = in_its_own_process(raw, Path(cache) / "tokens", environment, byte_tokens)
            measurements.append(Measurement(source, rows, start, **measured))
            print(measurements[-1], file=sys.stderr, flush=True)
    return measurements


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--packing", action="store_true")
    hint = "rows of 199 digits and a token for each byte: for memory, in a tenth of the time"
    parser.add_argument("--byte-tokens", action="store_true", help=hint)
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        raw, cache = options.load
        print(json.dumps(load_and_draw(json.loads(raw), Path(cache), options.byte_tokens)))
        return
    measurements = []
    with TemporaryDirectory(prefix="large_data_") as name:
        for source in options.sources:
            for rows in options.rows:
                measurements += measure(
                    Path(name), source, rows, packing=options.packing, byte_tokens=options.byte_tokens
                )
    text = page(measurements, packing=options.packing, byte_tokens=options.byte_tokens)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")
    print(table(measurements) if not options.save else text)


if __name__ == "__main__":
    main()
