"""A whole training step of a large model: ours, all adapters in one batch, against PEFT, adapter by adapter.

A random-weight StarCoder2-3B (real shapes) in bfloat16 on a GPU, or with --tiny a small one anywhere; every contender has a copy of
the model, and their steps (forward, loss, backward, AdamW) take turns. Prints useful tokens per second, peak memory beyond the
frozen weights, and the ratio to PEFT (median of neighbouring steps). Usage: python benchmarks/large_step.py [--tiny] [--save]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapted_layer import DEVICE, seconds, where

# isort: split
import torch
from peft import HiraConfig, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Starcoder2Config, logging

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.schema import AdapterConfig, TrainingConfig
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
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"]
RANK = 16
LENGTH = 512
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small model and short rows, to see that this works")
    parser.add_argument("--repeats", type=int, default=7, help="steps of every contender")
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    if DEVICE.type == "cuda" and why_not_triton(DEVICE) is None:
        use_backend("triton", DEVICE)
    logging.set_verbosity_error()
    lines = [
        "# A training step of a large model, all adapters at once against one at a time",
        "",
        f"{where()}. StarCoder2 shapes, random weights, rank {RANK} on every linear layer. `python benchmarks/large_step.py --save` prints this file.",
        "",
        "| adapters | contender | tokens/s | memory beyond the weights (GiB) | times PEFT's speed (its loop of the same kind) |",
        "|---|---|---|---|---|",
    ]
    for adapters in (8, 32):
        lines += compare(adapters, options.tiny, options.repeats)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text)


def compare(adapters: int, tiny: bool, repeats: int) -> list[str]:
    """Markdown rows."""
    length = 16 if tiny else LENGTH
    ids = torch.randint(0, 97, (adapters, length), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    steps: dict[str, Step] = {
        "PEFT loop, LoRA": peft_loop(LoraConfig(r=RANK, target_modules=TARGETS), ids, tiny),
        "PEFT loop, HiRA": peft_loop(HiraConfig(r=RANK, target_modules=TARGETS), ids, tiny),
        "ours, LoRA": ours("lora", "auto", ids, tiny),
        "ours, fLoRA, split": ours("flora", "split", ids, tiny),
        "ours, fLoRA, fused": ours("flora", "fused", ids, tiny),
    }
    memory = {name: peak(step) for name, step in steps.items()}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            taken[name].append(seconds(step))
    rows = []
    for name, of_name in taken.items():
        rival = "PEFT loop, LoRA" if "LoRA" in name and "fLoRA" not in name else "PEFT loop, HiRA"
        ratio = statistics.median(theirs / mine for theirs, mine in zip(taken[rival], of_name, strict=True))
        speed = ids.numel() / statistics.median(of_name)
        rows.append(f"| {adapters} | {name} | {speed:.0f} | {memory[name]} | {ratio:.2f} |")
    return rows


def peak(step: Step) -> str:
    """What a step needs beyond what stays, in GiB. The first call also warms up."""
    step()
    if DEVICE.type != "cuda":
        return "-"
    stays = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return f"{(torch.cuda.max_memory_allocated() - stays) / 2**30:.2f}"


def load(tiny: bool) -> Any:
    """The base, frozen, the same at every call."""
    torch.manual_seed(0)
    config = Starcoder2Config(**(TINY | {"vocab_size": 97} if tiny else LARGE), use_cache=False)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).train()


def peft_loop(config: Any, ids: torch.Tensor, tiny: bool) -> Step:
    """Every adapter is made active in turn, for its own row; one AdamW step for all."""
    model = get_peft_model(load(tiny), config, adapter_name="0")
    for k in range(1, len(ids)):
        model.add_adapter(str(k), config)
    kind = "lora_" if isinstance(config, LoraConfig) else "hira_"
    optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if kind in name], lr=1e-3, weight_decay=0.0)

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
    bank = AdapterBank.attach(load(tiny), [make_spec(f"task{k}", method, config, 1000) for k in range(len(ids))])
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
