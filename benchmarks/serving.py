"""Serving with vLLM on a CPU: fLoRA, LoRA, IA3 and the base against rank, and LoRA as vLLM alone serves it.

The first experiment of the fLoRA paper (Figure 2): eight requests of eight adapters in each batch, measured
by vLLM's own benchmark client over HTTP, with a large token budget (throughput) and a small one (latency).
Two servers run side by side, one with this package's plugin and one with stock vLLM (VLLM_PLUGINS=""), and
every round measures all contenders in a random order. `--max-lora-rank` pads all adapters on a CPU, so that
LoRAs of a rank are served with the smallest value that vLLM allows for it: 8, 16 or 32; fLoRA shares that
server.

The operations of one step with LoRA rows only are counted in both, too.

Usage: python benchmarks/serving.py [--quick] [--rounds N] [--model FOLDER] [--save]
Runs in .venv-serving, which `make serving-env` installs.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vllm_server import MODEL, ROOT, Server, running, save_adapters, use_serving_environment, versions

RESULTS = Path(__file__).parent / "results"
DTYPES = ("bfloat16", "float32")
"""vLLM serves this model in bfloat16 unless it is told otherwise."""
RANKS = (1, 2, 4, 8, 16, 32)
QUICK_RANKS = (4, 16)
BUDGETS = {"throughput": 2048, "latency": 128}
"""Tokens of one step (max_num_batched_tokens)."""
REQUESTS = 8
"""In each batch, and adapters of every kind."""
INPUT_TOKENS = 64
FLAGS = ("--enforce-eager", "--max-model-len", "512", "--gpu-memory-utilization", "0.2")


@dataclass(frozen=True)
class Contender:
    """What is measured against others: a kind of adapter on one of the servers."""

    family: str
    """`lora4`, `flora4` (residual), `pure4` (fLoRA as in the paper), `ia3` or `base`."""
    plugin: bool

    @property
    def modules(self) -> list[str]:
        """The adapters' names in requests; none for the base model."""
        return [] if self.family == "base" else [f"{self.family}-{i}" for i in range(REQUESTS)]


@dataclass
class Results:
    """Measurements of one budget."""

    rows: dict[tuple[int, Contender], list[dict[str, float]]] = field(default_factory=dict)
    """(--max-lora-rank, contender) -> measurements, one a round."""

    def median(self, slot_rank: int, contender: Contender, key: str = "output_throughput") -> float:
        return median(row[key] for row in self.rows[slot_rank, contender])

    def ratio(
        self, slot_rank: int, first: Contender, second: Contender, key: str = "output_throughput"
    ) -> float:
        """The median of `ratios`."""
        return median(self.ratios(slot_rank, first, second, key))

    def ratios(
        self, slot_rank: int, first: Contender, second: Contender, key: str = "output_throughput"
    ) -> list[float]:
        """The ratio first / second of every round."""
        pairs = zip(self.rows[slot_rank, first], self.rows[slot_rank, second], strict=True)
        return [a[key] / b[key] for a, b in pairs]


def slot_rank_of(rank: int) -> int:
    """The smallest of 8, 16 and 32 for adapters of this rank: vLLM allows these as --max-lora-rank."""
    return next(allowed for allowed in (8, 16, 32) if rank <= allowed)


def families(ranks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Family -> options of its adapters. fLoRA and LoRA change all linear layers."""
    methods: dict[str, dict[str, Any]] = {"ia3": {"method": "ia3"}}
    for rank in ranks:
        methods[f"lora{rank}"] = {"method": "lora", "rank": rank}
        methods[f"flora{rank}"] = {"method": "flora", "rank": rank}
        methods[f"pure{rank}"] = {"method": "flora", "rank": rank, "variant": "pure"}
    return methods


def contenders(ranks: Sequence[int]) -> list[Contender]:
    """Of one pair of servers."""
    loras = [f"lora{rank}" for rank in ranks]
    floras = [f"{variant}{rank}" for variant in ("flora", "pure") for rank in ranks]
    return [
        *(Contender(family, plugin=True) for family in ("base", "ia3", *loras, *floras)),
        *(Contender(family, plugin=False) for family in ("base", *loras)),
    ]


def measure(
    server: Server, model: Path, modules: Sequence[str], *, seed: int, tokens: int
) -> dict[str, float]:
    """One run of `vllm bench serve`: REQUESTS requests of random tokens, each of an adapter of its own."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    for name in modules or ["base"]:  # so that every adapter has a slot
        server.complete(name, [5, 6, 7], 1)
    words = ["--base-url", server.url, "--endpoint", "/v1/completions", "--model", "base"]
    words += ["--tokenizer", str(model), "--dataset-name", "random", "--num-prompts", str(REQUESTS)]
    words += ["--random-input-len", str(INPUT_TOKENS), "--random-output-len", str(tokens), "--ignore-eos"]
    words += ["--seed", str(seed), "--temperature", "0", "--max-concurrency", str(REQUESTS)]
    words += ["--disable-tqdm", "--ready-check-timeout-sec", "0"]
    if modules:
        words += ["--lora-assignment", "round-robin", "--lora-modules", *modules]
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(printed):
        result = asyncio.run(main_async(parser.parse_args(words)))
    if result["completed"] != REQUESTS:
        said = f"{printed.getvalue()}\n{server.tail()}"
        raise RuntimeError(f"{result['completed']} of {REQUESTS} requests\n{said}")
    keys = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")
    return {key: float(result[key]) for key in keys}


def compare(folder: Path, options: argparse.Namespace, budget: int) -> Results:
    """All contenders with one budget."""
    results = Results()
    for slot_rank in sorted({slot_rank_of(rank) for rank in options.ranks}):
        ranks = [rank for rank in options.ranks if slot_rank_of(rank) == slot_rank]
        everyone = contenders(ranks)
        servers = {}
        for plugin in (True, False):
            names = [name for one in everyone if one.plugin == plugin for name in one.modules]
            flags = [
                *FLAGS,
                "--dtype",
                options.dtype,
                "--max-num-seqs",
                str(REQUESTS),
                "--max-num-batched-tokens",
                str(budget),
            ]
            flags += ["--enable-lora", "--max-loras", str(REQUESTS), "--max-lora-rank", str(slot_rank)]
            flags += ["--max-cpu-loras", str(len(names))]
            log = folder / f"server_{budget}_{slot_rank}_{plugin}.log"
            modules = {name: folder / name for name in names}
            servers[plugin] = Server(options.model, log, flags, modules=modules, plugin=plugin)
        with running(*servers.values()):
            measure_rounds(results, servers, everyone, slot_rank=slot_rank, options=options)
    return results


def measure_rounds(
    results: Results,
    servers: dict[bool, Server],
    everyone: Sequence[Contender],
    *,
    slot_rank: int,
    options: argparse.Namespace,
) -> None:
    """All contenders in every round, in a random order; the first round is a warm-up."""
    order = random.Random(slot_rank)
    for number in range(options.rounds + 1):
        for one in order.sample(everyone, len(everyone)):
            row = measure(servers[one.plugin], options.model, one.modules, seed=number, tokens=options.tokens)
            if number:
                results.rows.setdefault((slot_rank, one), []).append(row)
        print(f"max_lora_rank {slot_rank}: round {number} of {options.rounds}", file=sys.stderr, flush=True)


def operations(model: Path, folder: Path) -> dict[bool, Counter[str]]:
    """With the plugin and without: operation of torch -> its calls in a step that reads prompts and one that
    generates, of LoRA rows and a base row, after a fLoRA was served."""
    counts = {}
    for plugin in (True, False):
        command = [sys.executable, __file__, "--count-operations", str(folder), "--model", str(model)]
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        if not plugin:
            environment["VLLM_PLUGINS"] = ""
        run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"the count of operations failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}")
        counts[plugin] = Counter(json.loads(run.stdout.splitlines()[-1]))
    return counts


def count_operations(model: Path, folder: Path) -> None:
    """Print the count of this process as JSON."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    calls: Counter[str] = Counter()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if not (str(func).startswith("aten.to.") and result is args[0]):  # nothing to convert
                calls[str(func)] += 1
            return result

    engine = LLM(
        str(model),
        enforce_eager=True,
        enable_lora=True,
        max_loras=4,
        max_lora_rank=8,
        max_model_len=512,
        max_num_seqs=4,
        gpu_memory_utilization=0.2,
        enable_prefix_caching=False,
    )
    names = ["lora-0", "lora-1", None]
    if os.environ.get("VLLM_PLUGINS") is None:
        names.append("flora-0")

    def generate(names: Sequence[str | None]) -> None:
        requests = [
            None if name is None else LoRARequest(name, number + 1, str(folder / name))
            for number, name in enumerate(names)
        ]
        prompts = [{"prompt_token_ids": [5, 6, 7, 8 + number]} for number in range(len(names))]
        sampling = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        engine.generate(prompts, sampling, lora_request=requests, use_tqdm=False)

    generate(names)
    generate(names[:3])
    with Counting():
        generate(names[:3])
    print(json.dumps(calls))


def report(
    budget: str, results: Results, counts: dict[bool, Counter[str]], options: argparse.Namespace
) -> str:
    """Markdown of one budget."""
    from flora_train.runtime.environment import environment

    facts = environment()
    lines = [
        "# Serving with vLLM: fLoRA, LoRA, IA3 and the base against rank",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; {versions()}; commit {facts.commit}.",
        f"{options.model.name}, {options.dtype}, eager. {REQUESTS} requests of {REQUESTS} adapters in each "
        f"batch, {INPUT_TOKENS} random tokens in and {options.tokens} out, over HTTP with "
        "`vllm bench serve`; fLoRA (pure as in the paper, and residual) and LoRA",
        f"on all linear layers; medians of {options.rounds} rounds in which all contenders took turns, in "
        "random order. A server for",
        "each `--max-lora-rank` (8, 16, 32, the least that the rank allows), with the plugin and with stock "
        "vLLM side by side.",
        "`python benchmarks/serving.py --save` prints this file.",
    ]
    lines += ["", f"## {budget.capitalize()}: {BUDGETS[budget]} tokens a step", ""]
    lines += throughput_table(results, options.ranks)
    if budget == "latency":
        lines += ["", *latency_table(results, options.ranks)]
    lines += ["", *goals(results, options.ranks)]
    return "\n".join([*lines, "", *operations_text(counts)]) + "\n"


def throughput_table(results: Results, ranks: Sequence[int]) -> list[str]:
    """Tokens per second."""
    lines = [
        "Generated tokens per second.",
        "",
        "| rank | base | IA3 | pure fLoRA | residual fLoRA | LoRA | LoRA, stock vLLM | base, stock vLLM | "
        "pure fLoRA / LoRA | residual fLoRA / LoRA | LoRA / stock LoRA |",
        "|---" * 11 + "|",
    ]
    for rank in ranks:
        slots = slot_rank_of(rank)
        lora, flora = Contender(f"lora{rank}", plugin=True), Contender(f"flora{rank}", plugin=True)
        pure = Contender(f"pure{rank}", plugin=True)
        stock = Contender(f"lora{rank}", plugin=False)
        columns = [
            Contender("base", True),
            Contender("ia3", True),
            pure,
            flora,
            lora,
            stock,
            Contender("base", False),
        ]
        rates = " | ".join(f"{results.median(slots, one):.1f}" for one in columns)
        ratios = [f"**{results.ratio(slots, one, lora):.2f}**" for one in (pure, flora)]
        theirs = results.ratio(slots, lora, stock)
        lines.append(f"| {rank} | {rates} | {' | '.join(ratios)} | {theirs:.3f} |")
    return lines


def latency_table(results: Results, ranks: Sequence[int]) -> list[str]:
    """Milliseconds until the first token, and for each further one."""
    lines = [
        "Milliseconds until the first token / for each further token, means of a round's requests.",
        "",
        "| rank | base | IA3 | pure fLoRA | residual fLoRA | LoRA | LoRA, stock vLLM |",
        "|---" * 7 + "|",
    ]
    for rank in ranks:
        slots = slot_rank_of(rank)
        columns = [
            Contender("base", True),
            Contender("ia3", True),
            Contender(f"pure{rank}", True),
            Contender(f"flora{rank}", True),
            Contender(f"lora{rank}", True),
            Contender(f"lora{rank}", False),
        ]
        cells = [
            f"{results.median(slots, one, 'mean_ttft_ms'):.0f} / "
            f"{results.median(slots, one, 'mean_tpot_ms'):.0f}"
            for one in columns
        ]
        lines.append(f"| {rank} | {' | '.join(cells)} |")
    return lines


def goals(results: Results, ranks: Sequence[int]) -> list[str]:
    """The critical rank and the goals, one line each."""
    ours: dict[str, dict[int, float]] = {"pure": {}, "flora": {}}
    theirs: dict[int, float] = {}
    rounds: list[float] = []
    for rank in ranks:
        slots = slot_rank_of(rank)
        lora = Contender(f"lora{rank}", plugin=True)
        stock = Contender(f"lora{rank}", plugin=False)
        theirs[rank] = results.ratio(slots, lora, stock)
        rounds += results.ratios(slots, lora, stock)
        for variant, ratios in ours.items():
            ratios[rank] = results.ratio(slots, Contender(f"{variant}{rank}", plugin=True), lora)
    lines = []
    for variant, name in (("pure", "pure fLoRA (the paper's)"), ("flora", "residual fLoRA")):
        ratios = ours[variant]
        slower = [rank for rank in ranks if ratios[rank] < 1]
        critical = f"Critical rank: {name} falls below LoRA at rank {slower[0]}." if slower else ""
        lines.append(f"- {critical or f'Critical rank: {name} is nowhere slower than LoRA.'}")
        small = [ratios[rank] for rank in ranks if rank <= 4]
        if small:
            lines.append(goal_line(f"{name} at rank <= 4, of LoRA's throughput", min(small), 1.0))
        if 16 in ranks:
            lines.append(goal_line(f"{name} at rank 16, of LoRA's throughput", ratios[16], 0.5))
    lines.append(goal_line("LoRA with the plugin, of stock vLLM's throughput", min(theirs.values()), 0.95))
    lines.append(f"  The median over all ranks and rounds is {median(rounds):.3f}.")
    return lines


def goal_line(name: str, value: float, goal: float) -> str:
    verdict = "reached" if value >= goal else "MISSED"
    return f"- {name}: {value:.3f} at worst, goal {goal:.2f}: {verdict}."


def operations_text(counts: dict[bool, Counter[str]]) -> list[str]:
    """What the plugin adds to a batch without fLoRA and IA3."""
    added, omitted = counts[True] - counts[False], counts[False] - counts[True]
    lines = [
        "## Operations of a batch without fLoRA and IA3",
        "",
        "Two LoRA rows and a base row, one step that reads the prompts and one that generates, after a fLoRA "
        "was served:",
        f"{counts[False].total()} operations of torch in stock vLLM, {counts[True].total()} with the plugin, "
        f"which adds {added.total()} and omits {omitted.total()}.",
    ]
    for name, counter in (("Added", added), ("Omitted", omitted)):
        if counter:
            lines.append(
                f"{name}: " + ", ".join(f"{number} {key}" for key, number in sorted(counter.items()))
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="ranks 4 and 16, throughput only, three rounds")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 3")
    parser.add_argument("--tokens", type=int, help="generated for a request; default: 48, with --quick 24")
    parser.add_argument("--ranks", type=int, nargs="+", choices=RANKS)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--budgets", nargs="+", choices=list(BUDGETS), default=None)
    parser.add_argument("--save", action="store_true", help="write results/serving_*_cpu.md, of each budget")
    parser.add_argument("--count-operations", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    use_serving_environment()
    options.model = options.model.absolute()
    if options.count_operations is not None:
        count_operations(options.model, options.count_operations)
        return
    options.rounds = options.rounds or (3 if options.quick else 5)
    options.tokens = options.tokens or (24 if options.quick else 48)
    options.ranks = sorted(options.ranks or (QUICK_RANKS if options.quick else RANKS))
    chosen = options.budgets or (["throughput"] if options.quick else list(BUDGETS))
    budgets = {name: BUDGETS[name] for name in chosen}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        small = {"lora": {"method": "lora", "rank": 4}, "flora": {"method": "flora", "rank": 4}}
        save_adapters(options.model, folder / "counted", small, 2)
        counts = operations(options.model, folder / "counted")
        save_adapters(options.model, folder, families(options.ranks), REQUESTS)
        for name, budget in budgets.items():
            text = report(name, compare(folder, options, budget), counts, options)
            print(text)
            if options.save:
                suffix = "" if options.dtype == DTYPES[0] else f"_{options.dtype}"
                (RESULTS / f"serving_{name}{suffix}_cpu.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
