"""Chat templates: of a tokenizer, of a file, or shipped with this package; and their rendering."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from flora_train.config.errors import choices, did_you_mean, first_line, user_error
from flora_train.config.paths import find_file
from flora_train.data.chat.messages import Conversation, Message
from flora_train.data.text_encoder import start_tokens

SHIPPED = Path(__file__).parent / "templates"
TOKEN = re.compile(r"<\|\w+\|>")
CHATML = ("<|im_start|>", "<|im_end|>")
RECOMMENDED = "plain"
"""The shipped template that every tokenizer can render."""
MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
DATE = date(2024, 7, 26)
"""The day that templates write which ask for today's date: tokens must not depend on the day of the run."""


class TemplateError(ValueError):
    """A template that cannot render a conversation, with the reason."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    marks: tuple[tuple[int, int], ...] = ()
    """(begin, end) in characters of what the template marks with `{% generation %}`, in order; empty spans,
    too."""


@dataclass(frozen=True)
class Form:
    """A form of messages in which a template can render them."""

    arguments_as_text: bool = False
    """Arguments of tool calls are JSON text, not objects."""
    empty_content: bool = False
    """A message without content has an empty one."""
    content_parts: bool = False
    """Contents are lists of one part of text, as templates of models with images read them."""


_WORD = "qzxvwk"
FORMS = (Form(), Form(empty_content=True), Form(True), Form(True, True))
"""In the order in which they are tried."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template that renders conversations as transformers' apply_chat_template does."""

    name: str
    """For errors: `the tokenizer's chat template`, the path of a file, or the name of a shipped one."""
    source: str
    variants: Mapping[str, str] = field(default_factory=dict)
    """Name -> source, of a tokenizer with several templates: `tool_use` renders conversations with tools."""
    variables: Mapping[str, Any] = field(default_factory=dict)
    """The tokenizer's special tokens by their names (bos_token), as transformers passes them."""
    today: date = DATE

    @classmethod
    def of(cls, tokenizer: Any, name: str | None, key: str) -> ChatTemplate:
        """The template that a task names: None (the tokenizer's own), a .jinja file, one of the tokenizer's
        templates, or a shipped one.

        key: the task's configuration key. Raises UserError if there is none.
        """
        own = getattr(tokenizer, "chat_template", None) or {}
        if isinstance(own, str):
            own = {"default": own}
        variables = dict(tokenizer.special_tokens_map)
        if name is None:
            if not own:
                hint = (
                    "is needed: the base's tokenizer has no chat template; give the path of a .jinja file or "
                    f"a shipped template, for example chat_template: {suggested_template(tokenizer)}"
                )
                raise user_error(f"{key}.chat_template", None, hint)
            if "default" not in own:
                hint = f"is needed: the base's tokenizer has several templates: {choices(own)}"
                raise user_error(f"{key}.chat_template", None, hint)
            return cls._checked(cls("the tokenizer's chat template", own["default"], own, variables), key)
        if name in own:
            return cls._checked(cls(f"the tokenizer's chat template {name!r}", own[name], {}, variables), key)
        if name in shipped_templates():
            source = _shipped_source(name, tokenizer)
            return cls._checked(cls(f"chat_template {name!r}", source, {}, variables), key)
        return cls._checked(cls(name, _read(name, own, key), {}, variables), key)

    @classmethod
    def _checked(cls, template: ChatTemplate, key: str) -> ChatTemplate:
        """The same template, if it is one. Raises UserError for wrong syntax."""
        from jinja2 import TemplateSyntaxError

        for source in {template.source, *template.variants.values()}:
            try:
                _compile(source, template.today)
            except TemplateSyntaxError as error:  # its first line is our comment
                hint = f"is not a template: line {error.lineno - 1}: {first_line(error)}"
                raise user_error(f"{key}.chat_template", template.name, hint) from None
        return template

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant generates."""
        return MARKS.search(self.source) is not None

    def source_for(self, conversation: Conversation) -> str:
        """The template that renders a conversation."""
        if conversation.tools:
            return self.variants.get("tool_use", self.source)
        return self.source

    def marks_turns(self, conversation: Conversation) -> bool:
        """Whether the template that renders a conversation marks what the assistant generates."""
        return MARKS.search(self.source_for(conversation)) is not None

    def render(
        self, conversation: Conversation, *, prompt: bool = False, form: Form | None = None
    ) -> Rendered:
        """A conversation as text. prompt: with the beginning of an assistant's turn after it.

        form: of the messages; default: the first that the template can render. Raises TemplateError.
        """
        if form is None:
            form, _ = self.first_rendering(conversation)
        return self._render(conversation, prompt, form)

    def first_rendering(self, conversation: Conversation) -> tuple[Form, Rendered]:
        """The first form in which the template renders a conversation, and the text. Raises
        TemplateError."""
        first: TemplateError | None = None
        for plain_form in FORMS:
            if plain_form != FORMS[0] and not _differs(conversation, plain_form):
                continue
            form = replace(plain_form, content_parts=self._reads_parts)
            try:
                return form, self._render(conversation, False, form)
            except TemplateError as error:
                first = first or error
        assert first is not None
        raise first

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template writes contents that are lists of parts, and not those that are text."""
        message = Conversation(({"role": "user", "content": _WORD},))
        written = []
        for form in (Form(), Form(content_parts=True)):
            try:
                written.append(_WORD in self._render(message, False, form).text)
            except TemplateError:
                written.append(False)
        return written == [False, True]

    def _render(self, conversation: Conversation, prompt: bool, form: Form) -> Rendered:
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source_for(conversation)
        compiled = _compile(source, self.today)
        messages = [_in_form(message, form) for message in conversation.messages]
        tools = [dict(tool) for tool in conversation.tools] or None
        marks: Sequence[Sequence[tuple[int, int]]]
        try:
            (text,), marks = render_jinja_template(
                conversations=[messages],
                tools=tools,
                documents=None,
                chat_template=compiled,
                return_assistant_tokens_mask=MARKS.search(source) is not None,
                continue_final_message=False,
                add_generation_prompt=prompt,
                **self.variables,
            )
        except Exception as error:  # a template can raise anything
            raise TemplateError(f"{self.name} cannot render it: {first_line(error)}") from None
        return Rendered(text, tuple(marks[0]) if marks else ())


def _compile(source: str, today: date) -> str:
    """The source under which transformers keeps a template compiled whose day is `today`. Raises
    jinja2.TemplateSyntaxError."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    own = (
        f"{{# {today.isoformat()} #}}\n{source}"  # compiled apart from what others render with the real date
    )
    _compile_jinja_template(own).environment.globals["strftime_now"] = today.strftime
    return own


def shipped_templates() -> list[str]:
    """Names of the templates that this package has."""
    return sorted(path.stem for path in SHIPPED.glob("*.jinja"))


def _shipped_source(name: str, tokenizer: Any) -> str:
    """A shipped template for a tokenizer: with its beginning token, and with its end token after the
    assistant's turns where it does not know that of the template."""
    source = (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    end = "'<|im_end|>'"
    if "<|im_end|>" not in tokenizer.get_added_vocab():
        end += " + (eos_token or '')"
    head = f"{{%- set end_of_turn = {end} -%}}\n" if "end_of_turn" in source else ""
    if start_tokens(tokenizer) == [tokenizer.bos_token_id]:
        head += "{{- bos_token -}}\n"
    return head + source


def lacking_tokens(template: ChatTemplate, tokenizer: Any) -> list[str]:
    """Tokens such as <|im_start|> that a template writes and the tokenizer does not know: they are ordinary
    text."""
    known = tokenizer.get_added_vocab()
    return [token for token in dict.fromkeys(TOKEN.findall(template.source)) if token not in known]


def suggested_template(tokenizer: Any) -> str:
    """The shipped template that suits a tokenizer."""
    known = tokenizer.get_added_vocab()
    return "chatml" if set(CHATML) <= known.keys() else RECOMMENDED


def _read(name: str, own: Mapping[str, str], key: str) -> str:
    key = f"{key}.chat_template"
    if "/" not in name and "\\" not in name and not name.endswith((".jinja", ".jinja2", ".j2", ".txt")):
        names = [*shipped_templates(), *own]
        hint = f"is neither a .jinja file nor a template by name: names are {choices(names)}."
        raise user_error(key, name, hint + did_you_mean(name, names))
    try:
        path = find_file(name)
        if not path.is_file():
            raise user_error(key, name, f"no such file in {Path.cwd()}")
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise user_error(key, name, f"cannot be read: {first_line(error)}") from None


def _differs(conversation: Conversation, form: Form) -> bool:
    """Whether a conversation in a form differs from the same in the first form."""
    if form.arguments_as_text and not any("tool_calls" in message for message in conversation.messages):
        return False
    return not form.empty_content or any("content" not in message for message in conversation.messages)


def _in_form(message: Message, form: Form) -> Message:
    changed = dict(message)
    if form.empty_content:
        changed.setdefault("content", "")
    if form.content_parts and "content" in changed:
        changed["content"] = [{"type": "text", "text": changed["content"]}]
    if form.arguments_as_text and "tool_calls" in message:
        changed["tool_calls"] = [_with_text(call) for call in message["tool_calls"]]
    return changed


def _with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {
        **call,
        "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)},
    }
