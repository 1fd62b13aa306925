"""Decoding many adapters in one batch against one adapter at a time: tokens per second, same prompts, same
texts.

Eight adapters of a method on SmolLM2-135M, one prompt each. `mixed`: all rows in one batch (flora_train's
decoder). `in turn`: the same decoder, one adapter after the other. `peft`: transformers' `generate`, with
`set_adapter` before each, and adapters as exported (fLoRA as HiRA). Greedy, float32; the three ways
alternate; medians of the repeats.

Usage: python benchmarks/generation.py [--save] [--repeats N] [--tokens N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from peft import PeftModel

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.evaluation.generation import Decoder, Generated, Request, Sampling
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.models.loading import load_base_model, load_tokenizer
from flora_train.runtime.environment import available_cpus, environment

RESULT = Path(__file__).parent / "results" / "generation_cpu.md"
MODEL = ModelConfig(path="assets/models/smollm2-135m", dtype="float32")
METHODS: dict[str, dict[str, Any]] = {"flora": {"rank": 4}, "lora": {"rank": 8}, "ia3": {}}
PROMPTS = [
    "-- Returns the sum of all numbers in a list.\nlocal function sum_list(list)",
    "# Returns the largest of a list of numbers.\nsub max_value {",
    "# Returns true if the number is even.\ndef is_even?(n)",
    "// Returns the text in reverse order.\nfunction reversed(text) {",
    "// Says whether the year has 366 days.\nfunc longYear(year int) bool {",
    (
        "/// Returns how often the letter occurs in the text.\n"
        "fn occurrences(text: &str, letter: char) -> usize {"
    ),
    "// Returns the average of the numbers.\nfunction average($numbers) {",
    (
        "/// Returns the first number that is divisible by the other.\n"
        "int firstMultiple(int[] numbers, int other)"
    ),
]


def perturbed_bank(method: str) -> tuple[Any, AdapterBank]:
    """A model with eight different adapters: 1 % noise on every parameter."""
    model = load_base_model(MODEL, torch.device("cpu")).eval()
    config = AdapterConfig(method=method, lr=1e-3, **METHODS[method])  # type: ignore[arg-type]
    bank = AdapterBank.attach(
        model, [make_spec(f"task{i}", method, config, default_steps=10) for i in range(len(PROMPTS))]
    )
    generator = torch.Generator().manual_seed(0)
    for adapter in range(len(PROMPTS)):
        row = bank.row(adapter)
        row += 0.01 * torch.randn(row.shape, generator=generator)
    return model, bank


def decoded(
    model: Any, bank: AdapterBank, tokenizer: Any, batches: list[list[int]], tokens: int
) -> list[str]:
    """The texts of all adapters' prompts, decoded in these batches."""
    texts = [""] * len(PROMPTS)
    decoder = Decoder(model, tokenizer, bank.routed, sampling=Sampling(0.0, 1.0, 0), max_new_tokens=tokens)
    decoder._end_tokens = set()  # every way computes the same number of tokens
    for batch in batches:

        def keep(generated: Generated, batch: list[int] = batch) -> None:
            texts[batch[generated.request]] = generated.text

        decoder.run([Request(i, PROMPTS[i], ("",)) for i in batch], keep)
    return texts


def generated_in_peft(model: Any, tokenizer: Any, tokens: int) -> list[str]:
    texts = []
    for i, prompt in enumerate(PROMPTS):
        model.set_adapter(f"task{i}")
        ids = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            out = model.generate(
                **ids,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


def peft_model(bank: AdapterBank) -> Any:
    """A plain model with the bank's adapters, as exported."""
    base, model = load_base_model(MODEL, torch.device("cpu")).eval(), None
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(bank.ids):
            path = export_peft(bank, name, Path(folder) / name, base=BaseModel(MODEL.path))
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=f"task{i}")
            else:
                model.load_adapter(path, adapter_name=f"task{i}")
    return model


def measure(method: str, tokens: int, repeats: int) -> dict[str, Any]:
    tokenizer = load_tokenizer(MODEL)
    model, bank = perturbed_bank(method)
    theirs = peft_model(bank)
    everyone = list(range(len(PROMPTS)))
    ways: dict[str, Callable[[], list[str]]] = {
        "mixed": lambda: decoded(model, bank, tokenizer, [everyone], tokens),
        "in turn": lambda: decoded(model, bank, tokenizer, [[i] for i in everyone], tokens),
        "peft": lambda: generated_in_peft(theirs, tokenizer, tokens),
    }
    texts = {way: run() for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - started)
    total = tokens * len(PROMPTS)
    return {
        "rates": {way: total / median(times) for way, times in seconds.items()},
        "gain": {
            way: median(a / b for a, b in zip(seconds[way], seconds["mixed"], strict=True))
            for way in ("in turn", "peft")
        },
        "same": {
            way: sum(a == b for a, b in zip(texts["mixed"], texts[way], strict=True))
            for way in ("in turn", "peft")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    torch.set_num_threads(available_cpus())
    facts = environment()
    n = len(PROMPTS)
    lines = [
        f"# Decoding {n} adapters in one batch, against one after the other",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; torch "
        f"{facts.packages['torch']}, transformers "
        f"{facts.packages['transformers']}, peft {facts.packages['peft']}; commit {facts.commit}.",
        f"SmolLM2-135M, float32, greedy, one prompt an adapter, {options.tokens} tokens each, reading the "
        "prompts included; medians "
        f"of {options.repeats} rounds in which the ways took turns. `python benchmarks/generation.py "
        "--save` prints this file.",
        "",
        (
            "| | mixed, tokens/s | in turn | peft, in turn | gain over in turn | gain over peft | texts "
            "equal to in turn | to peft |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in METHODS:
        found = measure(method, options.tokens, options.repeats)
        rates, gain, same = found["rates"], found["gain"], found["same"]
        lines.append(
            f"| {method} | {rates['mixed']:.0f} | {rates['in turn']:.0f} | {rates['peft']:.0f} | "
            f"**{gain['in turn']:.2f}** | "
            f"**{gain['peft']:.2f}** | {same['in turn']} of {n} | {same['peft']} of {n} |"
        )
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
