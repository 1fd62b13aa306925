"""lm-evaluation-harness for eight adapters: in mixed batches, one at a time, and by lm_eval's `hf` model.

Eight adapters (three fLoRA, three LoRA, two IA3) on SmolLM2-135M, float32, on the CPU. `mixed`: the requests
of all adapters in one pass (`flora-train lm-eval`). `in turn`: the same code, one adapter after the other.
`hf`: lm_eval's HFLM with PEFT, one adapter after the other, in batches of 1 (lm_eval's default) and of 16.
Only answering the requests is timed: models are loaded before, and metrics are the same for all. Requests to
score have as many tokens as their row says, of which the last four are the continuation; prompts to continue
have 32 tokens and end after --tokens more. In a round, every way answers the requests of a row, one after the
other; a row has --rounds of them, or fewer where --minutes have no room for another one. Medians over rounds,
after one request that is not counted. It needs lm_eval: `make lm-eval-env`.

Usage: .venv-lm-eval/bin/python benchmarks/lm_evaluation.py [--save] [--quick] [--minutes N] [--rounds N]
       [--method METHOD] [--model FOLDER] [--tokens N]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
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
MIXED = ("flora", "lora", "ia3", "flora", "lora", "ia3", "flora", "lora")
"""Method of each adapter."""
CONTINUATION = 4
"""Tokens that are scored in a request."""
SCORED = {16: 8, 64: 4, 256: 2, 1024: 1}
"""Length of requests -> how many of them every adapter answers."""
PROMPTS = (2, 4)
"""How many prompts every adapter continues."""
PROMPT_TOKENS = 32
LIMITS = BatchLimits(max_tokens=4096, max_rows=32)
"""Of flora-train lm-eval with the defaults of a recipe."""
HF_BATCHES = (1, 16)
OTHERS = ("in turn", *(f"hf, batch {size}" for size in HF_BATCHES))
"""What is compared with `mixed`."""
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
    """Adapters of these methods, in a bank and in PEFT."""

    def __init__(self, methods: Sequence[str], path: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        base = ModelConfig(path=path, dtype="float32")
        model = load_base_model(base, torch.device("cpu")).eval()
        specs = []
        for number, method in enumerate(methods):
            config = AdapterConfig(method=method, lr=1e-3, **METHODS[method])  # type: ignore[arg-type]
            specs.append(make_spec(f"task{number}", method, config, default_steps=10))
        bank = AdapterBank.attach(model, specs)
        generator = torch.Generator().manual_seed(0)
        for adapter in range(len(methods)):
            row = bank.row(adapter)
            row += 0.01 * torch.randn(row.shape, generator=generator)
        self.names = list(bank.ids)
        prompts = PromptModel(self.tokenizer, model.config)
        self.evaluation = MixedEvaluation(bank, prompts, bank.ids, LIMITS)
        self.peft: dict[str, Any] = {}
        """Adapter -> the model that has it, one for each method: PEFT combines adapters of one type only."""
        self.harness: dict[tuple[str, int], HFLM] = {}
        for method in dict.fromkeys(methods):
            names = [own.name for own in specs if own.method == method]
            self.peft |= dict.fromkeys(names, peft_model(bank, names, base))
        for name, of_method in self.peft.items():
            for size in HF_BATCHES:
                self.harness[name, size] = HFLM(
                    pretrained=of_method, tokenizer=self.tokenizer, batch_size=size
                )

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
                self.peft[name].set_adapter(name)
                answer = getattr(self.harness[name, size], kind)
                answers.append(answer(list(requests), disable_tqdm=True))
            return answers

        ways: dict[str, Way] = {"mixed": mixed, "in turn": in_turn}
        for size in HF_BATCHES:
            if size == HF_BATCHES[0] or len(requests) > 1:  # a batch of one request is the same
                ways[f"hf, batch {size}"] = partial(harness, size)
        return ways


def peft_model(bank: AdapterBank, names: Sequence[str], config: ModelConfig) -> Any:
    """A plain model with these adapters of the bank, as exported."""
    base, model = load_base_model(config, torch.device("cpu")).eval(), None
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = export_peft(bank, name, Path(folder) / name, base=BaseModel(config.path))
            if model is None:
                model = PeftModel.from_pretrained(base, path, adapter_name=name)
            else:
                model.load_adapter(path, adapter_name=name)
    assert model is not None
    return model.eval()


class Case:
    """The requests of one row of the table, and the seconds of each way to answer them, round by round."""

    def __init__(self, title: str, ways: dict[str, Way]) -> None:
        self.title, self.ways = title, ways
        self.seconds: dict[str, list[float]] = {way: [] for way in ways}
        self.longest = 0.0
        """Seconds of the longest round."""
        self.same = ""
        """How many answers of hf equal ours."""

    def run(self) -> None:
        """Answer the requests in every way, in turns from the first and from the last one."""
        order = list(self.ways)
        if len(self.seconds["mixed"]) % 2:
            order.reverse()
        answers = {}
        for way in order:
            started = time.perf_counter()
            answers[way] = self.ways[way]()
            self.seconds[way].append(time.perf_counter() - started)
        self.longest = max(self.longest, sum(times[-1] for times in self.seconds.values()))
        self.same = same_share(answers["mixed"], answers[f"hf, batch {HF_BATCHES[0]}"])

    def ratio(self, way: str) -> float | None:
        """How many times as long as `mixed` a way takes; None if it was not measured."""
        if way not in self.seconds:
            return None
        pairs = zip(self.seconds[way], self.seconds["mixed"], strict=True)
        return median(own / mixed for own, mixed in pairs)

    @property
    def line(self) -> str:
        """The row of the table."""
        ratios = []
        for way in OTHERS:
            ratio = self.ratio(way)
            ratios.append("" if ratio is None else f"**{ratio:.2f}**")
        mixed = self.seconds["mixed"]
        cells = [self.title, str(len(mixed)), f"{median(mixed):.2f}", *ratios, self.same]
        return f"| {' | '.join(cells)} |"


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
    parser.add_argument("--out", type=Path, default=RESULT, help="with --save, another file")
    parser.add_argument("--quick", action="store_true", help="few and short requests")
    parser.add_argument("--model", default=MODEL, help="a folder with another base")
    parser.add_argument("--method", choices=METHODS, help="of all adapters; default: a mixture")
    parser.add_argument("--rounds", type=int, default=3, help="of every row, at most")
    parser.add_argument("--minutes", type=float, default=15.0, help="no round begins that would end later")
    parser.add_argument("--tokens", type=int, default=24, help="new tokens of a prompt")
    options = parser.parse_args()
    started = time.monotonic()
    scored, prompts = SCORED, PROMPTS
    if options.quick:
        scored, prompts, options.tokens = {16: 2, 64: 1}, (1,), 4
    torch.set_num_threads(available_cpus())
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    methods = [options.method] * ADAPTERS if options.method else list(MIXED)
    models = Models(methods, options.model)
    cases = cases_of(models, scored, prompts, options.tokens)
    for compute in models.ways(scored_requests(models.tokenizer, min(scored), 1)).values():
        compute()
    measure(cases, options.rounds, started + 60 * options.minutes)
    lines = [*heading(Path(options.model).name, methods, tokens=options.tokens)]
    lines += [case.line for case in cases]
    print("\n".join(lines))
    if options.save:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cases_of(models: Models, scored: dict[int, int], prompts: Sequence[int], new_tokens: int) -> list[Case]:
    """The rows of the table. scored: length -> requests of an adapter; prompts: to continue, of an
    adapter."""
    cases = []
    for length, count in scored.items():
        requests = scored_requests(models.tokenizer, length, count)
        cases.append(Case(f"score, {length:,} tokens, {count} an adapter", models.ways(requests)))
    for count in prompts:
        requests = continued_requests(models.tokenizer, count, new_tokens)
        cases.append(Case(f"generate_until, {count} prompts an adapter", models.ways(requests)))
    return cases


def measure(cases: Sequence[Case], rounds: int, deadline: float) -> None:
    """Run rounds of all cases: at least one of each, and no other one that would end after the deadline, of
    `time.monotonic`."""
    for number in range(rounds):
        for case in cases:
            if number and time.monotonic() + case.longest > deadline:
                continue
            case.run()
            times = ", ".join(f"{way} {seconds[-1]:.2f} s" for way, seconds in case.seconds.items())
            print(f"round {number + 1}: {case.title}: {times}", file=sys.stderr, flush=True)


def heading(model: str, methods: Sequence[str], *, tokens: int) -> list[str]:
    """The lines above the results."""
    facts = environment()
    counts = Counter(methods)
    adapters = ", ".join(f"{count} {method}" for method, count in counts.items())
    columns = ["requests", "rounds", "mixed, s", *(f"{way}, times mixed" for way in OTHERS), "same as hf"]
    return [
        f"# lm-evaluation-harness for {ADAPTERS} adapters, mixed and one after the other",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; torch {facts.packages['torch']}, "
        f"transformers {facts.packages['transformers']}, peft {facts.packages['peft']}, "
        f"lm_eval {version('lm_eval')}; commit {facts.commit}.",
        f"{model}, float32, {adapters}; loading apart; {tokens} new tokens after prompts of {PROMPT_TOKENS}; "
        "medians of rounds in which the ways took turns, after one request that is not counted. "
        "`benchmarks/lm_evaluation.py --save` prints this file.",
        "",
        f"| {' | '.join(columns)} |",
        f"|{'---|' * len(columns)}",
    ]


if __name__ == "__main__":
    main()
