"""Generation settings of a task and a model, as transformers' `generate` applies them to logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationMode, LogitsProcessorList

from flora_train.config.errors import first_line, user_error
from flora_train.evaluation.generation import Row, Sampling
from flora_train.evaluation.harness.scoring import cut_vocabulary

SEED = 1234
"""Of sampled continuations: lm_eval's own seed of torch."""


class LogitRules:
    """The settings of one group of prompts.

    options: of transformers' `generate`, such as `do_sample` or `repetition_penalty`; those of the model's
    generation_config hold where none is given. Raises UserError for options that are unknown, or that need
    another way of decoding than greedy search or sampling.
    """

    def __init__(self, model: Any, options: Mapping[str, Any], *, max_new_tokens: int) -> None:
        self._model, self._max_new_tokens = model, max_new_tokens
        config, unknown = _prepared(model, options)
        if unknown:
            name = next(iter(unknown))
            raise _wrong(f"{name} = {unknown[name]!r}: transformers' generate has no such option")
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise _wrong(f"{mode.value} is not supported: tokens are greedy, or sampled one by one")
        if (config.num_return_sequences or 1) > 1:
            raise _wrong("num_return_sequences is not supported: set repeats in the task")
        if config.stop_strings:
            raise _wrong("stop_strings is not supported: set until")
        if config.guidance_scale not in (None, 1):
            raise _wrong("guidance_scale is not supported")
        self._config = config
        self.sampling = Sampling(temperature=float(bool(config.do_sample)), top_p=1.0, seed=SEED)
        """How tokens are drawn from logits that were adjusted: temperature and the like are rules."""
        self.end_tokens = _end_tokens(config.eos_token_id)

    def adjust(
        self, prompts: Sequence[Sequence[int]], vocabulary: Callable[[int], int]
    ) -> Callable[[Tensor, Sequence[Row]], Tensor]:
        """The function that adjusts the logits [B, V] of rows. vocabulary: contender -> tokens that may be
        drawn."""
        rules = {length: self._rules(length) for length in {len(prompt) for prompt in prompts}}

        def adjusted(logits: Tensor, rows: Sequence[Row]) -> Tensor:
            sizes = torch.tensor([vocabulary(row.adapter) for row in rows])
            logits = cut_vocabulary(logits, sizes)
            if not any(rules.values()):
                return logits
            logits = logits.float()
            changed = []
            for row, scores in zip(rows, logits, strict=True):
                ids = torch.tensor([[*row.prompt, *row.tokens]], device=logits.device)
                changed.append(rules[len(row.prompt)](ids, scores[None].clone()))
            return torch.cat(changed)

        return adjusted

    def _rules(self, prompt_length: int) -> LogitsProcessorList:
        """transformers' own rules for a row with a prompt of this length."""
        self._config.max_length = prompt_length + self._max_new_tokens
        try:
            return self._model._get_logits_processor(
                generation_config=self._config,
                input_ids_seq_length=prompt_length,
                device=next(self._model.parameters()).device,
                model_kwargs={},
            )
        except (ValueError, TypeError) as error:
            raise _wrong(first_line(error)) from error


def _prepared(model: Any, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The generation config for these options, and the options that it does not have."""
    try:
        config, unknown = model._prepare_generation_config(None, **options)
        model._prepare_special_tokens(config, True, device=next(model.parameters()).device)
    except (ValueError, TypeError) as error:
        raise _wrong(first_line(error)) from error
    return config, unknown


def _end_tokens(tokens: int | Sequence[int] | None) -> frozenset[int]:
    if tokens is None:
        return frozenset()
    if isinstance(tokens, int):
        return frozenset({tokens})
    return frozenset(tokens)


def _wrong(hint: str) -> Exception:
    return user_error("--tasks", None, f"generation_kwargs of a task: {hint}")
