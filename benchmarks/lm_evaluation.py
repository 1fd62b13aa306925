"""lm-evaluation-harness for eight adapters: in mixed batches, one at a time, and by lm_eval's `hf` model.

Eight adapters of a method on SmolLM2-135M, float32, on the CPU. `mixed`: the requests of all adapters in one
pass (`flora-train lm-eval`). `in turn`: the same code, one adapter after the other. `hf`: lm_eval's HFLM with
PEFT, one adapter after the other, in batches of 1 (lm_eval's default) and of 16. Only answering the requests
is timed: models are loaded before, and metrics are the same for all. Requests to score have as many tokens as
their row says, of which the last four are the continuation; prompts to continue end after --tokens tokens.
The ways take turns; medians of the repeats. It needs lm_eval: `make lm-eval-env`.

Usage: .venv-lm-eval/bin/python benchmarks/lm_evaluation.py [--save] [--quick] [--repeats N] [--tokens N]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoTokenizer

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.evaluation.harness.evaluation import BatchLimits, MixedEvaluation
from flora_train.evaluation.harness.model import PromptModel, arguments
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.models.loading import load_base_model
from flora_train.runtime.environment import available_cpus, environment

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "lm_evaluation_cpu.md"
MODEL = "assets/models/smollm2-135m"
METHODS: dict[str, dict[str, Any]] = {"flora": {"rank": 4}, "lora": {"rank": 8}, "ia3": {}}
ADAPTERS = 8
CONTINUATION = 4
"""Tokens that are scored in a request."""
SCORED = {16: 32, 64: 16, 256: 8, 1024: 4}
"""Length of requests -> how many of them every adapter answers."""
PROMPTS = (4, 16)
"""How many prompts every adapter continues."""
PROMPT_TOKENS = 32
LIMITS = BatchLimits(max_tokens=4096, max_rows=32)
"""Of flora-train lm-eval with the defaults of a recipe."""
HF_BATCHES = (1, 16)
Way = Callable[[], list[Any]]


@cache
def source_tokens(tokenizer: Any) -> list[int]:
    """Tokens of text: our own documentation."""
    pages = sorted((ROOT / "docs").glob("*.md"))[:6]
    text = "\n".join(path.read_text(encoding="utf-8") for path in pages)
    return list(tokenizer.encode(text))


def scored_requests(tokenizer: Any, length: int, count: int) -> list[Instance]:
    """Requests of `length` tokens, of different parts of the text."""
    tokens, requests = source_tokens(tokenizer), []
    for number in range(count):
        part = tokens[number * length : (number + 1) * length]
        context, continuation = (
            tokenizer.decode(piece) for piece in (part[:-CONTINUATION], part[-CONTINUATION:])
        )
        requests.append(Instance("loglikelihood", {}, (context, continuation), number))
    return requests


def continued_requests(tokenizer: Any, count: int, max_new_tokens: int) -> list[Instance]:
    """Prompts of PROMPT_TOKENS tokens."""
    tokens = source_tokens(tokenizer)
    settings = {"until": [], "max_gen_toks": max_new_tokens, "do_sample": False}
    requests = []
    for number in range(count):
        prompt = tokenizer.decode(tokens[number * PROMPT_TOKENS : (number + 1) * PROMPT_TOKENS])
        requests.append(Instance("generate_until", {}, (prompt, dict(settings)), number))
    return requests


class Models:
    """Eight adapters of a method, in a bank and in PEFT."""

    def __init__(self, method: str, path: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        base = ModelConfig(path=path, dtype="float32")
        model = load_base_model(base, torch.device("cpu")).eval()
        config = AdapterConfig(method=method, lr=1e-3, **METHODS[method])  # type: ignore[arg-type]
        specs = [make_spec(f"task{i}", method, config, default_steps=10) for i in range(ADAPTERS)]
        bank = AdapterBank.attach(model, specs)
        generator = torch.Generator().manual_seed(0)
        for adapter in range(ADAPTERS):
            row = bank.row(adapter)
            row += 0.01 * torch.randn(row.shape, generator=generator)
        self.names = list(bank.ids)
        prompts = PromptModel(self.tokenizer, model.config)
        self.evaluation = MixedEvaluation(bank, prompts, bank.ids, LIMITS)
        self.peft = peft_model(bank, base)
        self.harness = {
            size: HFLM(pretrained=self.peft, tokenizer=self.tokenizer, batch_size=size) for size in HF_BATCHES
        }

    def ways(self, requests: Sequence[Instance]) -> dict[str, Way]:
        """The ways to answer requests of one kind; each returns the answers, adapter by adapter."""
        (kind,) = {request.request_type for request in requests}
        needed = {kind: arguments(requests)}

        def mixed() -> list[Any]:
            answers = self.evaluation.compute(needed, self.names)
            return [answers[name][kind] for name in self.names]

        def in_turn() -> list[Any]:
            return [self.evaluation.compute(needed, [name])[name][kind] for name in self.names]

        def harness(size: int) -> list[Any]:
            answers = []
            for name in self.names:
                self.peft.set_adapter(name)
                answers.append(getattr(self.harness[size], kind)(list(requests), disable_tqdm=True))
            return answers

        ways: dict[str, Way] = {"mixed": mixed, "in turn": in_turn}
        for size in HF_BATCHES:
            ways[f"hf, batch {size}"] = lambda size=size: harness(size)  # type: ignore[misc]
        return ways


def peft_model(bank: AdapterBank, config: ModelConfig) -> Any:
    """A plain model with the bank's adapters, as exported."""
    base, model = load_base_model(config, torch.device("cpu")).eval(), None
    with tempfile.TemporaryDirectory() as folder:
        for name in bank.ids:
            path = export_peft(bank, name, Path(folder) / name, base=BaseModel(config.path))
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
    assert model is not None
    return model.eval()


def measure(ways: dict[str, Way], repeats: int) -> dict[str, Any]:
    """Seconds of each way, how many times `mixed` they are, and how many answers equal those of `mixed`."""
    answers = {way: run() for way, run in ways.items()}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            started = time.perf_counter()
            run()
            seconds[way].append(time.perf_counter() - started)
    ratios = {
        way: median(a / b for a, b in zip(times, seconds["mixed"], strict=True))
        for way, times in seconds.items()
    }
    return {
        "seconds": {way: median(times) for way, times in seconds.items()},
        "ratios": ratios,
        "same": same_share(answers["mixed"], answers[f"hf, batch {HF_BATCHES[0]}"]),
    }


def same_share(ours: list[Any], theirs: list[Any]) -> str:
    """How many answers are equal: texts, or log-probabilities to 1e-3."""
    pairs = [pair for left, right in zip(ours, theirs, strict=True) for pair in zip(left, right, strict=True)]
    same = sum(_alike(left, right) for left, right in pairs)
    return f"{same} of {len(pairs)}"


def _alike(left: Any, right: Any) -> bool:
    if isinstance(left, str):
        return left == right
    return abs(left[0] - right[0]) < 1e-3 and left[1] == right[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--quick", action="store_true", help="few and short requests, one repeat")
    parser.add_argument("--model", default=MODEL, help="a folder with another base")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    scored, prompts, repeats = SCORED, PROMPTS, options.repeats
    if options.quick:
        scored, prompts, repeats = {16: 4, 64: 2}, (2,), 1
    torch.set_num_threads(available_cpus())
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lines = heading(Path(options.model).name, repeats, options.tokens)
    print("\n".join(lines), flush=True)
    for method in METHODS:
        models = Models(method, options.model)
        cases = {
            f"score, {length:,} tokens, {count} an adapter": scored_requests(models.tokenizer, length, count)
            for length, count in scored.items()
        }
        for count in prompts:
            title = f"continue, {count} prompts an adapter"
            cases[title] = continued_requests(models.tokenizer, count, options.tokens)
        for case, requests in cases.items():
            line = table_line(method, case, measure(models.ways(requests), repeats))
            print(line, flush=True)
            lines.append(line)
    if options.save:
        RESULT.write_text("\n".join(lines) + "\n", encoding="utf-8")


def heading(model: str, repeats: int, tokens: int) -> list[str]:
    """The lines above the results."""
    facts = environment()
    others = ["in turn", *(f"hf, batch {size}" for size in HF_BATCHES)]
    columns = ["method", "requests", "mixed, s", *(f"{way}, times mixed" for way in others), "same as hf"]
    return [
        f"# lm-evaluation-harness for {ADAPTERS} adapters, mixed and one after the other",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; torch {facts.packages['torch']}, "
        f"transformers {facts.packages['transformers']}, peft {facts.packages['peft']}; commit "
        f"{facts.commit}.",
        f"{model}, float32, without loading; at most {tokens} new tokens; medians of {repeats} rounds "
        "in which the ways took turns. `benchmarks/lm_evaluation.py --save` prints this file.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]


def table_line(method: str, case: str, found: dict[str, Any]) -> str:
    """One line of results."""
    ratios = [f"**{ratio:.2f}**" for way, ratio in found["ratios"].items() if way != "mixed"]
    cells = [method, case, f"{found['seconds']['mixed']:.2f}", *ratios, found["same"]]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
