"""Evaluates base and adapters on lm_eval's tasks: all answers first, then lm_eval's results of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.errors import UserError, first_line, user_error
from flora_train.evaluation.harness.answers import Answers, Arguments, Requests
from flora_train.evaluation.harness.generation import Generator
from flora_train.evaluation.harness.model import ContenderModel, PromptModel
from flora_train.evaluation.harness.requests import Answer, ContenderResults, PromptTokens, TokenPair
from flora_train.evaluation.harness.results import read_results
from flora_train.evaluation.harness.scoring import Scorer
from flora_train.evaluation.harness.tasks import HarnessTasks
from flora_train.models.probe_inputs import count_tokens
from flora_train.runtime.progress import ProgressBar


@dataclass(frozen=True)
class BatchLimits:
    """What fits in a batch."""

    max_tokens: int
    """Padded tokens of rows that are scored."""
    max_rows: int
    """Rows that are continued."""


class MixedEvaluation:
    """Computes the answers of contenders of a bank. contenders: name -> id (-1: the base)."""

    def __init__(
        self, bank: AdapterBank, prompts: PromptModel, contenders: Mapping[str, int], limits: BatchLimits
    ) -> None:
        self.bank, self.prompts, self.contenders = bank, prompts, contenders
        tokenizer = prompts.tokenizer
        head: Any = bank.model.get_output_embeddings()  # type: ignore[operator]
        self._vocabulary_of_base = int(head.weight.shape[0])
        self._vocabulary_of_adapters = self._vocabulary_of_base
        if len(tokenizer) < declared_vocabulary(bank.model.config):
            self._vocabulary_of_adapters = len(tokenizer)
        pad_token = tokenizer.pad_token_id
        if pad_token is None:
            pad_token = tokenizer.eos_token_id
        self._scorer = Scorer(
            bank, max_tokens=limits.max_tokens, pad_token=pad_token, vocabulary=self._vocabulary
        )
        self._generator = Generator(bank, tokenizer, max_rows=limits.max_rows, vocabulary=self._vocabulary)

    def results(self, tasks: HarnessTasks, requests: Requests) -> dict[str, ContenderResults]:
        """Contender -> lm_eval's results. Raises UserError where lm_eval cannot make them."""
        answers = Answers(requests, list(self.contenders), self.compute)
        results = {}
        for name in self.contenders:
            model = ContenderModel(self.prompts.tokenizer, self.bank.model.config, name=name, answers=answers)
            try:
                results[name] = read_results(tasks.evaluate(model))
            except UserError:
                raise
            except Exception as error:
                hint = f"lm_eval cannot compute the results of {name}: {type(error).__name__}: "
                names = ",".join(tasks.options.names)
                raise user_error("--tasks", names, hint + first_line(error)) from error
        return results

    def compute(self, requests: Requests, contenders: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
        """Contender -> kind of request -> answers."""
        answers: dict[str, dict[str, list[Any]]] = {name: {} for name in contenders}
        scored = _ScoredRequests(self.prompts, requests)
        prompts = self._prompts(requests.get("generate_until", ()))
        self._check_tokens(scored.pairs, prompts)
        ids = [self.contenders[name] for name in contenders]
        if scored.pairs:
            with ProgressBar("score", 1.0) as bar:
                found = self._scorer.score(
                    scored.pairs, ids, max_length=self.prompts.max_length, report=bar.update
                )
            for name in contenders:
                answers[name] |= scored.answers(found[self.contenders[name]])
        if prompts:
            with ProgressBar("generate", 1.0) as bar:
                rows = self._generator.generate(prompts, ids, report=bar.update)
            for name in contenders:
                texts = zip(rows[self.contenders[name]], prompts, strict=True)
                answers[name]["generate_until"] = [
                    self.prompts.continuation(tokens, prompt.stops) for tokens, prompt in texts
                ]
        return answers

    def _prompts(self, requests: Sequence[Arguments]) -> list[PromptTokens]:
        """Prompts to continue, named by their text and the number of earlier ones with the same text."""
        prompts = []
        repeats: Counter[str] = Counter()
        for context, settings in requests:
            digest = sha256(context.encode("utf-8", "surrogatepass")).hexdigest()
            prompts.append(self.prompts.prompt(context, settings, f"{digest}/{repeats[digest]}"))
            repeats[digest] += 1
        return prompts

    def _check_tokens(self, pairs: Sequence[TokenPair], prompts: Sequence[PromptTokens]) -> None:
        """Raises UserError for a token without an embedding."""
        largest = max((max(pair.context + pair.continuation) for pair in pairs), default=0)
        largest = max([largest, *(max(prompt.tokens) for prompt in prompts)])
        known = count_tokens(self.bank.model)
        if largest >= known:
            token = self.prompts.tokenizer.convert_ids_to_tokens(largest)
            hint = f"a task has the token {token!r} with the id {largest}; the model's are 0 to {known - 1}"
            raise user_error("--tasks", None, hint)

    def _vocabulary(self, contender: int) -> int:
        """The number of tokens that share the probability."""
        if contender == BASE_ID:
            return self._vocabulary_of_base
        return self._vocabulary_of_adapters


def declared_vocabulary(model_config: Any) -> int:
    """The vocabulary of a model by its configuration.

    Where it is larger than that of the tokenizer, lm_eval's `hf` model cuts off the embeddings of further
    tokens before it loads an adapter: they share the probability with the base only.
    """
    text: Any = getattr(model_config, "text_config", None)
    config = text if hasattr(text, "vocab_size") else model_config
    return int(config.vocab_size)


class _ScoredRequests:
    """The pairs of all requests of log-probabilities, in the order of the requests."""

    def __init__(self, prompts: PromptModel, requests: Requests) -> None:
        self._plain = [prompts.token_pair(*request) for request in requests.get("loglikelihood", ())]
        self._windows = [prompts.windows(text) for (text,) in requests.get("loglikelihood_rolling", ())]
        self.pairs = list(self._plain)
        for windows in self._windows:
            self.pairs += windows

    def answers(self, scores: Sequence[Answer]) -> dict[str, list[Any]]:
        """Kind of request -> answers. scores: those of `pairs`."""
        start = len(self._plain)
        totals = []
        for windows in self._windows:
            end = start + len(windows)
            totals.append(sum(score for score, _ in scores[start:end]))
            start = end
        return {"loglikelihood": list(scores[: len(self._plain)]), "loglikelihood_rolling": totals}
