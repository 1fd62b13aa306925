"""Continuations of prompts by the base and many adapters, in one batch that is refilled as rows end."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import user_error
from flora_train.evaluation.generation import Decoder, Generated, MergedDecoding, Request
from flora_train.evaluation.harness.logit_rules import LogitRules
from flora_train.evaluation.harness.requests import PromptTokens, Report
from flora_train.models.context_length import independent_up_to


class Generator:
    """Continues prompts. max_rows: rows decoded at the same time. vocabulary: contender -> number of tokens
    that may be generated."""

    def __init__(
        self, bank: AdapterBank, tokenizer: Any, *, max_rows: int, vocabulary: Callable[[int], int]
    ) -> None:
        self.bank, self.tokenizer = bank, tokenizer
        self.max_rows, self.vocabulary = max_rows, vocabulary
        self._merging = MergedDecoding(bank)

    def generate(
        self,
        prompts: Sequence[PromptTokens],
        contenders: Sequence[int],
        *,
        report: Report = lambda share: None,
    ) -> dict[int, list[list[int]]]:
        """Contender -> the tokens after every prompt, up to the end of the continuation and including it.

        Prompts with the same settings are decoded together, for all contenders. Raises UserError for settings
        that are not supported.
        """
        tokens: dict[int, list[list[int]]] = {contender: [[]] * len(prompts) for contender in contenders}
        total = len(prompts) * len(contenders)
        done = 0

        def count() -> None:
            nonlocal done
            done += 1
            report(done / total)

        groups = self._groups(prompts)
        rules = [self._rules(prompts, group) for group in groups]
        for group, group_rules in zip(groups, rules, strict=True):
            places = [(index, contender) for index in group for contender in contenders]
            rows = self._decode([prompts[i] for i in group], contenders, group_rules, count)
            for (index, contender), row in zip(places, rows, strict=True):
                tokens[contender][index] = row
        return tokens

    def _groups(self, prompts: Sequence[PromptTokens]) -> list[list[int]]:
        """Indices of prompts with the same settings."""
        groups: dict[tuple[int, str], list[int]] = {}
        for index, prompt in enumerate(prompts):
            settings = json.dumps(prompt.options, sort_keys=True, default=repr)
            groups.setdefault((prompt.max_new_tokens, settings), []).append(index)
        return list(groups.values())

    def _rules(self, prompts: Sequence[PromptTokens], group: Sequence[int]) -> LogitRules:
        first = prompts[group[0]]
        limit = independent_up_to(self.bank.model.config)
        longest = max(len(prompts[index].tokens) for index in group) + first.max_new_tokens
        if limit is not None and longest > limit:
            hint = (
                f"a prompt and its continuation have {longest} tokens, and beyond {limit} the positions of "
                "this model's rows depend on their neighbours: choose tasks with shorter prompts"
            )
            raise user_error("--tasks", None, hint)
        return LogitRules(self.bank.model, first.options, max_new_tokens=first.max_new_tokens)

    def _decode(
        self,
        prompts: Sequence[PromptTokens],
        contenders: Sequence[int],
        rules: LogitRules,
        count: Callable[[], None],
    ) -> list[list[int]]:
        """The tokens of every prompt for every contender, prompt by prompt."""
        ends = {stops: StopTexts(self.tokenizer, stops) for stops in {prompt.stops for prompt in prompts}}
        requests = [
            Request(
                contender,
                prompt.tokens,
                keys=(prompt.key,),
                end_tokens=rules.end_tokens,
                ends_after=ends[prompt.stops],
            )
            for prompt in prompts
            for contender in contenders
        ]
        rows: list[list[int]] = [[] for _ in requests]

        def store(request: int, sample: int, tokens: Sequence[int]) -> None:
            rows[request].append(tokens[-1])

        def ended(generated: Generated) -> None:
            count()

        decoder = Decoder(
            self.bank.model,
            self.tokenizer,
            self.bank.routed,
            sampling=rules.sampling,
            max_new_tokens=prompts[0].max_new_tokens,
            max_rows=self.max_rows,
            blocks=self.bank.blocks,
            merging=self._merging,
            adjust=rules.adjust([prompt.tokens for prompt in prompts], self.vocabulary),
        )
        decoder.run(requests, ended, store)
        return rows


class StopTexts:
    """Whether tokens end with a text that stops the generation, as lm_eval's stopping criterion finds it.

    The last tokens are decoded with special tokens, so that such a token can be a stop text. There may be two
    more of them than the tokenizer makes of the stop text, because a model can write it in other tokens.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        lengths: Mapping[str, int] = {
            stop: len(tokenizer.encode(stop, add_special_tokens=False)) for stop in stops
        }
        self._stops = tuple(stops)
        self._window = 2 + max(lengths.values(), default=0)

    def __call__(self, tokens: Sequence[int]) -> bool:
        tail = self._tokenizer.decode(list(tokens[-self._window :]))
        return any(stop in tail for stop in self._stops)
