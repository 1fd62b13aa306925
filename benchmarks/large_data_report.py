"""The page of large_data.py: one line for every size, source and start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flora_train.runtime.environment import environment

MB = 1e6


@dataclass(frozen=True)
class Measurement:
    """Of one process."""

    source: str
    rows: int
    start: str
    before: float
    """Bytes of RssAnon before the data was loaded."""
    peak: float
    """Largest RssAnon in bytes."""
    load: float
    """Seconds of loading."""
    draw: float
    """Seconds of drawing and collating the steps."""
    first_word: float
    """Seconds until the first line of progress."""
    tokens: float
    disk: float
    """Bytes of the cache."""


def table(measurements: Sequence[Measurement]) -> str:
    lines = [
        "| source | rows | start | peak MB | above 10^4 rows, MB | load s | rows/s | first word s | draw s "
        "| tokens | cache MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    least = {(one.source, one.start): one.peak for one in measurements if one.rows == 10_000}
    for one in measurements:
        smallest = least.get((one.source, one.start))
        above = "" if smallest is None else f"{(one.peak - smallest) / MB:.0f}"
        lines.append(
            f"| {one.source} | {one.rows:,} | {one.start} | {one.peak / MB:.0f} | {above} | {one.load:.1f} "
            f"| {one.rows / one.load:,.0f} | {one.first_word:.1f} | {one.draw:.2f} | {one.tokens:,.0f} "
            f"| {one.disk / MB:.0f} |"
        )
    return "\n".join(lines) + "\n"


def page(measurements: Sequence[Measurement], *, packing: bool, byte_tokens: bool) -> str:
    """The page that is saved."""
    made = environment()
    versions = {"Python": made.python, **made.packages}
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    command = "python benchmarks/large_data.py --save"
    if packing:
        command += " --packing"
    text = "(SmolLM2's tokenizer)"
    if byte_tokens:
        command += " --byte-tokens"
        text = "(199 digits, and a token for each byte, which takes little time)"
    return f"""# Memory and seconds of loading many rows

{shown}; {made.machine.processor}, {made.machine.cpus} cores, shared with other work; commit {made.commit}.
`{command}` prints this file.
Rows of 200 tokens {text} from one .jsonl file, one .parquet file, and a data set of parquet
files on a hub on loopback. `peak` is the largest RssAnon of the main process while it loads the task, draws
200 steps of 16,384 tokens and collates them; each line is a process of its own.

{table(measurements)}"""
