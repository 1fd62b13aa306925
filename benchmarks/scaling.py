"""Time before training against the number of adapters: `plan`, and everything up to the end of the first
step.

A tiny random Llama with N adapters in two forms: N tasks of eight rows with one LoRA each, and a sweep of N
learning rates on one task. Every measurement has its own process and cache. Counted is the processor time of
that process after its imports, the best of several repeats, because other programs on the machine disturb it
least. `beside linear` is the time per adapter relative to that of the fewest adapters: 1.0 is linear, less is
better.

Usage: python benchmarks/scaling.py [--adapters 500 1000 2500 5000] [--repeats 2] [--save]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

RESULT = Path(__file__).parent / "results" / "scaling_cpu.md"
ADAPTERS = (500, 1000, 2500, 5000)
FORMS = {"tasks": "N tasks, one LoRA each", "sweep": "a sweep of N learning rates on one task"}
STAGES = {"plan": "plan", "step": "to the end of the first step"}
WORDS = ["<pad>", "<end>", "<unk>", *"abcdefghijklmnopqrstuvwxyz0123456789 "]
LENGTH = 16
"""Tokens of the longest example."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapters",
        type=int,
        nargs="+",
        default=ADAPTERS,
        help="how many; the first is what others are compared with",
    )
    parser.add_argument(
        "--repeats", type=int, default=2, help="processes for each measurement, of which the best counts"
    )
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "FORM", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        stage, form, count = options.one
        print(json.dumps(measure(stage, form, int(count))))
        return
    text = "\n".join(table(options.adapters, options.forms, options.repeats))
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


def table(counts: list[int], forms: list[str], repeats: int) -> list[str]:
    """Markdown."""
    rows = []
    for form in forms:
        for stage, what in STAGES.items():
            first: float | None = None
            for count in counts:
                seconds = min(ask(stage, form, count) for _ in range(repeats))
                first = seconds / count if first is None else first
                rows.append(
                    f"| {FORMS[form]} | {what} | {count:,} | {seconds:.2f} | {seconds / count / first:.2f} |"
                )
                print(rows[-1], file=sys.stderr, flush=True)
    from flora_train.runtime.environment import environment

    facts = environment()
    return [
        "# Time before training, by the number of adapters",
        "",
        f"{facts.machine.processor}, {facts.machine.cpus} CPUs; Python "
        f"{sys.version.split()[0]}, torch {facts.packages['torch']}; "
        f"tiny Llama in float32, one thread; processor time, the best of {repeats}. `python "
        "benchmarks/scaling.py --save` prints this file.",
        "",
        "| form | what | adapters | seconds | beside linear |",
        "|---|---|---|---|---|",
        *rows,
    ]


def ask(stage: str, form: str, count: int) -> float:
    """Seconds of one separate process."""
    with TemporaryDirectory() as cache:
        words = [sys.executable, __file__, "--one", stage, form, str(count)]
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(json.loads(done.stdout.splitlines()[-1]))


class FirstStepDone(Exception):
    """Ends a run after the measured part."""


def measure(stage: str, form: str, count: int) -> float:
    """Processor seconds of one stage, beginning with reading the recipe."""
    import flora_train.cli  # noqa: F401  (before torch: how its threads wait, as in a run)
    from flora_train.commands.plan import plan_run
    from flora_train.commands.train import train_run
    from flora_train.config.load import load_config
    from flora_train.training.trainer import Trainer

    with TemporaryDirectory() as name:
        folder = Path(name)
        recipe = write_recipe(folder, form, count)
        started = time.process_time()
        config = load_config([f"recipe={recipe}", f"output_dir={folder / 'run'}"])
        if stage == "plan":
            plan_run(config)
            return time.process_time() - started
        step = Trainer.step

        def one_step(trainer: Trainer, *arguments: Any) -> None:
            step(trainer, *arguments)
            raise FirstStepDone

        Trainer.step = one_step  # type: ignore[method-assign]
        try:
            train_run(config)
        except FirstStepDone:
            return time.process_time() - started
    raise SystemExit("the run had no step")


def write_recipe(folder: Path, form: str, count: int) -> Path:
    """A recipe with its model and data."""
    import torch
    import yaml
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=128, **sizes)
    )
    model.save_pretrained(folder / "model")
    for i in range(count if form == "tasks" else 1):
        lines = [json.dumps({"text": f"task {i} row {row}"}) for row in range(8)]
        (folder / f"{i}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    lora = {"method": "lora", "rank": 2, "target_modules": ["q_proj", "v_proj"]}
    tasks = {
        f"t{i}": {"train": str(folder / f"{i}.jsonl"), "text": "text"}
        for i in range(count if form == "tasks" else 1)
    }
    lr: Any = 1e-3 if form == "tasks" else [round(1e-5 * (i + 1), 8) for i in range(count)]
    tokens = 512 if form == "tasks" else 2 * LENGTH * count
    content = {
        "name": "scaling",
        "num_threads": 1,
        "model": {"path": str(folder / "model"), "dtype": "float32"},
        "tasks": tasks,
        "adapters": {"lora": {**lora, "lr": lr}},
        "training": {
            "steps": 1000,
            "tokens_per_step": tokens,
            "tokens_per_microbatch": 512,
            "max_length": LENGTH,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
