"""The headline recipe on a GPU: `recipe=multipl_e` on a StarCoder of 1B parameters with random weights.

The recipe as it stands (nine languages, 27 adapters, packing, its step and micro-batch), but for the model,
the rows (code of assets/code, the same for every language), 30 steps, and the programming problems, which
are left out. Prints tokens per second and the peak memory beside what `flora-train plan` estimates from the
model's sizes. Needs no network. --tiny: a small model, short rows and few steps, on any machine.

Usage: python benchmarks/headline_gpu.py [--tiny] [--save]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from adapted_layer import DEVICE, where

# isort: split
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, logging

from flora_train.adapters.pool import build_pools
from flora_train.adapters.spec import expand
from flora_train.commands.plan_gpus import GpuReport, report_on_gpus
from flora_train.commands.train import train_run
from flora_train.config.load import load_config
from flora_train.config.published_models import published_model
from flora_train.config.schema import RunConfig
from flora_train.data.assumed_rows import assumed_tasks
from flora_train.evaluation.code.contenders import learnt_tasks
from flora_train.models.loading import empty_model
from flora_train.training.gpu_hours import hours
from flora_train.training.gpu_memory import GpuMemory

RESULT = Path(__file__).parent / "results" / f"headline_{DEVICE.type}.md"
CODE = Path(__file__).parents[1] / "assets" / "code"
PUBLISHED = "bigcode/starcoderbase-1b"
TINY = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_inner": 256, "vocab_size": 2048}
TINY_KEYS = [
    "training.max_length=64",
    "training.tokens_per_step=13824",
    "training.tokens_per_microbatch=1024",
]
END = "<|endoftext|>"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a small model, to see that this works")
    parser.add_argument("--steps", type=int, help="steps of the run (default: 30; 3 with --tiny)")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    logging.set_verbosity_error()
    steps = options.steps or (3 if options.tiny else 30)
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        build_model(model, tiny=options.tiny)
        config = load_config(recipe_words(folder, model, steps=steps, tiny=options.tiny))
        estimate = plan(config)
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        train_run(config)
        text = "\n".join(report(config, estimate, tiny=options.tiny))
    print(text)
    if options.save:
        RESULT.write_text(text + "\n", encoding="utf-8")


def texts() -> list[str]:
    """The committed code of all languages."""
    rows = [json.loads(line) for file in sorted(CODE.glob("*.train.jsonl")) for line in file.open()]
    return [row.get("prompt", "") + row.get("completion", row.get("text", "")) for row in rows]


def build_model(folder: Path, *, tiny: bool) -> None:
    """A GPT-BigCode with random weights, and a byte-level tokenizer of the committed code.

    As StarCoder's, it has no padding token.
    """
    published = published_model(PUBLISHED)
    assert published is not None
    values: dict[str, Any] = dict(published.config) | (TINY if tiny else {})
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    torch.manual_seed(0)
    with torch.device(DEVICE):
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts(), trainer)
    ends = {"bos_token": END, "eos_token": END, "unk_token": END}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder)


def recipe_words(folder: Path, model: Path, *, steps: int, tiny: bool) -> list[str]:
    """The recipe with the keys that differ here."""
    rows = folder / "code.jsonl"
    rows.write_text("\n".join(json.dumps({"content": text}) for text in texts()), encoding="utf-8")
    words = [
        "recipe=multipl_e",
        f"model.path={model}",
        f"output_dir={folder / 'run'}",
        f"training.steps={steps}",
        "training.log_every=1",
        "evaluation.problems=[]",
        *(TINY_KEYS if tiny else []),
    ]
    for task in sorted(learnt_tasks(load_config(["recipe=multipl_e"]))):
        words += [f"tasks.{task}.train={rows}", f"tasks.{task}.max_validation_examples=8"]
    return words


def plan(config: RunConfig) -> GpuReport:
    """The estimate, as `flora-train plan` makes it without rows."""
    model = empty_model(config.model)
    pools, _ = build_pools(model, expand(config))
    return report_on_gpus(config, model, pools, assumed_tasks(config))


def speeds(config: RunConfig) -> Iterator[float]:
    """Tokens per second of every step but the first two, which compile and allocate."""
    for line in (Path(config.folder) / "metrics.jsonl").open(encoding="utf-8"):
        record = json.loads(line)
        if record.get("step", 0) > 2 and "tokens_per_second" in record:
            yield record["tokens_per_second"]


def report(config: RunConfig, estimate: GpuReport, *, tiny: bool) -> list[str]:
    """Markdown."""
    measured = statistics.median(speeds(config))
    memory: GpuMemory = estimate.plans[0].memory
    seconds = 3600 * hours(estimate.work.training, 80, 1) / config.training.steps
    planned = f"{config.training.tokens_per_step / seconds:,.0f} (on an H100)"
    if tiny:
        planned = "-"  # a small model does not fill a GPU
    peak = reserved = "-"
    if DEVICE.type == "cuda":
        peak = f"{torch.cuda.max_memory_allocated() / 1e9:.1f}"
        reserved = f"{torch.cuda.max_memory_reserved() / 1e9:.1f}"
    allocated = (memory.base + memory.adapters + memory.activations) / 1e9
    size = "a small GPT-BigCode" if tiny else f"the layout of {PUBLISHED}"
    return [
        "# The headline recipe on a GPU",
        "",
        f"{where()}. `recipe=multipl_e` on {size} with random weights: 27 adapters, "
        f"{config.training.tokens_per_step:,} tokens a step, {config.training.steps} steps. "
        "`python benchmarks/headline_gpu.py --save` prints this file.",
        "",
        "| | measured | planned from the sizes |",
        "|---|---|---|",
        f"| tokens/s, median | {measured:,.0f} | {planned} |",
        f"| peak memory, allocated (GB) | {peak} | {allocated:.1f} |",
        f"| reserved by the allocator; the plan adds CUDA (GB) | {reserved} | {memory.training / 1e9:.1f} |",
    ]


if __name__ == "__main__":
    main()
