"""Chooses how a model's rows are decoded: in one batch if it caches only keys and values, otherwise one at a
time.
"""

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
"""How rows are decoded.

batched: in one batch, with RowCache.
single_row: one row at a time, by the model's own `generate` and cache.
uncached: one row at a time, reading all tokens again for each new one.
"""

ATTENTION_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
"""Cache layers of transformers that hold keys and values only."""
PROMPT_LENGTHS = (5, 1)
"""Tokens of the probed prompts.

Some models run a prompt of one token (a start token) differently, and may then read state left by the
previous row.
"""
NEW_TOKENS = 3
"""Tokens added to each probed prompt."""
ROUNDING = {True: 1e-3, False: 0.03}
"""Relative difference of two rows of logits attributed to rounding, in float32 (True) and 16 bits (False)."""
MAX_ROUNDING = 0.15
"""Largest difference attributed to rounding in 16 bits.

Tens of layers round differently in batches of different shapes, and a router's choice of experts may be
nearly tied.
"""
ROUNDING_FACTOR = 3
"""A 16-bit difference up to this multiple of a measured rounding difference also counts as rounding.
"""
_CACHED_MODES: WeakKeyDictionary[nn.Module, BatchingMode] = WeakKeyDictionary()


def batching_mode(model: nn.Module) -> BatchingMode:
    """The fastest mode in which the model gives the same logits as without a cache.

    Measured once per model, on two short prompts. All processes must call this if the base model is sharded.
    """
    if model not in _CACHED_MODES:
        with preserved_state(model), torch.no_grad():
            _CACHED_MODES[model] = _measure_mode(model)
    return _CACHED_MODES[model]


def batching_note(model: nn.Module) -> str | None:
    """A note to the user about the mode; None if rows are batched."""
    name, mode = type(model).__name__, batching_mode(model)
    if mode == "batched":
        return None
    method = "by its own generate" if mode == "single_row" else "reading all tokens again for each new one"
    return f"{name} generates one row at a time, {method}: the rows of a batch cannot share its cache"


def next_logits(model: nn.Module, ids: Tensor, cache: RowCache, *, parameters: Collection[str]) -> Tensor:
    """Logits [B, V] after the last of `ids` [B, new], whose positions are already in the cache's mask."""
    positions = (cache.mask.long().cumsum(1) - 1).clamp(min=0)
    options: dict[str, Any] = {"position_ids": positions[:, -ids.shape[1] :], "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in parameters}
    attention_mask = cache.mask.long()
    output = model(
        input_ids=ids, attention_mask=attention_mask, past_key_values=cache.layers, use_cache=True, **options
    )
    return output.logits[:, -1]


def parameters_of(model: Any) -> Collection[str]:
    """The parameters of the model's forward, looked up inside PEFT's wrapper, which accepts any parameter."""
    return inspect.signature(_unwrapped(model).forward).parameters.keys()


def generate_row(
    model: Any,
    mode: BatchingMode,
    prompt: list[int],
    *,
    choose: Callable[[Tensor], int],
    ended: Callable[[], bool],
    max_new_tokens: int,
) -> None:
    """Generate one row until `ended` or max_new_tokens; choose(logits [1, V]) returns each next token."""
    ids = torch.tensor([prompt], device=device_of(model))
    if mode == "single_row":
        _generate(model, ids, choose=choose, ended=ended, max_new_tokens=max_new_tokens)
        return
    options = {}
    if "logits_to_keep" in parameters_of(model):
        options["logits_to_keep"] = 1
    for _ in range(max_new_tokens):
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
        ids = torch.cat([ids, ids.new_tensor([[choose(output.logits[:, -1])]])], dim=1)
        if ended():
            return


def _generate(
    model: Any,
    ids: Tensor,
    *,
    choose: Callable[[Tensor], int],
    ended: Callable[[], bool],
    max_new_tokens: int,
) -> None:
    """Generate one row with the model's own `generate`, which is made to choose the given tokens."""

    def force_token(input_ids: Tensor, scores: Tensor) -> Tensor:
        token = torch.tensor([choose(scores)], device=scores.device)
        return torch.full_like(scores, -torch.inf).index_fill_(1, token, 0.0)

    def stop(input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        return torch.full((1,), ended(), dtype=torch.bool, device=input_ids.device)

    with _plain_generation(model) as config:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(**{**config.to_dict(), "max_new_tokens": max_new_tokens}),
            logits_processor=LogitsProcessorList([force_token]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )


@contextmanager
def _plain_generation(model: Any) -> Iterator[GenerationConfig]:
    """Disable the model's own generation settings (penalties, forced tokens, ...), which batched rows do not
    have.
    """
    unwrapped = _unwrapped(model)
    original, plain = (
        unwrapped.generation_config,
        GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0),
    )
    unwrapped.generation_config = plain
    try:
        yield plain
    finally:
        unwrapped.generation_config = original


def _unwrapped(model: Any) -> Any:
    """The model inside PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _measure_mode(model: Any) -> BatchingMode:
    """Compare the logits of each mode with those computed without a cache."""
    probe = _Probe(model)
    in_float32 = next(model.parameters()).dtype not in (torch.bfloat16, torch.float16)
    rounding = ROUNDING[in_float32]
    batched = own_generate = float("inf")
    if _caches_keys_only(model):
        batched = probe.difference(probe.batched)
    if batched <= rounding:
        return "batched"
    if hasattr(model, "generate"):
        own_generate = probe.difference(probe.single_row)
    if in_float32:
        return "single_row" if own_generate <= rounding else "uncached"
    if batched <= MAX_ROUNDING:
        measured = [own_generate, probe.difference(probe.rounded)]
        accepted = max((value for value in measured if value <= MAX_ROUNDING), default=0.0)
        if batched <= ROUNDING_FACTOR * accepted:
            return "batched"
    return "single_row" if own_generate <= MAX_ROUNDING else "uncached"


def _caches_keys_only(model: Any) -> bool:
    """Whether transformers gives all of the model's layers a cache of keys and values, whose rows can be
    moved.
    """
    unwrapped = _unwrapped(model)
    if getattr(unwrapped, "_is_stateful", False):
        return False
    try:
        return all(type(layer) in ATTENTION_LAYERS for layer in DynamicCache(config=unwrapped.config).layers)
    except Exception:  # a custom configuration, not known to be of attention layers
        return False


class _Probe:
    """Two short prompts with continuations, and the logits [NEW_TOKENS, V] from which each new token is
    chosen.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.device = model, device_of(model)
        num_prompt, num_new = sum(PROMPT_LENGTHS), 2 * NEW_TOKENS
        ids = plain_tokens(_unwrapped(model), num_prompt)
        self.prompts = [prompt.tolist() for prompt in ids.split(list(PROMPT_LENGTHS))]
        new_ids = plain_tokens(_unwrapped(model), num_prompt + num_new)[num_prompt:]
        self.continuations = new_ids.view(2, NEW_TOKENS).tolist()
        self.expected = self.without_cache()

    def difference(self, logits: Callable[[], list[Tensor]]) -> float:
        """The largest difference to the logits without a cache; infinite if the model does not support the
        mode.
        """
        try:
            return max(_difference(row, right) for row, right in zip(logits(), self.expected, strict=True))
        except Exception:
            return float("inf")

    def without_cache(self) -> list[Tensor]:
        """The expected logits."""
        rows = []
        for prompt, new in zip(self.prompts, self.continuations, strict=True):
            ids = torch.tensor([prompt + new], device=self.device)
            output = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            rows.append(output.logits[0, len(prompt) - 1 : -1])
        return rows

    def rounded(self) -> list[Tensor]:
        """Logits without a cache, with every embedding value changed by one unit in the last place.

        The difference shows how much rounding alone can change this model's logits.
        """
        draws = torch.Generator().manual_seed(0)

        def change(module: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
            signs = torch.randint(0, 2, embedded.shape, generator=draws).to(embedded.device) * 2 - 1
            return (embedded.float() * (1 + torch.finfo(embedded.dtype).eps * signs)).to(embedded.dtype)

        hook = _unwrapped(self.model).get_input_embeddings().register_forward_hook(change)
        try:
            return self.without_cache()
        finally:
            hook.remove()

    def batched(self) -> list[Tensor]:
        """Logits in a batch to which the second row is added later and from which the first row is
        removed."""
        with decoding_attention(self.model):
            cache, first = self._start(self.prompts[0])
            second_cache, second = self._start(self.prompts[1])
            cache.join(second_cache)
            steps = [torch.cat([first, second])]
            for step in range(NEW_TOKENS - 1):
                cache.append_token()
                ids = torch.tensor([[new[step]] for new in self.continuations], device=self.device)
                steps.append(next_logits(self.model, ids, cache, parameters=parameters_of(self.model)))
            cache.drop([0])
        return list(torch.stack(steps, 1))

    def single_row(self) -> list[Tensor]:
        """Logits of the model's own `generate`."""
        return [self._generated(*row) for row in zip(self.prompts, self.continuations, strict=True)]

    def _start(self, prompt: list[int]) -> tuple[RowCache, Tensor]:
        cache = RowCache(torch.ones(1, len(prompt), dtype=torch.bool, device=self.device))
        ids = torch.tensor([prompt], device=self.device)
        return cache, next_logits(self.model, ids, cache, parameters=parameters_of(self.model))

    def _generated(self, prompt: list[int], new: list[int]) -> Tensor:
        logits_seen: list[Tensor] = []

        def choose(logits: Tensor) -> int:
            logits_seen.append(logits[0].clone())
            return new[len(logits_seen) - 1]

        generate_row(
            self.model, "single_row", prompt, choose=choose, ended=lambda: False, max_new_tokens=NEW_TOKENS
        )
        return torch.stack(logits_seen)


def _difference(logits: Tensor, expected: Tensor) -> float:
    """The largest relative difference between rows of logits, after subtracting each row's mean as a softmax
    does.
    """
    logits, expected = (part.float() - part.float().mean(-1, keepdim=True) for part in (logits, expected))
    differences = (logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-9)
    return float(differences.max())
