"""Memory of one more adapter: bytes of all tensors that exist after a training step, without the base model.

Prints, for N adapters of every method, the bytes per adapter as a multiple of its parameters in float32:
weights, gradient and AdamW's two moments are 4.

Usage: python benchmarks/memory.py [--save]
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

import torch
from contenders.workload import RANK, SMALL
from transformers import AutoModelForCausalLM, LlamaConfig

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.training_schema import TrainingConfig
from flora_train.runtime.environment import environment
from flora_train.training.optimizer import BankOptimizer

RESULT = Path(__file__).parent / "results" / "memory.md"
COUNTS = (1, 8, 64)


def bytes_alive() -> int:
    """Bytes of all tensors; shared memory is counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(method: str, adapters: int) -> tuple[int, float]:
    """(parameters of one adapter, bytes per adapter after a step as a multiple of 4 bytes per parameter)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    before = bytes_alive()
    options = {"rank": RANK[method]} if method in RANK else {}
    specs = [
        make_spec(f"t{i}", method, AdapterConfig(method=method, lr=1e-3, **options), default_steps=10)
        for i in range(adapters)
    ]
    bank = AdapterBank.attach(model, specs)
    optimizer = BankOptimizer(bank, TrainingConfig(steps=10))
    ids = torch.zeros(adapters, 8, dtype=torch.long)
    bank.route(list(range(adapters)))
    model(input_ids=ids, use_cache=False).logits.mean(dim=(1, 2)).sum().backward()
    optimizer.step(range(adapters))
    parameters = bank.pools[0].row_size
    return parameters, (bytes_alive() - before) / adapters / (4 * parameters)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT}")
    options = parser.parse_args()
    facts = environment()
    lines = [
        "# Memory of an adapter, in multiples of its float32 parameters",
        "",
        f"torch {facts.packages['torch']}, Python {facts.python}, commit {facts.commit}. `python "
        "benchmarks/memory.py --save` "
        "prints this file.",
        (
            "All tensors alive after a step of N adapters, the base left out: weights 1, gradient 1, "
            "AdamW's moments 2."
        ),
        "",
        f"| | parameters | {' | '.join(f'N = {n}' for n in COUNTS)} |",
        "|---" * (len(COUNTS) + 2) + "|",
    ]
    for method in ("lora", "flora", "ia3"):
        found = [measure(method, n) for n in COUNTS]
        lines.append(
            f"| {method} | {found[0][0]:,} | {' | '.join(f'{multiple:.2f}' for _, multiple in found)} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
