"""Thousands of adapters registered with one vLLM server: memory, time to the first token, order of eviction.

    python benchmarks/serving_many.py --save        benchmarks/results/serving_many_cpu.md

2,000 adapters (fLoRA and LoRA of rank 4 on queries and values, in turn) are loaded over HTTP into a server
that keeps half of them in host memory (max_cpu_loras) and eight in slots (max_loras). Measured are resident
memory and the time of a load while they are registered, steps per second of eight requests of eight adapters
with 8 and with all registered, and the time to the first token of an adapter in a slot, in host memory, on
disk (it was evicted), and never loaded before. Which adapters are in host memory is read from the engine
after every request of a random order and compared with an LRU list.

Usage: python benchmarks/serving_many.py [--adapters 2000] [--quick] [--model FOLDER] [--save]
Runs in .venv-serving, which `make serving-env` installs.
"""

from __future__ import annotations

import argparse
import ast
import random
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vllm_server import MODEL, Server, running, save_adapters, use_serving_environment, versions

RESULT = Path(__file__).parent / "results" / "serving_many_cpu.md"
FAMILIES: dict[str, dict[str, Any]] = {
    family: {"method": family, "rank": 4, "target_modules": ["q_proj", "v_proj"]}
    for family in ("flora", "lora")
}
SLOTS = 8
ROUNDS = 7
TOKENS = 32
"""Of each request in the measurement of steps."""
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--gpu-memory-utilization", "0.2")


@dataclass
class Measured:
    """loads: seconds of every load; memory: adapters registered -> resident bytes of server and engine;
    steps: adapters registered -> steps per second; first_token: where the adapter was -> seconds; evictions:
    requests after which host memory held what LRU says, and all; bytes_each: size of an adapter's tensors."""

    on_host: int
    bytes_each: int = 0
    loads: list[float] = field(default_factory=list)
    memory: dict[int, dict[str, int]] = field(default_factory=dict)
    steps: dict[int, list[float]] = field(default_factory=dict)
    first_token: dict[str, list[float]] = field(default_factory=dict)
    evictions: list[bool] = field(default_factory=list)


class Host:
    """The adapters in the engine's host memory as they should be: the last ones used."""

    def __init__(self, server: Server, size: int) -> None:
        self.server, self.size = server, size
        self.ids: dict[str, int] = {}
        """Name -> the engine's number of it."""
        self.order: OrderedDict[str, None] = OrderedDict()
        """Those in host memory, the last one used last."""

    def use(self, name: str) -> None:
        self.order[name] = None
        self.order.move_to_end(name)
        while len(self.order) > self.size:
            self.order.popitem(last=False)

    def actual(self) -> set[int]:
        status, answer = self.server.request("/collective_rpc", {"method": "list_loras"})
        if status != 200:
            raise RuntimeError(f"list_loras: {answer}\n{self.server.tail()}")
        [listed] = answer["results"]
        if isinstance(listed, str):
            listed = ast.literal_eval(listed) if listed != "set()" else []
        return set(listed)

    def agrees(self) -> bool:
        return self.actual() == {self.ids[name] for name in self.order}


def write_adapters(model: Path, folder: Path, count: int) -> int:
    """Write different adapters `adapter-0` ... and return the bytes of one's tensors."""
    from safetensors.torch import load_file, save_file

    save_adapters(model, folder, FAMILIES, 1)
    templates = [
        (folder / f"{family}-0", load_file(folder / f"{family}-0/adapter_model.safetensors"))
        for family in FAMILIES
    ]
    for i in range(count):
        template, tensors = templates[i % len(templates)]
        target = folder / f"adapter-{i}"
        target.mkdir()
        shutil.copyfile(template / "adapter_config.json", target / "adapter_config.json")
        scaled = {name: tensor * (1 + i / count) for name, tensor in tensors.items()}
        save_file(scaled, target / "adapter_model.safetensors", {"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in templates[0][1].values())


def prompt(generator: random.Random) -> list[int]:
    """No two alike, so that no prefix is cached."""
    return [generator.randrange(3, 45) for _ in range(24)]


def load(server: Server, host: Host, folder: Path, number: int, measured: Measured) -> None:
    name = f"adapter-{number}"
    before = host.actual()
    start = time.perf_counter()
    status, answer = server.request(
        "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder / name)}
    )
    measured.loads.append(time.perf_counter() - start)
    if status != 200:
        raise RuntimeError(f"{name}: {answer}\n{server.tail()}")
    [host.ids[name]] = host.actual() - before
    host.use(name)


def steps(server: Server, generator: random.Random, names: list[str]) -> float:
    """Steps per second of one request of each adapter, all at once."""
    with ThreadPoolExecutor(len(names)) as pool:
        for name in names:
            server.complete(name, prompt(generator), 1)
        prompts = [prompt(generator) for _ in names]
        start = time.perf_counter()
        list(pool.map(lambda pair: server.complete(*pair, TOKENS), zip(names, prompts, strict=True)))
        seconds = time.perf_counter() - start
    return TOKENS / seconds


def use_in_turn(server: Server, host: Host, generator: random.Random, names: list[str]) -> None:
    """One request after the other, so that it is known which was the last one."""
    for name in names:
        server.complete(name, prompt(generator), 1)
        host.use(name)


def first_tokens(server: Server, host: Host, measured: Measured, count: int) -> None:
    """Time to the first token by where the adapter is."""
    generator = random.Random(1)

    def timed(where: str, name: str) -> None:
        tokens = prompt(generator)
        start = time.perf_counter()
        server.complete(name, tokens, 1)
        measured.first_token.setdefault(where, []).append(time.perf_counter() - start)
        if name != "base":
            host.use(name)

    kept = list(host.order)
    for name in kept[-count:]:
        timed("base model", "base")
        timed("host memory", name)
        timed("slot", name)
    for name in [name for name in host.ids if name not in host.order][:count]:
        timed("disk", name)


def check_evictions(server: Server, host: Host, measured: Measured, count: int) -> None:
    """Requests in a random order, half of them of adapters that are not in host memory."""
    generator = random.Random(2)
    for number in range(count):
        inside = list(host.order)
        names = inside if number % 2 else sorted(set(host.ids) - set(inside))
        name = generator.choice(names)
        server.complete(name, prompt(generator), 1)
        host.use(name)
        measured.evictions.append(host.agrees())


def measure(server: Server, folder: Path, options: argparse.Namespace, measured: Measured) -> None:
    generator, host = random.Random(0), Host(server, measured.on_host)
    server.complete("base", prompt(generator), 4)
    measured.memory[0] = server.resident_bytes()
    few = [f"adapter-{i}" for i in range(SLOTS)]
    marks = {SLOTS, measured.on_host // 2, measured.on_host, options.adapters - 1}
    for number in range(options.adapters - 1):
        load(server, host, folder, number, measured)
        if number + 1 == SLOTS:
            measured.steps[SLOTS] = [steps(server, generator, few) for _ in range(ROUNDS)]
            use_in_turn(server, host, generator, few)
        if number + 1 in marks:
            measured.memory[number + 1] = server.resident_bytes()
            print(f"{number + 1} adapters are registered", file=sys.stderr, flush=True)
    measured.steps[options.adapters] = [steps(server, generator, few) for _ in range(ROUNDS)]
    use_in_turn(server, host, generator, few)
    first_tokens(server, host, measured, 4 if options.quick else 20)
    start = time.perf_counter()
    load(server, host, folder, options.adapters - 1, measured)
    name = f"adapter-{options.adapters - 1}"
    server.complete(name, prompt(generator), 1)
    measured.first_token["never loaded, with the load"] = [time.perf_counter() - start]
    check_evictions(server, host, measured, 20 if options.quick else 200)


def report(measured: Measured, options: argparse.Namespace) -> str:
    """Markdown."""
    from flora_train.runtime.environment import environment

    facts, count, on_host = environment(), options.adapters, measured.on_host
    few, many = (median(rates) for rates in measured.steps.values())
    memory = measured.memory
    filled = (memory[on_host]["engine"] - memory[SLOTS]["engine"]) / (on_host - SLOTS)
    beyond = (memory[count - 1]["engine"] - memory[on_host]["engine"]) / (count - 1 - on_host)
    server = (memory[count - 1]["server"] - memory[SLOTS]["server"]) / (count - 1 - SLOTS)
    tenth = max(1, count // 20)
    early, late = median(measured.loads[SLOTS : SLOTS + tenth]), median(measured.loads[-tenth:])
    lines = [
        f"# {count:,} adapters registered with one vLLM server",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; {versions()}; commit {facts.commit}.",
        f"{options.model.name}, float32; fLoRA and LoRA of rank 4 on queries and values, "
        f"{measured.bytes_each / 1e6:.2f} MB each; `--max-loras {SLOTS} --max-cpu-loras {on_host}`.",
        "`python benchmarks/serving_many.py --save` prints this file.",
        "",
        "| | |",
        "|---|---|",
        f"| engine's memory for an adapter in host memory | {filled / 1e6:.2f} MB |",
        f"| engine's memory for an adapter beyond max_cpu_loras | {beyond / 1e3:.1f} kB |",
        f"| server's memory for a registered adapter | {server / 1e3:.1f} kB |",
        f"| seconds of a load, the first {tenth} / the last {tenth} | {early:.3f} / {late:.3f} |",
        f"| steps per second of {SLOTS} adapters, {SLOTS} registered | {few:.1f} |",
        f"| steps per second of {SLOTS} adapters, {count:,} registered | {many:.1f} ({many / few:.3f}) |",
    ]
    for where, seconds in sorted(measured.first_token.items(), key=lambda item: median(item[1])):
        lines.append(f"| time to the first token, {where} | {1e3 * median(seconds):.0f} ms |")
    right = sum(measured.evictions)
    lines += [
        "",
        f"Order of eviction: after {right} of {len(measured.evictions)} requests of random adapters, host "
        "memory held exactly the adapters used last (LRU).",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapters", type=int, help="default: 2000, with --quick 200")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    use_serving_environment()
    options.model = options.model.absolute()
    options.adapters = options.adapters or (200 if options.quick else 2000)
    measured = Measured(on_host=options.adapters // 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measured.bytes_each = write_adapters(options.model, folder, options.adapters)
        flags = [*FLAGS, "--max-num-seqs", str(SLOTS), "--enable-lora", "--max-loras", str(SLOTS)]
        flags += ["--max-lora-rank", "8", "--max-cpu-loras", str(measured.on_host)]
        variables = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_SERVER_DEV_MODE": "1"}
        server = Server(options.model, options.log or folder / "server.log", flags, environment=variables)
        with running(server):
            measure(server, folder, options, measured)
    text = report(measured, options)
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")
    sys.exit(not all(measured.evictions))


if __name__ == "__main__":
    main()
