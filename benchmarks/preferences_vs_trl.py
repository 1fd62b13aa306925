"""A DPO step of 8 LoRA adapters: flora_train with all of them in one batch, against TRL's DPOTrainer, adapter
by adapter.

TRL runs in its own environment (`make trl-env`) and in its own process. Both train adapters of the same shape
on the same pairs, and their steps take turns: one of ours, which updates 8 adapters, then 8 steps of TRL's
training loop. A step of ours is planned, collated, computed and applied; one of TRL's is an iteration of
`DPOTrainer.train()`, without logging. The reference of both is the base in the same step.

With --threads 1 the processor's time is measured, which is the time of an idle machine, also where other
programs run; with more threads it is the clock.

Usage: python benchmarks/preferences_vs_trl.py [--model tiny|smollm2] [--threads 2] [--repeats 7] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapted_layer import where

# isort: split
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, logging

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.load import validate
from flora_train.data.documents import EncodedDocument, EncodedExample
from flora_train.data.mixture import Draw
from flora_train.data.preferences.preference import Preference
from flora_train.data.preferences.split import PreferenceSplit, preference_split
from flora_train.data.split_builder import SplitBuilder
from flora_train.data.task import Task
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.context import TrainingContext
from flora_train.training.step_plan import plan_step
from flora_train.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "preferences_vs_trl_cpu.md"
WORKER = Path(__file__).with_name("trl_dpo_worker.py")
SMOLLM2 = ROOT / "assets" / "models" / "smollm2-135m"
ADAPTERS, RANK, BETA, LEARNING_RATE = 8, 8, 0.1, 1e-4
PROMPT, COMPLETION = 16, 16
"""Tokens; the end token is one of the completion's."""
LENGTH = PROMPT + COMPLETION
PAIRS = {"tiny": (1, 2, 4, 8), "smollm2": (1, 2)}
"""Pairs of each adapter in a step."""
TINY = {
    "vocab_size": 1000,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
FORMS = {"one task": 1, "8 tasks": ADAPTERS}
"""Whether the adapters learn from the same pairs, whose reference is then computed once, or each from its
own."""


@dataclass(frozen=True)
class Pairs:
    """Pairs as token ids, without the end token."""

    prompts: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray

    @classmethod
    def random(cls, n: int, vocabulary: int) -> Pairs:
        generator = np.random.default_rng(0)
        shapes = [(n, PROMPT), (n, COMPLETION - 1), (n, COMPLETION - 1)]
        return cls(*(generator.integers(2, vocabulary, shape) for shape in shapes))

    def split(self) -> PreferenceSplit:
        builder = SplitBuilder()
        for prompt, *completions in zip(self.prompts, self.chosen, self.rejected, strict=True):
            documents = []
            for completion in completions:
                tokens = np.concatenate([prompt, completion, [1]]).astype(np.int32)
                documents.append(EncodedDocument(tokens, [(PROMPT, LENGTH)], COMPLETION))
            builder.add(EncodedExample(tuple(documents), "whole"))
        return preference_split(builder.split(), LENGTH)

    def texts(self) -> list[dict[str, str]]:
        rows = []
        for prompt, chosen, rejected in zip(self.prompts, self.chosen, self.rejected, strict=True):
            row = {
                "prompt": _words(prompt),
                "chosen": " " + _words(chosen),
                "rejected": " " + _words(rejected),
            }
            rows.append(row)
        return rows


def _words(tokens: np.ndarray) -> str:
    return " ".join(f"w{token}" for token in tokens)


@dataclass
class FixedDraws:
    """A mixture that draws the same number of pairs of every task in each step."""

    tasks: dict[str, tuple[str, ...]]
    pairs: int
    seed: int = 0

    def step(self, number: int) -> list[Draw]:
        examples = tuple(range(self.pairs))
        return [Draw(task, examples, adapters) for task, adapters in self.tasks.items()]


class Ours:
    """8 adapters, trained in the same batches."""

    def __init__(self, base: Path, pairs: Pairs, folder: Path, *, size: int, num_tasks: int) -> None:
        names = [f"task{i}" for i in range(num_tasks)]
        entry = AdapterConfig(
            method="lora", rank=RANK, lr=LEARNING_RATE, lr_schedule="constant", max_grad_norm=None
        )
        specs = [
            make_spec(names[i % num_tasks], f"lora{i}", entry, default_steps=10**6) for i in range(ADAPTERS)
        ]
        preference, split = Preference("dpo", BETA), pairs.split()
        tasks = {name: Task(name, 1.0, split, split, "", preference=preference) for name in names}
        config = validate(
            {
                "name": "benchmark",
                "model": {"path": str(base)},
                "tasks": {name: {"train": "unused.jsonl"} for name in names},
                "adapters": {"unused": {"method": "lora", "lr": 1e-3}},
                "training": {
                    "steps": 10**6,
                    "tokens_per_step": 10**6,
                    "tokens_per_microbatch": 10**6,
                    "max_length": LENGTH,
                },
            }
        )
        model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
        model.train()
        self.bank = AdapterBank.attach(model, specs)
        self.tasks, self.number = tasks, 0
        self.trainer = Trainer(
            TrainingContext(
                config=config, folder=RunFolder(folder), tasks=tasks, model=model, bank=self.bank, pad_token=0
            )
        )
        of_task = {name: tuple(spec.name for spec in specs if spec.task == name) for name in names}
        self.draws: Any = FixedDraws(of_task, size)

    def step(self) -> None:
        plan = plan_step(self.draws, self.number, self.tasks, self.bank, 10**6)
        assert plan is not None
        self.trainer.step(self.number, plan)
        self.number += 1


class Theirs:
    """TRL's trainer in its own process, which steps when it is told to."""

    def __init__(
        self, python: Path, base: Path, pairs: Pairs, folder: Path, *, size: int, threads: int
    ) -> None:
        request = {
            "base": str(base),
            "rows": pairs.texts(),
            "batch_size": size,
            "rank": RANK,
            "beta": BETA,
            "learning_rate": LEARNING_RATE,
            "threads": threads,
            "output": str(folder / "trl"),
        }
        (folder / "request.json").write_text(json.dumps(request))
        self.process = subprocess.Popen(
            [str(python), str(WORKER), str(folder / "request.json")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)},
        )
        answer = json.loads(self._answer())
        self.versions: dict[str, str] = answer["versions"]
        self.parameters: int = answer["parameters"]

    def steps(self, n: int) -> float:
        """Seconds that n iterations of its training loop take."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _answer(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("answer "):
                return line.removeprefix("answer ").strip()
        raise SystemExit("TRL's process ended: run it by hand to see why")


def save_base(name: str, folder: Path) -> tuple[Path, int]:
    """Folder of the model with a tokenizer whose words are tokens, and the size of its vocabulary."""
    if name == "tiny":
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    else:
        model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype="float32")
    model.save_pretrained(folder)
    vocabulary = model.config.vocab_size
    words = {"<pad>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder, vocabulary


def measure(
    base: Path, vocabulary: int, python: Path, *, size: int, repeats: int, folder: Path
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of every repeat of each contender, and TRL's versions."""
    pairs = Pairs.random(size, vocabulary)
    theirs = Theirs(python, base, pairs, folder, size=size, threads=torch.get_num_threads())
    ours = {
        form: Ours(base, pairs, folder / form, size=size, num_tasks=tasks) for form, tasks in FORMS.items()
    }
    for trainer in ours.values():
        assert trainer.bank.pools[0].row_size == theirs.parameters
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {"TRL": [], **{form: [] for form in FORMS}}
    for repeat in range(repeats + 2):  # the first two warm up
        of_repeat = {"TRL": theirs.steps(ADAPTERS)}
        for form, trainer in ours.items():
            started = clock()
            trainer.step()
            of_repeat[form] = clock() - started
        if repeat >= 2:
            for name, value in of_repeat.items():
                times[name].append(value)
    theirs.close()
    return times, theirs.versions


def row(size: int, times: dict[str, list[float]]) -> str:
    """A line of the table: medians, and medians of the ratios of the same repeat."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    cells = [f"{size}", f"{2 * size * ADAPTERS * LENGTH:,}", f"{medians['TRL']:.3f}"]
    for form in FORMS:
        ratios = [trl / own for trl, own in zip(times["TRL"], times[form], strict=True)]
        cells += [
            f"{medians[form]:.3f}",
            f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})",
        ]
    return f"| {' | '.join(cells)} |"


def report(names: Sequence[str], python: Path, repeats: int) -> str:
    titles = {
        "tiny": "Llama of 4 layers, d = 256, vocabulary of 1,000, random weights",
        "smollm2": "SmolLM2-135M",
    }
    clock = ""
    if torch.get_num_threads() == 1:
        clock = ", of the processor's time on one thread"
    lines = [
        f"# A DPO step of {ADAPTERS} LoRA adapters at once, against TRL's trainer adapter by adapter",
        "",
        f"{where()}.",
        "",
        f"Rank {RANK} on every linear layer, AdamW, float32, rows of {LENGTH} tokens, of which {PROMPT} are "
        f"the prompt, reference in the batch. Seconds of one step of all {ADAPTERS} adapters: medians of "
        f"{repeats} repeats that took turns{clock}; times as fast: median (range) of the ratios of the same "
        "repeat. One task: all adapters "
        "learn from the same pairs, whose reference is computed once. 8 tasks: each from pairs of its own.",
        "",
    ]
    versions: dict[str, str] = {}
    for name in names:
        lines += [
            f"## {titles[name]}",
            "",
            "| pairs of each adapter | tokens of all policy rows | TRL (s) | one task (s) | times as fast | "
            "8 tasks (s) | times as fast |",
            "|---|---|---|---|---|---|---|",
        ]
        with tempfile.TemporaryDirectory() as temporary:
            base, vocabulary = save_base(name, Path(temporary) / "base")
            for size in PAIRS[name]:
                folder = Path(temporary) / f"pairs{size}"
                folder.mkdir()
                times, versions = measure(base, vocabulary, python, size=size, repeats=repeats, folder=folder)
                lines.append(row(size, times))
                print(lines[-1], file=sys.stderr)
        lines.append("")
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    model = f"--model {names[0]} " if len(names) == 1 else ""
    command = f"python benchmarks/preferences_vs_trl.py {model}--threads {torch.get_num_threads()} --save"
    lines.append(f"TRL's environment: {named}. `{command}` prints this file.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(PAIRS), help="default: tiny, and smollm2 where it is built")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of both processes")
    parser.add_argument(
        "--trl-python",
        default=os.environ.get("FLORA_TRL_PYTHON", str(ROOT / ".venv-trl" / "bin" / "python")),
        help="the interpreter of TRL's environment",
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    options = parser.parse_args()
    python = Path(options.trl_python)
    if not python.exists():
        raise SystemExit(f"there is no {python}: run make trl-env")
    torch.set_num_threads(options.threads)
    logging.set_verbosity_error()
    names = [options.model] if options.model else ["tiny", *(["smollm2"] if SMOLLM2.exists() else [])]
    text = report(names, python, options.repeats)
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
