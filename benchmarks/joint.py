"""Joint training of N adapters: flora_train's step against every peer's, on the same model and the same
batch.

Every contender is a separate process that runs one step on request. They alternate, so that a slow moment of
the machine affects all of them. Printed are useful tokens per second (from the median step), the share of its
own N = 1 rate that each keeps, and flora_train's speed relative to each peer and to the frozen model, which
is the limit (median of the ratios of neighbouring steps). With --save every N is written as soon as it is
measured.

Usage: python benchmarks/joint.py [--quick] [--only WORDS] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flora_train.runtime.environment import environment, now

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "benchmarks"
RESULTS = HERE / "results"
PEERS = HERE / ".peers"


@dataclass(frozen=True)
class Contender:
    """label in the table; program in contenders/; environment: flora_train's, or one of .peers/."""

    label: str
    program: str
    method: str
    environment: str = "ours"


OURS = {
    "lora": "ours, LoRA r=8",
    "lora5": "ours, LoRA r=8 without o and gate",
    "flora": "ours, fLoRA r=4",
    "mixed": "ours, mixed methods",
}
FROZEN = "frozen model alone"
CONTENDERS = (
    Contender(FROZEN, "frozen", "none"),
    Contender(OURS["lora"], "ours", "lora"),
    Contender("PEFT loop, LoRA r=8", "peft_loop", "lora"),
    Contender("PEFT adapter_names, LoRA r=8", "peft_names", "lora"),
    Contender(OURS["lora5"], "ours", "lora5"),
    Contender("AdapterHub BatchSplit, LoRA r=8 without o and gate", "adapterhub", "lora5", "adapterhub"),
    Contender(OURS["flora"], "ours", "flora"),
    Contender("PEFT loop, HiRA r=4", "peft_loop", "hira"),
    Contender(OURS["mixed"], "ours", "mixed"),
)
RIVALS = {
    OURS["lora"]: [*(c.label for c in CONTENDERS if c.method == "lora" and c.program != "ours"), FROZEN],
    OURS["lora5"]: ["AdapterHub BatchSplit, LoRA r=8 without o and gate"],
    OURS["flora"]: ["PEFT loop, HiRA r=4", FROZEN],
    OURS["mixed"]: [FROZEN],
}


@dataclass(frozen=True)
class Regime:
    name: str
    note: str
    model: str
    rows: int
    length: int
    adapters: tuple[int, ...]
    quick: tuple[int, ...]
    repeats: int


REGIMES = (
    Regime(
        "small model, fixed batch",
        (
            "Llama of 4 layers, d = 256, random weights; 64 rows x 32 tokens shared by N adapters, "
            "one to 64 rows each"
        ),
        "small",
        64,
        32,
        (1, 2, 4, 8, 16, 64),
        (1, 16),
        15,
    ),
    Regime(
        "SmolLM2-135M, small batches per task",
        "30 layers, d = 576; 16 rows x 32 tokens shared by N adapters",
        "assets/models/smollm2-135m",
        16,
        32,
        (1, 16),
        (),
        5,
    ),
    Regime(
        "SmolLM2-135M, one large task",
        "4 rows x 128 tokens, all of one adapter: here mixing can gain nothing, and none is expected",
        "assets/models/smollm2-135m",
        4,
        128,
        (1,),
        (),
        5,
    ),
)


class Worker:
    """A contender's process. Raises RuntimeError with its last output if it does not become ready."""

    def __init__(
        self, contender: Contender, python: Path, regime: Regime, adapters: int, threads: int
    ) -> None:
        program = HERE / "contenders" / f"{contender.program}.py"
        numbers = map(str, (adapters, regime.rows, regime.length, threads))
        path = {"PYTHONPATH": str(ROOT)} if contender.environment == "ours" else {}
        self.process = subprocess.Popen(
            [str(python), str(program), regime.model, contender.method, *numbers],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.memory = 0
        while (line := self._out.readline()).strip() != "ready":
            if not line:
                words = (self.process.communicate()[1] or "").strip().splitlines()
                raise RuntimeError(words[-1] if words else "it ended without a word")

    def step(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        seconds, memory = self._out.readline().split()
        self.memory = int(memory)
        return float(seconds)

    def close(self) -> None:
        with suppress(OSError):
            self.process.communicate()

    @property
    def _out(self) -> IO[str]:
        assert self.process.stdout is not None
        return self.process.stdout


def python_of(name: str) -> Path:
    """The interpreter of an environment; a peer's is created on first use. Raises CalledProcessError if that
    fails."""
    if name == "ours":
        return Path(sys.executable)
    folder = PEERS / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print(f"making the environment of {name} (once)", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        requirements = HERE / "contenders" / f"{name}.requirements.txt"
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
        (folder / "installed").touch()
    return python


def measure(
    regime: Regime, adapters: int, repeats: int, threads: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(label -> seconds of each step, label -> why it was skipped)."""
    workers: dict[str, Worker] = {}
    skipped: dict[str, str] = {}
    for contender in CONTENDERS:
        try:
            workers[contender.label] = Worker(
                contender, python_of(contender.environment), regime, adapters, threads
            )
        except (RuntimeError, subprocess.CalledProcessError, OSError) as error:
            skipped[contender.label] = str(error)
            print(f"skipped {contender.label}: {error}", file=sys.stderr, flush=True)
    seconds: dict[str, list[float]] = {label: [] for label in workers}
    for _ in range(repeats):
        for label, worker in list(workers.items()):
            try:
                seconds[label].append(worker.step())
            except (OSError, ValueError):  # its pipe is broken, or it said nothing
                workers.pop(label).close()
                del seconds[label]
                skipped[label] = f"ended in the middle of N = {adapters}: out of memory?"
                print(f"skipped {label}: {skipped[label]}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return seconds, skipped


def summary(regime: Regime, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """tokens_per_second by label, and ratios: flora_train -> peer -> relative speed (median over the
    rounds)."""
    tokens = regime.rows * regime.length
    return {
        "tokens_per_second": {label: tokens / statistics.median(times) for label, times in seconds.items()},
        "ratios": {
            ours: {
                rival: statistics.median(
                    theirs / mine for mine, theirs in zip(seconds[ours], seconds[rival], strict=True)
                )
                for rival in rivals
                if rival in seconds
            }
            for ours, rivals in RIVALS.items()
            if ours in seconds
        },
    }


def table(result: dict[str, Any]) -> list[str]:
    """Markdown."""
    counts = list(result["adapters"])
    labels = [c.label for c in CONTENDERS if c.label in result["adapters"][counts[0]]["tokens_per_second"]]
    lines = [
        f"## {result['name']}",
        "",
        f"{result['note']}. Useful tokens per second, from the median of {result['repeats']} steps "
        f"(commit {result['commit'][:10]}, {result['finished'][:10]}).",
        "",
    ]
    several = len(counts) > 1
    keeps = " | kept at N = 16" if several and "16" in counts else ""
    lines += [
        f"| | {' | '.join(f'N = {n}' for n in counts)}{keeps} |",
        "|---" * (len(counts) + 1 + bool(keeps)) + "|",
    ]
    for label in labels:
        rates = {n: result["adapters"][n]["tokens_per_second"].get(label) for n in counts}
        cells = ["–" if rate is None else f"{rate:,.0f}" for rate in rates.values()]
        if keeps:
            cells.append(f"{rates['16'] / rates[counts[0]]:.2f}" if rates["16"] else "–")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        f"| times as fast | {' | '.join(f'N = {n}' for n in counts)} |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for ours, rivals in RIVALS.items():
        for rival in rivals:
            found = [result["adapters"][n]["ratios"].get(ours, {}).get(rival) for n in counts]
            if any(found):
                cells = ["–" if ratio is None else f"{ratio:.2f}" for ratio in found]
                lines.append(f"| {ours} : {rival} | {' | '.join(cells)} |")
    lines += [f"\nSkipped: {label} ({why})" for label, why in result["skipped"].items()]
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="N = 1 and 16 on the small model only")
    parser.add_argument(
        "--only", default="", help="the regimes whose name holds this; --save keeps what is there of others"
    )
    parser.add_argument(
        "--repeats", type=int, help="steps of each contender (default 15, of the larger model 5)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each contender")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}/joint_cpu.*")
    options = parser.parse_args()
    chosen = [
        (regime, regime.quick if options.quick else regime.adapters)
        for regime in REGIMES
        if options.only in regime.name
    ]
    facts = environment().model_dump() | {"threads": options.threads}
    results: dict[str, dict[str, Any]] = saved() if options.only else {}
    for regime, counts in chosen:
        repeats = options.repeats or regime.repeats
        result: dict[str, Any] = {
            "name": regime.name,
            "note": regime.note,
            "repeats": repeats,
            "adapters": {},
            "skipped": {},
        }
        for adapters in counts:
            print(f"{regime.name}: N = {adapters}", file=sys.stderr, flush=True)
            seconds, skipped = measure(regime, adapters, repeats, options.threads)
            result["adapters"][str(adapters)] = summary(regime, seconds)
            result["skipped"] |= skipped
            results[regime.name] = result | {"commit": facts["commit"], "finished": now()}
            if options.save:
                save(facts, results)
    print(text(facts, list(results.values())))


def text(facts: dict[str, Any], results: list[dict[str, Any]]) -> str:
    return "\n".join([*heading(facts), *(line for result in results for line in table(result))])


def saved() -> dict[str, dict[str, Any]]:
    """Results by regime of the last run with --save."""
    file = RESULTS / "joint_cpu.json"
    return (
        {result["name"]: result for result in json.loads(file.read_text())["regimes"]}
        if file.exists()
        else {}
    )


def save(facts: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    ordered = [results[regime.name] for regime in REGIMES if regime.name in results]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "joint_cpu.json").write_text(json.dumps({"facts": facts, "regimes": ordered}, indent=1) + "\n")
    (RESULTS / "joint_cpu.md").write_text(text(facts, ordered) + "\n")


def heading(facts: dict[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in ("torch", "transformers", "peft"))
    return [
        "# N adapters in one step: ours and its peers",
        "",
        f"{facts['machine']['processor']}, {facts['threads']} threads, float32, {packages}.",
        "A step is forward, loss, backward and AdamW; the contenders' steps took turns.",
        "`python benchmarks/joint.py --save` prints this file.",
        "",
    ]


if __name__ == "__main__":
    main()
