"""Compares a server's log-probabilities of the first tokens with those of the trainer's own bank."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.init_from import resolve_init_from
from flora_train.adapters.peft_config import read_config
from flora_train.adapters.spec import BASE_ID, expand
from flora_train.commands.serve_server import VllmServer
from flora_train.config.errors import user_error
from flora_train.config.load import RawConfig, validate
from flora_train.config.model_schema import ModelConfig
from flora_train.config.terminal_text import in_cell, print_table
from flora_train.evaluation.generation.context_limit import context_length
from flora_train.export.peft_import import init_from_peft
from flora_train.models.loading import load_base_model, load_tokenizer
from flora_train.run_context import load_run, locked
from flora_train.runtime.environment import default_device
from flora_train.training.origin import OriginOptions

TEXTS = (
    "The",
    "def add(a, b):\n    return a + b\n\nTwo numbers are added by this function. It is called with 1 and 2, "
    "and then with the result and 3, so that the sum of the first three numbers is printed at the end.\n",
)
MOST_PROMPT_TOKENS = 64
NEW_TOKENS = 8
ROWS = 16
"""Rows of a forward pass."""
REQUESTS = 8
"""Requests at the same time, so that adapters are mixed in a batch."""
TOLERANCES = {torch.float32: 1e-3}
"""Number format of the base -> largest difference that rounding explains."""
OTHER_TOLERANCE = 1.0
"""Of formats of half precision, whose rounding changes log-probabilities of rare tokens by some tenths."""
METHODS = {"LORA": "lora", "ADALORA": "lora", "IA3": "ia3", "HIRA": "flora", "FLORA": "flora"}


@dataclass(frozen=True)
class Expected:
    """What the bank computes for one prompt."""

    prompt: tuple[int, ...]
    of_prompt: tuple[float, ...]
    """Log-probability of each token of the prompt but the first."""
    tokens: tuple[int, ...]
    """The likeliest continuation."""
    of_tokens: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Server and bank for the base or one adapter."""

    name: str
    tokens: int
    """Number of tokens compared."""
    difference: float
    """The largest difference of a log-probability."""
    same_text: bool
    """Whether the likeliest continuations are the same tokens."""


@dataclass(frozen=True)
class Reference:
    """What the bank computes for the base and every adapter."""

    expected: Mapping[str, Sequence[Expected]]
    """Name of the base in requests, which is the first, or of an adapter -> one for each prompt."""
    dtype: torch.dtype

    def effect(self, name: str) -> float:
        """How much the adapter changes a log-probability of the prompts, at most."""
        base = next(iter(self.expected.values()))
        changes = [0.0]
        for mine, theirs in zip(self.expected[name], base, strict=True):
            pairs = zip(mine.of_prompt, theirs.of_prompt, strict=True)
            changes += [abs(value - other) for value, other in pairs]
        return max(changes)

    @property
    def tolerance(self) -> float:
        return TOLERANCES.get(self.dtype, OTHER_TOLERANCE)


def reference_of_run(
    run: str, base_name: str, names: Sequence[str], *, dtype: str | None, allow: OriginOptions
) -> Reference:
    """Of the saved adapters of a run. dtype: of the base, instead of the run's. Raises UserError where run or
    base cannot be loaded."""
    with locked(run, alone=False):
        context, _ = load_run(run, dtype=dtype, allow=allow)
        ids = {base_name: BASE_ID, **{name: context.bank.ids[name] for name in names}}
        return _reference(context.bank, context.tokenizer, ids, context.config.model)


def reference_of_folders(model: ModelConfig, base_name: str, folders: Mapping[str, Path]) -> Reference:
    """Of adapters in folders. Raises UserError where base or adapters cannot be loaded."""
    families = {f"a{number}": folder for number, folder in enumerate(folders.values())}
    content: RawConfig = {
        "name": "check",
        "model": model.model_dump(),
        "tasks": {"check": {"train": "none.jsonl"}},
        "adapters": {family: _adapter_entry(folder) for family, folder in families.items()},
        "training": {"steps": 1},
    }
    config = resolve_init_from(validate(content))
    base = load_base_model(config.model, default_device())
    bank = AdapterBank.attach(base, expand(config))
    init_from_peft(bank, range(len(bank.specs)))
    ids = dict(zip(folders, range(len(bank.specs)), strict=True))
    return _reference(bank, load_tokenizer(config.model), {base_name: BASE_ID, **ids}, config.model)


def _adapter_entry(folder: Path) -> dict[str, Any]:
    peft_type = read_config(str(folder), "adapter").peft_type
    entry = {"method": METHODS[peft_type], "init_from": str(folder), "lr": 1.0}
    if peft_type == "HIRA":
        entry["variant"] = "residual"
    return entry


def _reference(bank: AdapterBank, tokenizer: Any, ids: Mapping[str, int], model: ModelConfig) -> Reference:
    limit = context_length(model, bank.model.config) or MOST_PROMPT_TOKENS + NEW_TOKENS
    longest = max(1, min(MOST_PROMPT_TOKENS, limit - NEW_TOKENS))
    prompts = [tuple(tokenizer(text)["input_ids"][:longest]) for text in TEXTS]
    expected: dict[str, list[Expected]] = {name: [] for name in ids}
    names = {adapter: name for name, adapter in ids.items()}
    bank.model.eval()
    for prompt in dict.fromkeys(prompts):
        for block in bank.blocks(ids.values()):
            members = sorted(block)
            for start in range(0, len(members), ROWS):
                rows = members[start : start + ROWS]
                for adapter, result in zip(rows, _expect(bank, rows, prompt), strict=True):
                    expected[names[adapter]].append(result)
    return Reference(expected, next(bank.model.parameters()).dtype)


@torch.no_grad()
def _expect(bank: AdapterBank, rows: Sequence[int], prompt: Sequence[int]) -> list[Expected]:
    """The bank's log-probabilities of one prompt, with the adapters of these rows."""
    tokens = torch.tensor([prompt] * len(rows), device=bank.device)
    chosen: list[Tensor] = []
    for _ in range(NEW_TOKENS):
        with bank.routed(list(rows)):
            scores = bank.model(input_ids=tokens).logits.float().log_softmax(-1)
        value, token = scores[:, -1].max(dim=-1)
        chosen.append(value)
        if len(chosen) == 1:
            read = scores[:, :-1].gather(2, tokens[:, 1:, None])[..., 0].tolist()
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    values = torch.stack(chosen, dim=1).tolist()
    continuations = tokens[:, len(prompt) :].tolist()
    return [
        Expected(tuple(prompt), tuple(of_prompt), tuple(continuation), tuple(of_tokens))
        for of_prompt, continuation, of_tokens in zip(read, continuations, values, strict=True)
    ]


def compare(server: VllmServer, reference: Reference) -> list[Comparison]:
    """Ask the server for all prompts, with adapters mixed. Raises UserError if it does not answer."""
    by_prompt = zip(*reference.expected.values(), strict=True)
    requests = [pair for row in by_prompt for pair in zip(reference.expected, row, strict=True)]
    with ThreadPoolExecutor(REQUESTS) as pool:
        results = list(pool.map(lambda pair: compare_one(pair[0], pair[1], server.post), requests))
    return [
        _joined(name, [result for result in results if result.name == name]) for name in reference.expected
    ]


def _joined(name: str, results: Sequence[Comparison]) -> Comparison:
    return Comparison(
        name,
        sum(result.tokens for result in results),
        max(result.difference for result in results),
        all(result.same_text for result in results),
    )


def compare_one(name: str, expected: Expected, post: Callable[[str, Mapping[str, Any]], Any]) -> Comparison:
    """One prompt of the base or an adapter. The continuation is compared up to the first token that differs:
    after it, the texts are not the same."""
    answer = post(
        "/v1/completions",
        {
            "model": name,
            "prompt": list(expected.prompt),
            "max_tokens": len(expected.tokens),
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "prompt_logprobs": 0,
            "return_tokens_as_token_ids": True,
        },
    )
    try:
        choice = answer["choices"][0]
        read = [
            entry[str(token)]["logprob"]
            for token, entry in zip(expected.prompt[1:], choice["prompt_logprobs"][1:], strict=True)
        ]
        tokens = [int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"]]
        values = choice["logprobs"]["token_logprobs"]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise user_error("vllm serve", name, f"answered without log-probabilities: {error!r}") from error
    pairs = [*zip(expected.of_prompt, read, strict=True)]
    for mine, theirs, *pair in zip(expected.tokens, tokens, expected.of_tokens, values, strict=False):
        pairs.append((pair[0], pair[1]))
        if mine != theirs:
            break
    differences = [abs(mine - theirs) for mine, theirs in pairs]
    largest = math.inf if any(map(math.isnan, differences)) else max(differences)
    return Comparison(name, len(pairs), largest, tuple(tokens) == expected.tokens)


def print_comparisons(comparisons: Sequence[Comparison], reference: Reference, tolerance: float) -> None:
    table = Table(
        box=box.SIMPLE_HEAD,
        title="log-probabilities as served, compared with the trainer's own",
        title_justify="left",
        title_style="",
    )
    table.add_column("model")
    for title in ("tokens", "largest difference", "the adapter's effect"):
        table.add_column(title, justify="right")
    table.add_column("greedy tokens")
    for result in comparisons:
        style = "" if result.difference <= tolerance else "bold red"
        same = "the same" if result.same_text else "differ"
        effect = f"{reference.effect(result.name):.2f}"
        cells = (result.name, f"{result.tokens:,}", f"{result.difference:.2e}", effect, same)
        table.add_row(*(in_cell(cell, style) for cell in cells))
    print_table(table)


def check_comparisons(comparisons: Sequence[Comparison], tolerance: float) -> None:
    """Raises UserError if a difference is above the tolerance, or is not a number."""
    wrong = [result for result in comparisons if not result.difference <= tolerance]
    if wrong:
        worst = max(wrong, key=lambda result: result.difference)
        hint = (
            f"differ by up to {worst.difference:.2e} from the trainer's, and {tolerance:g} is allowed "
            f"(--tolerance): {len(wrong)} of {len(comparisons)} models are not served as they were trained"
        )
        raise user_error("log-probabilities of", worst.name, hint)
