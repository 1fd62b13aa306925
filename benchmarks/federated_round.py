"""One simulated round of 64 federated clients in one bank, against the same clients one by one in PEFT.

MiniLM-L6 with LoRA of rank 8 on query and value and a head of 21 labels; every client trains 5 steps of 8
texts from the global adapter with a fresh AdamW; then the server averages the factors (FedAvg). `bank`: the
clients are adapters that share forward passes, all or some of them at once. `peft`: plain torch and PEFT, one
model that is loaded once, on which the clients take turns. Both read the same batches with the same loss,
clipping, rates and threads, in float32: random tokens of one length, so that nothing is padded; then of the
lengths of the recipe's texts, where PEFT pads the batch of a client, and the bank orders the rows of all
clients by length. `base alone`: forward and backward of the bank's batches through the frozen base, without
adapters: no way of training on all tokens takes less. First both averages are compared: they must agree to
1e-4. The ways take turns; times are medians, and ratios medians over the rounds. Peak memory is measured in a
process for each way, above what it has with the base loaded.

Usage: python benchmarks/federated_round.py [--save] [--repeats N] [--lengths N ...] [--profile]
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from contenders.bank_clients import BATCH, MICROBATCH, BankClients, ClientTexts
from contenders.peft_clients import PeftClients, load_classifier
from large_data import PeakMemory
from torch import Tensor
from transformers import AutoTokenizer

from flora_train.config.model_schema import ModelConfig
from flora_train.export.peft_format import peft_tensors
from flora_train.federated.server import aggregate
from flora_train.federated.simulation import Simulation
from flora_train.federated.updates import ClientUpdate
from flora_train.models.loading import load_base_model, set_mode
from flora_train.runtime.environment import available_cpus, environment
from flora_train.training.pooling import sum_of

RESULT = Path(__file__).parent / "results" / "federated_round_cpu.md"
MODEL = "assets/models/minilm-l6"
LABELS, STEPS = 21, 5
CLIENTS, AT_ONCE, LENGTHS = 64, (8, 16, 64), (20, 64)
LONGEST = 64
"""Tokens that are read of a text, as in the recipe."""
TOLERANCE = 1e-4
"""Largest difference of the averages of both sides."""
GOAL = 3.0
SERVER_STEPS = ("factor_mean", "product_mean", "fedex")
PEFT, BASE = "peft", "base alone"
TEXTS = "assets/federated_local/train.jsonl"
Round = Callable[[], object]


class Setup:
    """Both sides, with the same clients.

    Args:
        model: Folder of the base.
        clients: Their number.
        lengths: Tokens of a text, one of which is drawn for each.
    """

    def __init__(self, model: str, clients: int, lengths: Sequence[int]) -> None:
        base = load_bank_base(model)
        texts = texts_of(base, clients, lengths)
        self.bank = BankClients(base, texts)
        self.peft = PeftClients(load_classifier(model, LABELS), texts.spec, texts.config.training)
        self.batches = texts.batches()
        self.start = self.exported(self.bank.simulation("factor_mean"))
        self.averaged = self.exported(self.bank.round("factor_mean"))

    def exported(self, simulation: Simulation) -> dict[str, Tensor]:
        """The global adapter as PEFT names it."""
        adapter = self.bank.texts.clients[0].adapter
        simulation.load_global(adapter)
        return {name: tensor.clone() for name, tensor in peft_tensors(self.bank.bank, adapter).items()}

    def peft_round(self) -> dict[str, Tensor]:
        """A round of the clients in turn."""
        return self.peft.round(self.start, self.batches)

    def difference(self) -> float:
        """The largest difference of the averages of both sides."""
        theirs = self.peft_round()
        if theirs.keys() != self.averaged.keys():
            raise SystemExit(f"error: names differ: {sorted(theirs.keys() ^ self.averaged.keys())[:4]}")
        return max(float((theirs[name] - own).abs().max()) for name, own in self.averaged.items())

    def moved(self) -> float:
        """The largest change of a value in the round."""
        return max(float((own - self.start[name]).abs().max()) for name, own in self.averaged.items())

    def ways(self, at_once: Sequence[int]) -> dict[str, Round]:
        """Way -> its round."""
        found: dict[str, Round] = {PEFT: self.peft_round}
        for count in at_once:
            found[bank_way(count)] = partial(self.bank.round, "factor_mean", count)
        found[BASE] = self.base_round
        return found

    def base_round(self) -> None:
        """Forward and backward of all batches of the bank through the base alone."""
        trainer = self.bank.trainer
        set_mode(trainer.model, training=True)
        for rows in self.bank.microbatches():
            batch = trainer.make_batch(rows)
            with self.bank.bank.without_adapters():
                sum_of(trainer.row_losses.outputs(batch)).backward()


def load_bank_base(model: str) -> Any:
    """The frozen body."""
    config = ModelConfig(path=model, dtype="float32", attn_implementation="eager")
    return load_base_model(config, torch.device("cpu")).requires_grad_(False)


def texts_of(base: Any, clients: int, lengths: Sequence[int]) -> ClientTexts:
    """The clients' texts."""
    vocabulary = base.config.vocab_size
    return ClientTexts(clients, lengths, steps=STEPS, labels=LABELS, vocabulary=vocabulary)


def bank_way(at_once: int) -> str:
    """How tables call it."""
    return f"bank, {at_once} at once"


def measured(ways: dict[str, Round], repeats: int, title: str) -> dict[str, list[float]]:
    """Way -> seconds of each round, after one that is not counted; the ways take turns."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(repeats + 1):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            taken = time.perf_counter() - started
            if number > 0:
                seconds[way].append(taken)
            print(f"{title}: round {number} of {repeats}, {way}: {taken:.2f} s", file=sys.stderr, flush=True)
    return seconds


def server_seconds(bank: BankClients, repeats: int) -> dict[str, float]:
    """Algorithm -> seconds of the server's step on the updates of all clients (median)."""
    updates: list[ClientUpdate] = []

    def keep(update: ClientUpdate) -> ClientUpdate:
        updates.append(update)
        return update

    simulation = bank.simulation("factor_mean")
    simulation.deliver = keep
    simulation.round()
    found = {}
    for algorithm in SERVER_STEPS:
        taken = []
        for _ in range(repeats):
            started = time.perf_counter()
            aggregate(bank.start, updates, algorithm)
            taken.append(time.perf_counter() - started)
        found[algorithm] = median(taken)
    return found


def peak_bytes(model: str, way: str, clients: int, lengths: Sequence[int]) -> int:
    """Peak memory of a round above what the process has with base and texts; to be called in a fresh one."""
    base = load_classifier(model, LABELS) if way == PEFT else load_bank_base(model)
    texts = texts_of(base, clients, lengths)
    batches = texts.batches()
    with torch.no_grad():
        base(**batches[0][1][0][0])  # threads and buffers of the libraries
    sampler = PeakMemory()
    before = sampler.now()
    sampler.start()
    if way == PEFT:
        peft = PeftClients(base, texts.spec, texts.config.training)
        peft.round(peft.state(), batches)
    else:
        BankClients(base, texts).round("factor_mean", int(way.split()[1]))
    return sampler.stop() - before


def peak_in_child(model: str, way: str, clients: int, lengths: Sequence[int]) -> int:
    """`peak_bytes` in a process of its own."""
    child = [sys.executable, __file__, "--model", model, "--memory-of", way]
    child += ["--clients", str(clients), "--lengths", *map(str, lengths)]
    done = subprocess.run(child, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: memory of {way}: {done.stderr.strip().splitlines()[-1:]}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def token_lengths(model: str, texts: Path) -> list[int]:
    """Tokens of the texts in a file of JSON lines, with special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line)["text"] for line in texts.read_text(encoding="utf-8").split("\n") if line]
    return [min(LONGEST, len(tokens)) for tokens in tokenizer(rows)["input_ids"]]


def section(options: argparse.Namespace, lengths: Sequence[int], title: str) -> list[str]:
    """Markdown of texts of these lengths."""
    clients, repeats = options.clients, options.repeats
    setup = Setup(options.model, clients, lengths)
    difference = setup.difference()
    if not difference <= TOLERANCE:
        raise SystemExit(f"error: the averages differ by {difference:.2g}, more than {TOLERANCE:g}")
    at_once = [count for count in options.at_once if count <= clients]
    seconds = measured(setup.ways(at_once), repeats, title)
    lines = [
        f"## {title}",
        "",
        f"Largest difference of the averaged factors and heads: {difference:.1e} (the round changed a value "
        f"by {setup.moved():.2g}).",
        "",
        "| way | seconds a round | texts/s | PEFT's time / its time | peak memory above the base, MB |",
        "|---|---|---|---|---|",
    ]
    texts = clients * STEPS * BATCH
    for way, taken in seconds.items():
        ratio = median(a / b for a, b in zip(seconds[PEFT], taken, strict=True))
        memory = ""
        if way != BASE:
            memory = f"{peak_in_child(options.model, way, clients, lengths) / 1e6:,.0f}"
        rate = texts / median(taken)
        lines.append(f"| {way} | {median(taken):.2f} | {rate:,.0f} | **{ratio:.2f}** | {memory} |")
        print(lines[-1], file=sys.stderr, flush=True)
    steps = server_seconds(setup.bank, repeats)
    words = ", ".join(f"{name} {taken * 1000:,.0f} ms" for name, taken in steps.items())
    return [*lines, "", f"The server's step alone, on {clients} updates: {words}.", ""]


def report(options: argparse.Namespace) -> str:
    """The whole file."""
    facts = environment()
    packages = ", ".join(f"{name} {facts.packages[name]}" for name in ("torch", "transformers", "peft"))
    lines = [
        f"# A federated round of {options.clients} clients: one bank, against PEFT client by client",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads, float32; {packages}; commit "
        f"{facts.commit}. `python benchmarks/federated_round.py --save` prints this file.",
        "",
        f"{Path(options.model).name}, LoRA of rank 8 on query and value, a head of {LABELS} labels; every "
        f"client trains {STEPS} steps of {BATCH} texts, with a fresh AdamW, from the global adapter; then "
        f"FedAvg of the factors. Medians of {options.repeats} rounds in which the ways took turns. The "
        f"bank's forwards have at most {MICROBATCH:,} padded tokens, of texts of similar length. `base "
        "alone`: forward and backward of the bank's batches through the frozen base, without adapters, "
        f"optimizer and server: a bound for any way. The goal is {GOAL:g} times as fast as PEFT.",
        "",
    ]
    for length in options.lengths:
        lines += section(options, [length], f"Texts of {length} tokens")
    if options.texts.exists():
        lengths = token_lengths(options.model, options.texts)
        title = f"Texts as long as the recipe's: {sum(lengths) / len(lengths):.1f} tokens on average"
        lines += section(options, lengths, title)
    return "\n".join(lines).rstrip() + "\n"


def show_profile(options: argparse.Namespace) -> None:
    """Print what takes longest in a round of either side: operations, then Python functions."""
    for length in options.lengths:
        setup = Setup(options.model, options.clients, [length])
        for way, run in setup.ways([options.clients]).items():
            run()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                run()
            print(f"{way}, {length} tokens")
            print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
            functions = cProfile.Profile()
            functions.runcall(run)
            pstats.Stats(functions).sort_stats("cumulative").print_stats(45)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--at-once", type=int, nargs="+", default=list(AT_ONCE))
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of a text")
    parser.add_argument(
        "--texts",
        type=Path,
        default=Path(TEXTS),
        help="whose lengths are measured, too (default: %(default)s)",
    )
    parser.add_argument("--model", default=MODEL, help="folder of the base (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="show where a round's time goes, and end")
    parser.add_argument("--memory-of", metavar="WAY", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(available_cpus())
    if options.memory_of is not None:
        print(peak_bytes(options.model, options.memory_of, options.clients, options.lengths))
        return
    if options.profile:
        show_profile(options)
        return
    text = report(options)
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
