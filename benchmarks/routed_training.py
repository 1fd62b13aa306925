"""A training step of four MixLoRA adapters: mixed in one batch, against loops over adapters and experts.

SmolLM2-135M; each adapter has eight LoRA experts of rank 8, top-2, in every feed-forward block, LoRA in the
attention layers, and a load-balance loss. `bank`: all rows in one batch (flora_train). `adapters in turn`:
the same rows, one adapter after the other, experts in a Python loop of whole feed-forward blocks. `one pass`:
as MoE-PEFT orders the work, whose base layers of attention run once for the rows of all adapters; `one pass,
shared` also computes the base's W1 x and W3 x once for all experts, its option efficient_operator. MoE-PEFT
itself needs torch < 2.6 and transformers < 4.47 and so cannot run beside this package: the loops are ours
(expert_loop.py, tested against the bank's outputs and gradients). A step is forward, losses, backward and
AdamW; the ways take turns, and ratios are medians over the rounds.

Usage: python benchmarks/routed_training.py [--save] [--repeats N] [--model FOLDER] [--profile]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from expert_loop import ExpertLoop, LoopAdapter
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.routing import RowDraw
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.config.training_schema import TrainingConfig
from flora_train.data.batch import MixedBatch
from flora_train.models.loading import load_base_model
from flora_train.runtime.environment import available_cpus, environment
from flora_train.training.loss import RowLosses
from flora_train.training.optimizer import BankOptimizer

RESULT = Path(__file__).parent / "results" / "routed_training_cpu.md"
MODEL = "assets/models/smollm2-135m"
ADAPTERS = 4
SIZES = ((1, 32), (4, 64))
"""Rows of each adapter, and tokens of a row."""
ADAPTER: dict[str, Any] = {
    "method": "mixlora",
    "experts": 8,
    "top_k": 2,
    "rank": 8,
    "balance_loss": 0.01,
    "lr": 1e-4,
}
RATE = 1e-4
Step = Callable[[], None]


def shared_copy(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    tensors = chain(model.parameters(), model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})


def batch_of(ids: Tensor, owners: Tensor) -> MixedBatch:
    """Rows of full length that are learnt as a whole."""
    return MixedBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, owners, ())


def make_bank(model: Any) -> AdapterBank:
    """A bank with the adapters, away from the identity."""
    specs = [
        make_spec(f"task{k}", "mix", AdapterConfig(**ADAPTER), default_steps=1000) for k in range(ADAPTERS)
    ]
    bank = AdapterBank.attach(shared_copy(model), specs)
    generator = torch.Generator().manual_seed(0)
    for adapter in range(ADAPTERS):
        row = bank.row(adapter)
        row += 0.01 * torch.randn(row.shape, generator=generator)
    return bank


def bank_step(bank: AdapterBank, ids: Tensor, rows: int) -> Step:
    """All rows in one batch."""
    losses, optimizer = RowLosses(bank.model), BankOptimizer(bank, TrainingConfig(steps=1000))
    owners = torch.arange(ADAPTERS).repeat_interleave(rows)
    batch, predicted = batch_of(ids, owners), rows * (ids.shape[1] - 1)

    def step() -> None:
        bank.route(owners, draws=[RowDraw(0, 1.0)] * len(ids))
        (losses(batch) / predicted).sum().backward()
        optimizer.step(range(ADAPTERS))

    return step


def loop_step(model: Any, bank: AdapterBank, ids: Tensor, rows: int, *, turns: bool, shared: bool) -> Step:
    """The same adapters in a loop: each in a pass of its own (`turns`), or all in one pass."""
    adapters = [LoopAdapter.of_bank(bank, name) for name in bank.ids]
    loop = ExpertLoop(shared_copy(model), adapters, shared_inputs=shared)
    losses = RowLosses(loop.model)
    parameters = [tensor for adapter in adapters for tensor in adapter.tensors()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    owners, predicted = torch.arange(ADAPTERS).repeat_interleave(rows), rows * (ids.shape[1] - 1)
    spans = [(adapter, adapter * rows, (adapter + 1) * rows) for adapter in range(ADAPTERS)]
    passes = [(spans, batch_of(ids, owners))]
    if turns:
        passes = [
            ([(adapter, 0, rows)], batch_of(ids[first:end], owners[first:end]))
            for adapter, first, end in spans
        ]

    def step() -> None:
        for of_pass, batch in passes:
            loop.rows.begin(of_pass)
            loss = (losses(batch) / predicted).sum()
            for adapter, _, _ in of_pass:
                loss = loss + loop.balance_loss(adapter)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def steps_of(model: Any, rows: int, length: int) -> dict[str, Step]:
    """Way -> its step."""
    generator = torch.Generator().manual_seed(1)
    highest = min(model.config.vocab_size, 30_000)
    ids = torch.randint(0, highest, (ADAPTERS * rows, length), generator=generator)
    bank = make_bank(model)
    loops = {
        "adapters in turn": {"turns": True, "shared": False},
        "one pass": {"turns": False, "shared": False},
        "one pass, shared": {"turns": False, "shared": True},
    }
    made = {name: loop_step(model, bank, ids, rows, **options) for name, options in loops.items()}
    return {"bank": bank_step(bank, ids, rows), **made}


def measured(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Way -> seconds of each round, after one that is not counted."""
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    for number in range(repeats + 1):
        for way, step in steps.items():
            started = time.perf_counter()
            step()
            if number > 0:
                seconds[way].append(time.perf_counter() - started)
    return seconds


def table(model: Any, repeats: int) -> list[str]:
    """Markdown: a row for each size and way."""
    lines = [
        "| rows of an adapter x tokens | way | seconds a step | tokens/s | times the bank's time |",
        "|---|---|---|---|---|",
    ]
    for rows, length in SIZES:
        seconds = measured(steps_of(model, rows, length), repeats)
        for way, taken in seconds.items():
            ratio = median(a / b for a, b in zip(taken, seconds["bank"], strict=True))
            rate = ADAPTERS * rows * length / median(taken)
            lines.append(
                f"| {rows} x {length} | {way} | {median(taken):.2f} | {rate:,.0f} | **{ratio:.2f}** |"
            )
            print(lines[-1], flush=True)
    return lines


def show_profile(model: Any) -> None:
    """Print what takes longest in a step of the bank."""
    for rows, length in SIZES:
        step = steps_of(model, rows, length)["bank"]
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            step()
        print(f"{rows} x {length}")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default=MODEL, help="folder of the base (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes, and end")
    options = parser.parse_args()
    torch.set_num_threads(available_cpus())
    facts = environment()
    config = ModelConfig(path=options.model, dtype="float32")
    model = load_base_model(config, torch.device("cpu")).requires_grad_(False).train()
    if options.profile:
        show_profile(model)
        return
    lines = [
        f"# A training step of {ADAPTERS} MixLoRA adapters: one batch, against loops",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads, float32; torch "
        f"{facts.packages['torch']}, transformers {facts.packages['transformers']}; commit {facts.commit}.",
        f"{Path(options.model).name}, {ADAPTER['experts']} LoRA experts of rank {ADAPTER['rank']}, top-"
        f"{ADAPTER['top_k']}, with balance loss; AdamW; medians of {options.repeats} rounds in which the "
        "ways took turns. `python benchmarks/routed_training.py --save` prints this file.",
        "`adapters in turn` and `one pass` are loops over whole experts; `one pass` and `one pass, shared` "
        "order the work as MoE-PEFT does (`shared`: its efficient_operator). MoE-PEFT itself needs torch "
        "< 2.6 and transformers < 4.47 and so cannot run beside: the loops are our own, tested against the "
        "bank's outputs and gradients.",
        "",
        *table(model, options.repeats),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
