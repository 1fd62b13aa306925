"""Models of lm_eval: prompts by the conventions of its `hf` model, answers from memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flora_train.config.errors import user_error
from flora_train.evaluation.harness.answers import Answers, Arguments
from flora_train.evaluation.harness.requests import PromptTokens, TokenPair

MAX_NEW_TOKENS = 256
"""Of a continuation where the task has no limit, as in lm_eval's `hf` model."""


class PromptModel(TemplateLM):
    """Makes prompts and tokens of texts as lm_eval's `hf` model does. Answers nothing.

    Raises UserError for a tokenizer without an end token.
    """

    backend = "causal"

    def __init__(self, tokenizer: Any, model_config: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = resolve_max_length(model_config, tokenizer)
        """Tokens that the model reads."""
        if tokenizer.eos_token_id is None:
            hint = "its tokenizer has no end token, which lm_eval's prompts and continuations need"
            raise user_error("model.path", tokenizer.name_or_path, hint)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        if self.tokenizer.bos_token_id is not None:
            return int(self.tokenizer.bos_token_id)
        return self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Tokens of a text, with a start token only where the text does not begin with one."""
        options = {}
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        elif has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            options["add_special_tokens"] = False
        return list(self.tokenizer.encode(string, **options))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as a prompt. Without its system message where the template refuses one."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError:
            others = [message for message in chat_history if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(others, **options))

    def token_pair(self, context: str, continuation: str) -> TokenPair:
        """The tokens of a context and of the continuation to score.

        Raises UserError where the continuation has no token, or more than the model reads.
        """
        if context:
            before, after = self._encode_pair(context, continuation)
        else:
            before = [self.prefix_token_id]
            after = self.tok_encode(continuation, add_special_tokens=False)
            if after[:1] == before:
                before, after = after[:1], after[1:]
        if not before or not after:
            hint = f"a task scores {continuation!r} after {context[-40:]!r}, which has no token to score"
            raise user_error("--tasks", None, hint)
        if len(after) > self.max_length:
            hint = f"a task scores a text of {len(after)} tokens, and the model reads {self.max_length}"
            raise user_error("--tasks", None, hint)
        return TokenPair(tuple(before), tuple(after))

    def windows(self, text: str) -> list[TokenPair]:
        """The pairs whose log-probabilities add up to that of a text, which may be longer than the model
        reads."""
        pairs = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        windows = []
        for pair in pairs:
            context, continuation = make_disjoint_window(pair)
            windows.append(TokenPair(tuple(context), tuple(continuation)))
        return windows

    def prompt(self, context: str, settings: Mapping[str, object], key: str) -> PromptTokens:
        """A prompt to continue, without its first tokens where it leaves no room. key: its name.

        Raises UserError for settings of the task that leave no room at all, or are not supported.
        """
        options = dict(normalize_gen_kwargs(dict(settings), MAX_NEW_TOKENS))
        max_new_tokens = options.pop("max_gen_toks")
        stops = self._stops(options.pop("until"))
        if "max_length" in options:
            raise user_error(
                "--tasks", None, "generation_kwargs of a task: give max_gen_toks, not max_length"
            )
        room = self.max_length - max_new_tokens
        if room <= 0 or max_new_tokens < 1:
            hint = (
                f"generation_kwargs of a task: max_gen_toks = {max_new_tokens} must be at least 1, and less "
                f"than the {self.max_length} tokens that the model reads"
            )
            raise user_error("--tasks", None, hint)
        if options["do_sample"] and not options.get("temperature"):
            raise user_error("--tasks", None, "generation_kwargs of a task: do_sample needs a temperature")
        if not options["do_sample"]:
            options.pop("temperature", None)
        tokens = self._prompt_tokens(context)[-room:]
        if not tokens:
            raise user_error("--tasks", None, "a task has a prompt without tokens: give it a text")
        return PromptTokens(tuple(tokens), key, max_new_tokens, stops, options)

    def continuation(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """The text of generated tokens before the first stop text."""
        text = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return str(postprocess_generated_text(text, list(stops), None))

    def _prompt_tokens(self, context: str) -> list[int]:
        options = {}
        if has_bos_prefix(context, self.tokenizer.bos_token):
            options["add_special_tokens"] = False
        return list(self.tokenizer(context, **options)["input_ids"])

    def _stops(self, until: list[str]) -> tuple[str, ...]:
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        return tuple(str(stop) for stop in handle_stop_sequences(list(until), eos=end))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Any]:
        return self.answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        return self.answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self.answer("generate_until", requests)

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: object) -> list[Any]:
        raise NotImplementedError("answers come from memory")

    def answer(self, kind: str, requests: Iterable[Instance]) -> list[Any]:
        """The answers to requests of one kind."""
        raise RequestsReached


class RequestsReached(Exception):
    """lm_eval has made all requests of all tasks, and asks a model that answers nothing."""


class ContenderModel(PromptModel):
    """One contender, whose answers were computed with those of all others."""

    def __init__(self, tokenizer: Any, model_config: Any, *, name: str, answers: Answers) -> None:
        super().__init__(tokenizer, model_config)
        self.name, self.answers = name, answers

    def answer(self, kind: str, requests: Iterable[Instance]) -> list[Any]:
        return self.answers.of(self.name, kind, arguments(requests))


def arguments(requests: Iterable[Instance]) -> list[Arguments]:
    """The texts and settings of requests."""
    return [request.args for request in requests]
