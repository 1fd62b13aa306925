"""A whole training step of a large model: flora_train with all adapters in one batch, against PEFT, adapter
by adapter.

A random-weight StarCoder2-3B (real shapes) in bfloat16 on a GPU, or with --tiny a small model on any machine.
Every contender has a copy of the model, and their steps (forward, loss, backward, AdamW) alternate. Prints
useful tokens per second, peak memory, and the ratio to PEFT (median of neighbouring steps).

Usage: python benchmarks/large_step.py [--tiny] [--save]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapted_layer import DEVICE, seconds, where

# isort: split
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Starcoder2Config, logging

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.training_schema import TrainingConfig
from flora_train.data.batch import MixedBatch
from flora_train.kernels.backend import Precision, use_backend, use_precision, why_not_triton
from flora_train.training.loss import RowLosses
from flora_train.training.optimizer import BankOptimizer

RESULT = Path(__file__).parent / "results" / f"large_step_{DEVICE.type}.md"
LARGE = {
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]
RANK = 16
LENGTH = 512
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="a small model and short rows, to see that this works"
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps of every contender")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    if DEVICE.type == "cuda" and why_not_triton(DEVICE) is None:
        use_backend("triton", DEVICE)
    logging.set_verbosity_error()
    lines = [
        "# A training step of a large model, all adapters at once against one at a time",
        "",
        f"{where()}. StarCoder2 shapes, random weights, rank {RANK} on every linear layer. `python "
        "benchmarks/large_step.py --save` prints this file.",
        "",
        (
            "| adapters | contender | tokens/s | memory, base included (GiB) | "
            "times PEFT's speed (its loop of the same kind) |"
        ),
        "|---|---|---|---|---|",
    ]
    for adapters in (8, 32):
        for rival, ways in RIVALS.items():
            lines += compare(adapters, rival, ways, options.tiny, options.repeats)
            if options.save:
                RESULT.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


RIVALS: dict[str, list[tuple[str, Precision]]] = {
    "lora": [("lora", "auto")],
    "hira": [("flora", "split"), ("flora", "fused")],
}
"""PEFT's method -> flora_train's. Only these are in memory at the same time."""


def compare(
    adapters: int, rival: str, ways: Sequence[tuple[str, Precision]], tiny: bool, repeats: int
) -> list[str]:
    """Markdown rows."""
    length = 16 if tiny else LENGTH
    ids = torch.randint(0, 97, (adapters, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    makers: dict[str, Callable[[], Step]] = {f"PEFT loop, {rival}": lambda: peft_loop(rival, ids, tiny)}
    for method, precision in ways:
        name = f"ours, {method}" + (f", {precision}" if method == "flora" else "")
        makers[name] = lambda method=method, precision=precision: ours(method, precision, ids, tiny)
    steps, memory = {}, {}
    for name, make in makers.items():
        try:
            steps[name], memory[name] = loaded(make)
        except torch.cuda.OutOfMemoryError:
            memory[name] = "does not fit"
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    peft = taken.get(f"PEFT loop, {rival}", [])
    rows = []
    for name, needed in memory.items():
        speed = f"{ids.numel() / statistics.median(taken[name]):.0f}" if name in taken else "-"
        pairs = [theirs / mine for theirs, mine in zip(peft, taken.get(name, []), strict=False)]
        rows.append(
            f"| {adapters} | {name} | {speed} | {needed} | "
            f"{f'{statistics.median(pairs):.2f}' if pairs else '-'} |"
        )
    return rows


def loaded(make: Callable[[], Step]) -> tuple[Step, str]:
    """A contender after its first two steps, and its peak memory in them, with its copy of the base."""
    if DEVICE.type != "cuda":
        step = make()
        step()
        return step, "-"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step = make()
    step(), step()
    return step, f"{(torch.cuda.max_memory_allocated() - before) / 2**30:.1f}"


def load(tiny: bool) -> Any:
    """The base, frozen, the same at every call."""
    torch.manual_seed(0)
    config = Starcoder2Config(**(TINY | {"vocab_size": 97} if tiny else LARGE), use_cache=False)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).train()


def peft_loop(method: str, ids: torch.Tensor, tiny: bool) -> Step:
    """Each adapter is activated in turn, for its own row; one AdamW step for all."""
    config = (LoraConfig if method == "lora" else HiraConfig)(r=RANK, target_modules=TARGETS)
    model = get_peft_model(load(tiny), config, adapter_name="0")
    for k in range(1, len(ids)):
        model.add_adapter(str(k), config)
    parameters = [p for name, p in model.named_parameters() if f"{method}_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)

    def step() -> None:
        for k, row in enumerate(ids.split(1)):
            model.set_adapter(str(k))
            model(input_ids=row, labels=row).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(method: str, precision: Precision, ids: torch.Tensor, tiny: bool) -> Step:
    """All rows in one batch."""
    config = AdapterConfig(method=method, rank=RANK, lr=1e-3, target_modules=TARGETS)  # type: ignore[arg-type]
    bank = AdapterBank.attach(
        load(tiny), [make_spec(f"task{k}", method, config, default_steps=1000) for k in range(len(ids))]
    )
    row_losses, optimizer = RowLosses(bank.model), BankOptimizer(bank, TrainingConfig(steps=1000))
    owners = torch.arange(len(ids))
    batch = MixedBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids, owners, ())

    def step() -> None:
        use_precision(precision)
        bank.route(batch.adapter_ids)
        (row_losses(batch) / (ids.shape[1] - 1)).sum().backward()
        optimizer.step(range(len(ids)))

    return step


if __name__ == "__main__":
    main()
