"""Chooses how a model's rows are decoded: together where their keys and values are all that it remembers, else one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from flora_train.evaluation.generation.attention import decoding_attention
from flora_train.evaluation.generation.kv_cache import RowCache
from flora_train.models.probe_inputs import device_of, plain_tokens, preserved_state

BatchingMode = Literal["batched", "single_row", "uncached"]
"""together: in one batch, with our own cache of keys and values; alone: one row at a time, by the model's own `generate`, with the
cache that belongs to it; afresh: one row at a time, reading all of its tokens again for each new one."""

ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""What transformers' cache holds for layers that remember keys and values alone."""
PROMPTS, NEW = (5, 1), 3
"""Tokens of the probed prompts, and tokens that are added to each. A prompt of one token (a start token) takes a path of its own in some
models, and may find there what the row before left."""
CLOSE = {True: 1e-3, False: 0.03}
"""Relative difference of two rows of logits that is rounding, in float32 and in 16 bits."""
ROUGH, TIMES = 0.15, 3
"""In 16 bits, what is taken for rounding at most, and how many times the difference of the model's own generate, or that which one place of
its embedded tokens makes. Tens of layers round differently in every shape of a batch, and experts are chosen by a hair."""
_KNOWN: WeakKeyDictionary[nn.Module, BatchingMode] = WeakKeyDictionary()


def batching_mode(model: nn.Module) -> BatchingMode:
    """The fastest way in which the model gives the logits that it gives without any cache. Tried once on two prompts of a few tokens.
    Collective where the base is divided."""
    if model not in _KNOWN:
        with preserved_state(model), torch.no_grad():
            _KNOWN[model] = _find(model)
    return _KNOWN[model]


def batching_note(model: nn.Module) -> str | None:
    """What is to be said of the mode; None where rows are decoded together."""
    name, mode = type(model).__name__, batching_mode(model)
    if mode == "batched":
        return None
    how = "by its own generate" if mode == "single_row" else "reading all tokens again for each new one"
    return f"{name} writes texts one row at a time, {how}: rows of a batch cannot share its cache"


def read(model: nn.Module, ids: Tensor, cache: RowCache, takes: Collection[str]) -> Tensor:
    """Logits [B, V] after the last of `ids` [B, new], whose places in the cache's mask are there already."""
    places = cache.mask.long().cumsum(1) - 1
    options: dict[str, Any] = {"position_ids": places.clamp(min=0)[:, -ids.shape[1] :], "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in takes}
    found = model(input_ids=ids, attention_mask=cache.mask.long(), past_key_values=cache.layers, use_cache=True, **options)
    return found.logits[:, -1]


def takes_of(model: Any) -> Collection[str]:
    """What the model's forward takes. PEFT's wrapper takes anything and passes it on: what the model inside it takes is what counts."""
    return inspect.signature(_inner(model).forward).parameters.keys()


def write_row(
    model: Any,
    mode: BatchingMode,
    prompt: list[int],
    choose: Callable[[Tensor], int],
    ended: Callable[[], bool],
    max_new_tokens: int,
) -> None:
    """Write one row: choose(logits [1, V]) gives each next token, until `ended` or max_new_tokens."""
    ids = torch.tensor([prompt], device=device_of(model))
    if mode == "single_row":
        _generate(model, ids, choose, ended, max_new_tokens)
        return
    keep = {"logits_to_keep": 1} if "logits_to_keep" in takes_of(model) else {}
    for _ in range(max_new_tokens):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **keep).logits[:, -1]
        ids = torch.cat([ids, ids.new_tensor([[choose(logits)]])], dim=1)
        if ended():
            return


def _generate(model: Any, ids: Tensor, choose: Callable[[Tensor], int], ended: Callable[[], bool], max_new_tokens: int) -> None:
    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([choose(scores)], device=scores.device), 0.0)

    def stop(input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((1,), ended(), dtype=torch.bool, device=input_ids.device)

    with _plain_generation(model) as config:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(**{**config.to_dict(), "max_new_tokens": max_new_tokens}),
            logits_processor=LogitsProcessorList([force]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )


@contextmanager
def _plain_generation(model: Any) -> Iterator[GenerationConfig]:
    """The model's own settings of generation (penalties, forced tokens, ...) are off meanwhile: rows decoded together have none."""
    inner = _inner(model)
    own, plain = inner.generation_config, GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    inner.generation_config = plain
    try:
        yield plain
    finally:
        inner.generation_config = own


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _find(model: Any) -> BatchingMode:
    prompts = [ids.tolist() for ids in plain_tokens(_inner(model), sum(PROMPTS)).split(list(PROMPTS))]
    coming = plain_tokens(_inner(model), sum(PROMPTS) + 2 * NEW)[sum(PROMPTS) :].view(2, NEW).tolist()
    truth = [_without_cache(model, prompt, new) for prompt, new in zip(prompts, coming, strict=True)]
    close = CLOSE[next(model.parameters()).dtype not in (torch.bfloat16, torch.float16)]
    ours = _furthest(lambda: _together(model, prompts, coming), truth) if _remembers_keys_alone(model) else float("inf")
    if ours <= close:
        return "batched"
    own = _furthest(lambda: _alone(model, prompts, coming), truth) if hasattr(model, "generate") else float("inf")
    if close > CLOSE[True] and ours <= ROUGH:
        rounding = [own, _furthest(lambda: _rounded_anew(model, prompts, coming), truth)]
        if ours <= TIMES * max(found for found in [0.0, *rounding] if found <= ROUGH):
            return "batched"
    return "single_row" if own <= max(close, ROUGH if close > CLOSE[True] else 0.0) else "uncached"


def _remembers_keys_alone(model: Any) -> bool:
    """Whether transformers gives all of the model's layers a cache of keys and values. Rows of anything else are not ours to move."""
    inner = _inner(model)
    if getattr(inner, "_is_stateful", False):
        return False
    try:
        return all(type(layer) in ATTENTION_LAYERS for layer in DynamicCache(config=inner.config).layers)
    except Exception:  # a configuration of somebody's own: not known to be attention
        return False


def _furthest(logits: Callable[[], list[Tensor]], truth: list[Tensor]) -> float:
    """The largest difference to the truth; infinite where a cache is not made for the model."""
    try:
        return max(_difference(mine, right) for mine, right in zip(logits(), truth, strict=True))
    except Exception:
        return float("inf")


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest of two rows of logits, relative, without what a softmax does not see."""
    one, other = (part.float() - part.float().mean(-1, keepdim=True) for part in (one, other))
    return float(((one - other).norm(dim=-1) / other.norm(dim=-1).clamp(min=1e-9)).max())


def _without_cache(model: Any, prompt: list[int], new: list[int]) -> Tensor:
    """Logits [NEW, V] from which each of the new tokens is chosen."""
    ids = torch.tensor([prompt + new], device=device_of(model))
    logits: Tensor = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    return logits[0, len(prompt) - 1 : -1]


def _rounded_anew(model: Any, prompts: list[list[int]], coming: list[list[int]]) -> list[Tensor]:
    """The same without any cache, where every number of the embedded tokens is rounded up or down by one place: what rounding alone can
    do to the logits of this model."""
    draws = torch.Generator().manual_seed(0)

    def round_anew(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=draws).to(embedded.device) * 2 - 1
        return (embedded.float() * (1 + torch.finfo(embedded.dtype).eps * signs)).to(embedded.dtype)

    hook = _inner(model).get_input_embeddings().register_forward_hook(round_anew)
    try:
        return [_without_cache(model, prompt, new) for prompt, new in zip(prompts, coming, strict=True)]
    finally:
        hook.remove()


def _together(model: Any, prompts: list[list[int]], coming: list[list[int]]) -> list[Tensor]:
    """The same, as a batch that the second row joins later, and that both leave."""
    device, takes = device_of(model), takes_of(model)

    def begin(prompt: list[int]) -> tuple[RowCache, Tensor]:
        cache = RowCache(torch.ones(1, len(prompt), dtype=torch.bool, device=device))
        return cache, read(model, torch.tensor([prompt], device=device), cache, takes)

    with decoding_attention(model):
        cache, first = begin(prompts[0])
        joining, second = begin(prompts[1])
        cache.join(joining)
        steps = [torch.cat([first, second])]
        for step in range(NEW - 1):
            cache.append_token()
            steps.append(read(model, torch.tensor([[new[step]] for new in coming], device=device), cache, takes))
        cache.drop([0])
    return list(torch.stack(steps, 1))


def _alone(model: Any, prompts: list[list[int]], coming: list[list[int]]) -> list[Tensor]:
    found = []
    for prompt, new in zip(prompts, coming, strict=True):
        seen: list[Tensor] = []

        def choose(logits: Tensor, seen: list[Tensor] = seen, new: list[int] = new) -> int:
            seen.append(logits[0].clone())
            return new[len(seen) - 1]

        write_row(model, "single_row", prompt, choose, lambda: False, NEW)
        found.append(torch.stack(seen))
    return found
