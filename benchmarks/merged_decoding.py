"""Decoding a batch of one adapter with merged weights against the adapter as it is: when it pays.

SmolLM2-135M, float32, greedy, prompts of the starter problems' kind. `as it is`: the decoder without
merging. `automatic`: the decoder measures what merging costs and saves, and merges when that pays; nothing is
known of the model or of earlier answers at its begin. `again`: the same with what it has learnt then. The
three ways alternate; ratios are medians over the rounds.

Usage: python benchmarks/merged_decoding.py [--save] [--repeats N] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from generation import MODEL, PROMPTS

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec, make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.evaluation.generation import Decoder, Generated, MergedDecoding, Request, Sampling
from flora_train.models.loading import load_base_model, load_tokenizer
from flora_train.runtime.environment import available_cpus, environment

RESULT = Path(__file__).parent / "results" / "merged_decoding_cpu.md"
ADAPTERS: dict[str, dict[str, Any]] = {
    "flora, rank 1": {"method": "flora", "rank": 1},
    "flora, rank 4": {"method": "flora", "rank": 4},
    "flora, rank 16": {"method": "flora", "rank": 16},
    "lora, rank 8": {"method": "lora", "rank": 8},
    "dora, rank 8": {"method": "dora", "rank": 8},
    "ia3": {"method": "ia3"},
}
SIZES = ((1, 8), (1, 32), (8, 16))
"""Rows and new tokens of each."""


def bank_of_all() -> AdapterBank:
    """SmolLM2-135M with the adapters, each 1 % away from the identity."""
    model = load_base_model(MODEL, torch.device("cpu")).eval()
    specs: list[AdapterSpec] = []
    for number, options in enumerate(ADAPTERS.values()):
        specs.append(
            make_spec(f"task{number}", "adapter", AdapterConfig(lr=1e-3, **options), default_steps=1)
        )
    bank = AdapterBank.attach(model, specs)
    generator = torch.Generator().manual_seed(0)
    for adapter in range(len(bank.specs)):
        row = bank.row(adapter)
        row += 0.01 * torch.randn(row.shape, generator=generator)
    return bank


def decode(
    bank: AdapterBank, tokenizer: Any, adapter: int, size: tuple[int, int], *, merging: MergedDecoding | None
) -> tuple[float, list[str]]:
    """Seconds, and the texts."""
    rows, tokens = size
    texts = [""] * rows
    decoder = Decoder(
        bank.model,
        tokenizer,
        bank.routed,
        sampling=Sampling(0.0, 1.0, 0),
        max_new_tokens=tokens,
        merging=merging,
    )
    decoder._end_tokens = frozenset()  # every way computes the same number of tokens

    def store(generated: Generated) -> None:
        texts[generated.request] = generated.text

    requests = [Request(adapter, PROMPTS[row % len(PROMPTS)], ("",)) for row in range(rows)]
    started = time.perf_counter()
    decoder.run(requests, store)
    return time.perf_counter() - started, texts


def measure(
    bank: AdapterBank, tokenizer: Any, adapter: int, size: tuple[int, int], *, repeats: int
) -> dict[str, float]:
    """Tokens per second as it is, the ratios of the other ways to it, and whether all texts are equal."""
    plain, automatic, again, equal = [], [], [], True
    for _ in range(repeats):
        merging = MergedDecoding(bank)
        seconds, texts = decode(bank, tokenizer, adapter, size, merging=None)
        first_seconds, first_texts = decode(bank, tokenizer, adapter, size, merging=merging)
        again_seconds, again_texts = decode(bank, tokenizer, adapter, size, merging=merging)
        plain.append(seconds)
        automatic.append(seconds / first_seconds)
        again.append(seconds / again_seconds)
        equal = equal and texts == first_texts == again_texts
    rate = size[0] * size[1] / median(plain)
    return {"rate": rate, "automatic": median(automatic), "again": median(again), "equal": equal}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=available_cpus())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts, tokenizer, bank = environment(), load_tokenizer(MODEL), bank_of_all()
    lines = [
        "# Decoding a batch of one adapter with merged weights",
        "",
        f"{facts.machine.processor}, {options.threads} threads; torch {facts.packages['torch']}, "
        f"transformers {facts.packages['transformers']}; commit {facts.commit}.",
        f"SmolLM2-135M, float32, greedy; medians of {options.repeats} rounds in which the ways took turns. "
        "`python benchmarks/merged_decoding.py --save` prints this file.",
        "`automatic`: nothing is known of the model or of the length of answers at the begin; `again`: the "
        "next batch of the same decoder. Both are speeds relative to the adapter as it is.",
        "",
        "| adapter | rows | new tokens | as it is, tokens/s | automatic | again | equal texts |",
        "|---|---|---|---|---|---|---|",
    ]
    decode(bank, tokenizer, 0, SIZES[0], merging=None)
    for adapter, name in enumerate(ADAPTERS):
        for rows, tokens in SIZES:
            result = measure(bank, tokenizer, adapter, (rows, tokens), repeats=options.repeats)
            equal = "yes" if result["equal"] else "no"
            lines.append(
                f"| {name} | {rows} | {tokens} | {result['rate']:.1f} | **{result['automatic']:.2f}** | "
                f"**{result['again']:.2f}** | {equal} |"
            )
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
