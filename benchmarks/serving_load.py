"""Soak test of a vLLM server with the plugin: mixed requests while adapters come, go, vanish and are damaged.

    python benchmarks/serving_load.py --minutes 30 --save        benchmarks/results/serving_load_cpu.md

Eight clients send requests for fLoRA, IA3, LoRA and the base over HTTP, whole, streamed and cancelled,
malformed ones (load_cases.py) among them. At the same time they load adapters at random, unload them, load
others under the same names, delete or rewrite their folders, and load folders that are half-written. Every
finished answer is compared with the greedy tokens of the trainer's bank, computed beforehand; a token that
the bank finds as probable as another one to 1e-3 may differ. Resident memory is sampled every two seconds;
its growth is that from the middle third of the time to the last. The server has a small cache of keys and
values and oneDNN a small one of compiled matmuls, so that both are full soon and do not count as growth.

Usage: python benchmarks/serving_load.py [--minutes 30] [--model FOLDER] [--seed N] [--save]
Exits with status 1 if anything was wrong. Runs in .venv-serving, which `make serving-env` installs.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from load_cases import ANSWERED, BODIES, COMPLETIONS, FIELDS, LOAD, LOADS, REFUSED, UNLOAD, UNLOADS
from vllm_server import MODEL, Server, adapter_banks, running, use_serving_environment, versions

RESULT = Path(__file__).parent / "results" / "serving_load_cpu.md"
FAMILIES: dict[str, dict[str, Any]] = {
    "residual": {"method": "flora", "rank": 4},
    "pure": {"method": "flora", "rank": 3, "variant": "pure"},
    "lora": {"method": "lora", "rank": 8},
    "ia3": {"method": "ia3"},
}
ADAPTERS = 4
"""Of each family."""
CLIENTS = 8
NAMES = 12
"""Under which adapters are loaded; fewer than adapters, so that a name changes its adapter."""
TOKENS = 16
"""Generated at most."""
PROMPT_LENGTHS = (3, 3, 40, 40, 150, 150)
TIE = 1e-3
"""Log-probabilities that differ by less count as equal."""
GROWTH = 0.03
"""Of memory, that counts as flat."""
FLAGS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--gpu-memory-utilization", "0.2")
CACHE = ("--num-gpu-blocks-override", "48", "--max-num-seqs", "8")
"""Blocks of 128 tokens, so few that requests wait for them, and that all are in memory after a minute."""
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
"""oneDNN keeps 1,024 compiled matmuls, one for each number of rows, which takes it hours to fill."""
SLOTS = ("--enable-lora", "--max-loras", "4", "--max-cpu-loras", "6", "--max-lora-rank", "8")


@dataclass
class Answer:
    """The greedy tokens of an adapter for a prompt."""

    tokens: list[int]
    gaps: list[float]
    """How much more probable each token is than the second one, in nats."""


Expected = dict[tuple[str, int], Answer]
"""(adapter or base, number of the prompt) -> its answer."""


@dataclass
class Seen:
    """What happened."""

    events: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    memory: list[dict[str, int]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, event: str) -> None:
        with self.lock:
            self.events[event] += 1

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)
            print(f"FAULT: {text[:600]}", file=sys.stderr, flush=True)


@dataclass
class Name:
    """A name under which adapters are loaded."""

    adapter: str | None = None
    """The adapter that it stands for; None: nothing is loaded."""
    history: list[str] = field(default_factory=list)
    """All that it stood for, the last one last."""
    changes: int = 0
    """How often that changed, odd while it changes."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while it changes."""


def prompts(vocabulary: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(3, vocabulary) for _ in range(n)] for n in PROMPT_LENGTHS]


def prepare(model: Path, folder: Path) -> Expected:
    """Write all adapters, and compute what they answer."""
    from transformers import AutoConfig

    inputs = prompts(AutoConfig.from_pretrained(model).vocab_size)
    expected: Expected = {}
    for family, bank in adapter_banks(model, folder, FAMILIES, ADAPTERS):
        names = [f"{family}-{i}" for i in range(ADAPTERS)]
        for number, prompt in enumerate(inputs):
            answers = greedy(bank, [*range(ADAPTERS), -1], prompt)
            expected |= {
                (name, number): answer for name, answer in zip([*names, "base"], answers, strict=True)
            }
    return expected


def greedy(bank: Any, adapters: list[int], prompt: list[int]) -> list[Answer]:
    """The answers of adapters of a bank to one prompt."""
    import torch

    ids = torch.tensor([prompt] * len(adapters))
    answers = [Answer([], []) for _ in adapters]
    with bank.routed(adapters), torch.no_grad():
        out = bank.model(input_ids=ids, use_cache=True)
        for _ in range(TOKENS):
            best = out.logits[:, -1].log_softmax(-1).topk(2)
            for answer, tokens, values in zip(answers, best.indices, best.values, strict=True):
                answer.tokens.append(int(tokens[0]))
                answer.gaps.append(float(values[0] - values[1]))
            ids = best.indices[:, :1]
            out = bank.model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
    return answers


class Client:
    """One of those that send requests."""

    def __init__(self, number: int, load: Load) -> None:
        self.random = random.Random(load.seed * 1000 + number)
        self.number, self.load, self.server, self.seen = number, load, load.server, load.seen
        self.actions = {
            self.complete: 50,
            self.complete_base: 8,
            self.complete_twice: 5,
            self.cancel: 10,
            self.malformed: 12,
            self.malformed_load: 4,
            self.change: 6,
            self.half_written: 2,
            self.unknown: 2,
        }

    def run(self, until: float) -> None:
        while time.monotonic() < until:
            [action] = self.random.choices(list(self.actions), list(self.actions.values()))
            try:
                action()
            except (OSError, http.client.HTTPException) as error:
                self.seen.fault(f"{action.__name__}: no answer: {type(error).__name__}: {error}")
                if self.server.process.poll() is not None:
                    return
            except Exception as error:
                self.seen.fault(f"{action.__name__}: {type(error).__name__}: {error}")

    def request(self, number: int, model: str, **changes: Any) -> dict[str, Any]:
        tokens = self.random.randrange(1, TOKENS + 1)
        request = {"model": model, "prompt": self.load.prompts[number], "max_tokens": tokens}
        return {**request, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **changes}

    def complete(self, **changes: Any) -> None:
        """A request of an adapter, which must answer as long as nothing happens to its name."""
        number = self.random.randrange(len(PROMPT_LENGTHS))
        names = list(self.load.names)
        if self.random.random() < 0.9:
            names = [name for name in names if self.load.names[name].adapter is not None] or names
        name = self.random.choice(names)
        state = self.load.names[name]
        before, adapter, earlier = state.changes, state.adapter, max(0, len(state.history) - 1)
        status, answer = self.server.request(COMPLETIONS, self.request(number, name, **changes))
        unchanged = state.changes == before and before % 2 == 0
        if status == 404 and (adapter is None or not unchanged):
            self.seen.count("not loaded: 404")
        elif status != 200:
            self.seen.fault(f"{name} ({adapter}, {before} -> {state.changes}): {status} {answer}")
        elif unchanged:
            self.check([adapter], number, answer, name)
        else:
            self.seen.count("answered while its name changed")
            self.check([*state.history[earlier:]], number, answer, name)

    def complete_base(self) -> None:
        number = self.random.randrange(len(PROMPT_LENGTHS))
        status, answer = self.server.request(COMPLETIONS, self.request(number, "base"))
        if status == 200:
            self.check(["base"], number, answer, "base")
        else:
            self.seen.fault(f"base: {status} {answer}")

    def complete_twice(self) -> None:
        """Two samples of the most probable tokens, which vLLM does not allow with a temperature of 0."""
        self.complete(n=2, temperature=1, top_k=1)

    def check(self, adapters: Sequence[str | None], number: int, answer: Any, name: str) -> None:
        """The answer's tokens are those of one of the adapters that the name stood for."""
        for choice in answer["choices"]:
            tokens = choice["token_ids"]
            results = {adapter: self.compare(adapter, number, tokens) for adapter in adapters}
            if "right answers" in results.values():
                self.seen.count("right answers")
            elif "right answers up to a tie" in results.values():
                self.seen.count("right answers up to a tie")
            else:
                all_expected = self.load.expected.items()
                same = [key for key, other in all_expected if other.tokens[: len(tokens)] == tokens]
                self.seen.fault(f"{name}, prompt {number}: {tokens}, the answer of {same[:3]}; {results}")

    def compare(self, adapter: str | None, number: int, tokens: list[int]) -> str:
        if adapter is None:
            return "nothing is loaded"
        expected = self.load.expected[adapter, number]
        for i, token in enumerate(tokens):
            if token != expected.tokens[i]:
                if expected.gaps[i] < TIE:
                    return "right answers up to a tie"
                return f"{expected.tokens} expected, gap {expected.gaps[i]:.4f} at {i}"
        return "right answers"

    def cancel(self) -> None:
        """A streamed request that is closed after some tokens, or before the first."""
        name = self.random.choice([*self.load.names, "base"])
        number = self.random.randrange(len(PROMPT_LENGTHS))
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=120)
        content = self.request(number, name, stream=True, max_tokens=300)
        connection.request("POST", COMPLETIONS, json.dumps(content), {"Content-Type": "application/json"})
        if self.random.random() < 0.7:
            answer = connection.getresponse()
            for _ in range(self.random.randrange(1, 12)):
                answer.readline()
        connection.close()
        self.seen.count("cancelled")

    def malformed(self) -> None:
        if self.random.random() < 0.3:
            body, allowed = self.random.choice(BODIES)
            self.expect(COMPLETIONS, body, allowed, "malformed requests")
            return
        changes, allowed = self.random.choice(FIELDS)
        name = self.random.choice([*self.load.names, "base", "base"])
        if name != "base" and allowed == ANSWERED:
            allowed = ANSWERED | {404}
        content = {**self.request(self.random.randrange(len(PROMPT_LENGTHS)), name), **changes}
        self.expect(COMPLETIONS, content, allowed, "unusual requests")

    def malformed_load(self) -> None:
        path, cases = self.random.choice([(LOAD, LOADS), (UNLOAD, UNLOADS)])
        self.expect(path, self.random.choice(cases), REFUSED, "malformed loads")

    def unknown(self) -> None:
        self.expect(COMPLETIONS, self.request(0, f"nobody-{self.number}"), frozenset({404}), "unknown models")

    def expect(self, path: str, content: Any, allowed: frozenset[int], event: str) -> None:
        status, answer = self.server.request(path, content)
        self.seen.count(event)
        if status not in allowed:
            self.seen.fault(f"{path} {str(content)[:300]}: {status} {str(answer)[:300]}")

    def change(self) -> None:
        """Load or unload a name; its folder is then deleted or rewritten half of the time."""
        name = self.random.choice(list(self.load.names))
        state = self.load.names[name]
        if not state.lock.acquire(blocking=False):
            return
        try:
            state.changes += 1
            if state.adapter is None:
                self.load_adapter(name, state)
            else:
                status, answer = self.server.request(UNLOAD, {"lora_name": name})
                if status != 200:
                    self.seen.fault(f"unload {name} ({state.adapter}): {status} {answer}")
                state.adapter = None
                self.seen.count("unloaded")
        finally:
            state.changes += 1
            state.lock.release()

    def load_adapter(self, name: str, state: Name) -> None:
        adapter, other = self.random.sample(self.load.adapters, 2)
        state.history.append(adapter)
        folder = self.load.folder / f"served-{name}"  # the same for all adapters of a name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.load.folder / adapter, folder)
        status, answer = self.server.request(LOAD, {"lora_name": name, "lora_path": str(folder)})
        if status != 200:
            self.seen.fault(f"load {name} ({adapter}): {status} {answer}")
            return
        state.adapter = adapter
        self.seen.count("loaded")
        happens = self.random.random()
        if happens < 0.3:
            shutil.rmtree(folder)
            self.seen.count("folders deleted after loading")
        elif happens < 0.6:
            for path in (self.load.folder / other).iterdir():
                shutil.copyfile(path, folder / path.name)  # in place
            self.seen.count("folders rewritten after loading")

    def half_written(self) -> None:
        """A folder whose tensors are cut, or that lacks a file."""
        adapter = self.random.choice(self.load.adapters)
        folder = self.load.folder / f"half-{self.number}"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.load.folder / adapter, folder)
        file = folder / self.random.choice(["adapter_model.safetensors", "adapter_config.json"])
        if self.random.random() < 0.3:
            file.unlink()
        else:
            data = file.read_bytes()
            file.write_bytes(data[: self.random.randrange(len(data))])
        content = {"lora_name": f"half-{self.number}", "lora_path": str(folder)}
        self.expect(LOAD, content, REFUSED, "half-written folders")


@dataclass
class Load:
    """What the clients share."""

    server: Server
    folder: Path
    expected: Expected
    prompts: list[list[int]]
    seed: int
    seen: Seen = field(default_factory=Seen)
    names: dict[str, Name] = field(default_factory=lambda: {f"name{i}": Name() for i in range(NAMES)})
    adapters: list[str] = field(
        default_factory=lambda: [f"{family}-{i}" for family in FAMILIES for i in range(ADAPTERS)]
    )

    def run(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        clients = [threading.Thread(target=Client(i, self).run, args=(until,)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            if self.server.process.poll() is None:
                self.seen.memory.append(self.server.resident_bytes())
            time.sleep(2)
        try:
            self.server.check_alive()
        except (RuntimeError, OSError) as error:
            self.seen.fault(f"at the end: {error}")


def growth(memory: list[int]) -> float:
    """From the median of the middle third to that of the last."""
    third = len(memory) // 3
    if third == 0:
        return 0.0
    return median(memory[-third:]) / median(memory[third : 2 * third]) - 1


def slope(memory: list[int]) -> float:
    """Bytes per minute in the last third, by least squares; samples are two seconds apart."""
    last = memory[-(len(memory) // 3) :]
    if len(last) < 3:
        return 0.0
    return linear_regression([number / 30 for number in range(len(last))], last).slope


def report(load: Load, options: argparse.Namespace) -> str:
    """Markdown."""
    from flora_train.runtime.environment import environment

    facts, seen = environment(), load.seen
    lines = [
        f"# {options.minutes:g} minutes of mixed load on a vLLM server",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; {versions()}; commit {facts.commit}.",
        f"{options.model.name}, float32, {CLIENTS} clients, {len(load.adapters)} adapters (fLoRA residual "
        f"and pure, LoRA, IA3) under {NAMES} names, `{' '.join(SLOTS)}`.",
        f"`python benchmarks/serving_load.py --minutes {options.minutes:g} --save` prints this file.",
        "",
        "| event | times |",
        "|---|---|",
        *(f"| {event} | {number} |" for event, number in sorted(seen.events.items())),
        "",
    ]
    for process in ("server", "engine"):
        memory = [sample[process] for sample in seen.memory]
        change = growth(memory)
        verdict = "flat" if change <= GROWTH else "GROWING"
        first, most, last = (round(size / 1e6) for size in (memory[0], max(memory), memory[-1]))
        lines.append(
            f"Resident memory of the {process}: {first} MB at first, {most} MB at most, {last} MB at last; "
            f"{change:+.1%} from the middle third to the last: {verdict}. In the last third "
            f"{slope(memory) / 1e6:+.2f} MB a minute."
        )
    lines += ["", f"Faults: {len(seen.faults)}."]
    lines += [f"- {fault[:500]!r}" for fault in seen.faults[:20]]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--quick", action="store_true", help="three minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--log", type=Path, help="keep the server's log here")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    use_serving_environment()
    options.model = options.model.absolute()
    if options.quick:
        options.minutes = 3
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        expected = prepare(options.model, folder)
        from transformers import AutoConfig

        inputs = prompts(AutoConfig.from_pretrained(options.model).vocab_size)
        server = Server(
            options.model,
            options.log or folder / "server.log",
            [*FLAGS, *CACHE, *SLOTS],
            environment=ENVIRONMENT,
        )
        load = Load(server, folder, expected, inputs, options.seed)
        with running(server):
            load.run(options.minutes * 60)
        text = report(load, options)
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")
    sys.exit(bool(load.seen.faults))


if __name__ == "__main__":
    main()
