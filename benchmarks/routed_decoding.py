"""Time a token of adapters that a router chooses, against the frozen base, one sequence and a batch of eight.

SmolLM2-135M, float32 (and bfloat16, in a table of its own), 64 tokens before the first that is timed; every
layer adapted, rank 8. `LoRA`: one plain adapter. `MixLoRA`: top-2 of 8 LoRA experts. `MeteoRA`: top-2 of 8
members. `LoRA-Switch`: top-1 of 8, with routes that change at every token, and that are constant over 16;
batched, merged, and as the cost model chooses. `loop`: the MixLoRA adapter in a loop over whole experts, as
in published code (expert_loop.py). All ways read the same tokens, whatever they predict: the router of
LoRA-Switch reads the embedding of the token alone, so that eight tokens are found their own expert each. A
step is what the decoder of flora_train does without sampling. The ways take turns; medians over the rounds.

Usage: python benchmarks/routed_decoding.py [--save] [--repeats N] [--steps N] [--model FOLDER] [--profile]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import flora_train.cli  # noqa: F401  (how torch's threads wait is read when torch loads)

# isort: split
import torch
from expert_loop import ExpertLoop, LoopAdapter
from routed_training import MODEL, shared_copy
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.methods.routed import ROUTER
from flora_train.adapters.spec import make_spec
from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.evaluation.generation.attention import decoding_attention
from flora_train.evaluation.generation.batching_mode import next_logits, parameters_of
from flora_train.evaluation.generation.kv_cache import RowCache
from flora_train.evaluation.generation.merged_decoding import MergedDecoding
from flora_train.models.loading import load_base_model
from flora_train.runtime.environment import available_cpus, environment

RESULT = Path(__file__).parent / "results" / "routed_decoding_cpu.md"
CONTEXT = 64
"""Tokens before the first that is timed."""
ROWS = (1, 8)
RANK, EXPERTS = 8, 8
CONSTANT = 16
"""Tokens over which routes are constant."""
SHARPNESS = 12.0
"""Logit of the expert of a token above the others."""
ENDINGS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Route = Callable[[int], AbstractContextManager[Any]]
"""Rows of a batch -> the context in which the model applies their adapter."""


@dataclass(frozen=True)
class Way:
    """A model, how its adapter is applied, and after how many tokens its route changes."""

    model: Any
    route: Route
    constant: int = 1
    close: Callable[[], None] = lambda: None
    """Called after each sequence."""
    alone: bool = False
    """Whether it is for one sequence only: a merged weight serves one route at a time."""


def make_bank(model: Any, entry: dict[str, Any]) -> AdapterBank:
    """A bank of one adapter, away from the identity."""
    config = AdapterConfig(lr=1e-3, **entry)
    bank = AdapterBank.attach(shared_copy(model), [make_spec("task", "adapter", config, default_steps=1)])
    generator = torch.Generator().manual_seed(0)
    row = bank.row(0)
    row += 0.01 * torch.randn(row.shape, generator=generator)
    return bank


def routed(bank: AdapterBank) -> Route:
    """The bank's only adapter in all rows."""
    return lambda rows: bank.routed([0] * rows)


def looped(model: Any, bank: AdapterBank, shared_inputs: bool) -> Way:
    """The adapter of a bank in a loop over its experts."""
    loop = ExpertLoop(
        shared_copy(model), [LoopAdapter.of_bank(bank, next(iter(bank.ids)))], shared_inputs=shared_inputs
    )

    def route(rows: int) -> AbstractContextManager[None]:
        loop.rows.begin([(0, 0, rows)])
        return nullcontext()

    return Way(loop.model, route)


def meteora_entry() -> dict[str, Any]:
    """An entry of `adapters:` whose members are LoRA adapters, with random values, as the others have."""
    members = []
    for number in range(EXPERTS):
        name = f"member{number}"
        values = {"rank": RANK, "alpha": 2.0 * RANK, "target_modules": list(ENDINGS)}
        members.append({"name": name, "source": name, "method": "lora", **values})
    return {"method": "meteora", "over": [m["name"] for m in members], "members": members, "top_k": 2}


@torch.no_grad()
def route_by_token(bank: AdapterBank, tokens: Tensor) -> None:
    """Set the router of the bank's only adapter so that token i of `tokens` [E] is sent to expert i.

    The router reads the input of the first adapted layer, which depends on a token's embedding alone.
    """
    layers = bank.parameters_of(next(iter(bank.ids)))
    (module,) = (name for name, layer in layers.items() if ROUTER in layer)
    seen: list[Tensor] = []
    layer = bank.model.get_submodule(module)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 0].float()))
    bank.model(tokens[:, None])
    handle.remove()
    router = layers[module][ROUTER]
    wanted = SHARPNESS * torch.eye(len(tokens))
    router.copy_(torch.linalg.lstsq(seen[0], wanted).solution.T)


def ways_of(model: Any, tokens: Tensor) -> dict[str, Way]:
    """All ways, by name. tokens: those that are decoded, one for each expert of LoRA-Switch."""
    mixlora = make_bank(model, {"method": "mixlora", "experts": EXPERTS, "top_k": 2, "rank": RANK})
    lora = make_bank(model, {"method": "lora", "rank": RANK})
    meteora = make_bank(model, meteora_entry())
    ways = {
        "frozen base": Way(model, lambda rows: nullcontext()),
        "LoRA": Way(lora.model, routed(lora)),
        "MixLoRA, top-2 of 8": Way(mixlora.model, routed(mixlora)),
        "loop over whole experts": looped(model, mixlora, shared_inputs=False),
        "loop, W1 x and W3 x shared": looped(model, mixlora, shared_inputs=True),
        "MeteoRA, top-2 of 8": Way(meteora.model, routed(meteora)),
    }
    return {**ways, **switch_ways(model, tokens)}


def switch_ways(model: Any, tokens: Tensor) -> dict[str, Way]:
    """LoRA-Switch by path and by how long routes are constant."""
    entry = {"method": "switch", "experts": EXPERTS, "top_k": 1, "rank": RANK}
    bank = make_bank(model, entry)
    route_by_token(bank, tokens)
    changes = {1: "routes change at every token", CONSTANT: f"routes constant over {CONSTANT}"}
    ways = {}
    for constant, title in changes.items():
        for path in ("batched", "merged", "auto"):
            decoding = MergedDecoding(bank, switch_path=path)

            def route(rows: int, decoding: MergedDecoding = decoding) -> AbstractContextManager[None]:
                return decoding.routed([0] * rows)

            way = Way(bank.model, route, constant, decoding.release, alone=path != "batched")
            ways[f"LoRA-Switch, {title}: {path}"] = way
    return ways


def fed_tokens(tokens: Tensor, steps: int, rows: int, constant: int) -> Tensor:
    """[steps, rows]: what is decoded. Each row begins with another token, and goes on to the next after
    `constant` steps."""
    step = torch.arange(steps)[:, None] // constant
    return tokens[(step + torch.arange(rows)[None]) % len(tokens)]


@torch.no_grad()
def seconds_a_step(way: Way, prompt: Tensor, fed: Tensor) -> float:
    """Mean seconds of a step after the prompt [B, CONTEXT]."""
    rows, known = len(prompt), parameters_of(way.model)
    with decoding_attention(way.model):
        cache = RowCache(torch.ones(prompt.shape, dtype=torch.bool))
        with way.route(rows):
            next_logits(way.model, prompt, cache, parameters=known)
        started = time.perf_counter()
        for ids in fed:
            cache.append_token()
            with way.route(rows):
                logits = next_logits(way.model, ids[:, None], cache, parameters=known)
            logits.argmax(-1)
        seconds = time.perf_counter() - started
    way.close()
    return seconds / len(fed)


def measured(ways: dict[str, Way], tokens: Tensor, rows: int, *, steps: int, repeats: int) -> dict[str, Any]:
    """Way -> seconds a step of each round, after one that is not counted."""
    generator = torch.Generator().manual_seed(2)
    prompt = tokens[torch.randint(0, len(tokens), (rows, CONTEXT), generator=generator)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            taken = seconds_a_step(way, prompt, fed_tokens(tokens, steps, rows, way.constant))
            if number > 0:
                seconds[name].append(taken)
    return seconds


def table(model: Any, *, steps: int, repeats: int) -> list[str]:
    """Markdown: a row for each way, two columns for each size of batch."""
    highest = min(model.config.vocab_size, 30_000)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randperm(highest, generator=generator)[:EXPERTS]
    ways = ways_of(model, tokens)
    cells: dict[str, list[str]] = {name: [] for name in ways}
    for rows in ROWS:
        possible = {name: way for name, way in ways.items() if rows == 1 or not way.alone}
        seconds = measured(possible, tokens, rows, steps=steps, repeats=repeats)
        for name, of_way in cells.items():
            taken = seconds.get(name)
            if taken is None:
                of_way += ["-", "-"]
                continue
            ratio = median(a / b for a, b in zip(taken, seconds["frozen base"], strict=True))
            of_way += [f"{1e3 * median(taken):.1f}", f"**{ratio:.2f}**"]
    lines = ["| | one sequence, ms a token | times the base | batch of 8, ms a step | times the base |"]
    lines.append("|---" * 5 + "|")
    return [*lines, *(f"| {name} | {' | '.join(row)} |" for name, row in cells.items())]


def show_profile(model: Any, steps: int) -> None:
    """Print what takes longest in a step of MixLoRA and of the base, one sequence."""
    tokens = torch.arange(100, 100 + EXPERTS)
    entry = {"method": "mixlora", "experts": EXPERTS, "top_k": 2, "rank": RANK}
    bank = make_bank(model, entry)
    ways = {"frozen base": Way(model, lambda rows: nullcontext()), "MixLoRA": Way(bank.model, routed(bank))}
    for name, way in ways.items():
        prompt, fed = tokens[None].repeat(1, CONTEXT // EXPERTS), fed_tokens(tokens, steps, 1, 1)
        seconds_a_step(way, prompt, fed)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            seconds = seconds_a_step(way, prompt, fed)
        print(f"{name}: {1e3 * seconds:.1f} ms a token, {steps} tokens and the prompt")
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))


def load(path: str, dtype: str) -> Any:
    config = ModelConfig(path=path, dtype=dtype)  # type: ignore[arg-type]
    return load_base_model(config, torch.device("cpu")).requires_grad_(False).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help=f"write {RESULT.name}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2 * CONSTANT, help="tokens of a round")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--model", default=MODEL, help="folder of the base (default: %(default)s)")
    parser.add_argument("--profile", action="store_true", help="show where a token's time goes, and end")
    options = parser.parse_args()
    torch.set_num_threads(available_cpus())
    if options.profile:
        show_profile(load(options.model, options.dtypes[0]), options.steps)
        return
    facts = environment()
    lines = [
        "# Decoding with adapters that a router chooses",
        "",
        f"{facts.machine.processor}, {facts.machine.threads} threads; torch {facts.packages['torch']}, "
        f"transformers {facts.packages['transformers']}; commit {facts.commit}.",
        f"{Path(options.model).name}, every layer adapted, rank {RANK}, {CONTEXT} tokens of context, "
        f"{options.steps} timed tokens a round; medians of {options.repeats} rounds in which the ways took "
        "turns. `python benchmarks/routed_decoding.py --save` prints this file.",
        "In a batch of 8, the rows of LoRA-Switch have eight different routes. What merging a route costs is "
        "part of its time: merged weights are discarded after every round.",
    ]
    for dtype in options.dtypes:
        rows = table(load(options.model, dtype), steps=options.steps, repeats=options.repeats)
        lines += ["", f"## {dtype}", "", *rows]
        print("\n".join(rows), flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if options.save:
        RESULT.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
