"""Checks that a template writes what a conversation has: some leave out roles, tools or calls silently."""

from __future__ import annotations

from dataclasses import replace

from flora_train.config.errors import choices
from flora_train.data.chat.messages import REASONING, Conversation, Message
from flora_train.data.chat.template import ChatTemplate, Form, TemplateError

WORD = "qzxvwk"
"""Stands for a text that must come out."""


def writes_tool_calls(template: ChatTemplate) -> bool:
    """Whether a template writes calls of tools and their results."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": "a", "arguments": {}}}
    messages: list[Message] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "a", "tool_call_id": "abcdefghi", "content": "a"},
        {"role": "assistant", "content": "a"},
    ]
    conversation = Conversation(tuple(messages))
    try:
        form, _ = template.first_rendering(conversation)
        CompletenessCheck(template)(conversation, form)
    except ValueError:
        return False
    return True


class CompletenessCheck:
    """Finds what a template leaves out. Each kind of message is tried once, in the first row that has it."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self.notes: list[str] = []
        """What the template leaves out although a conversation can do without."""
        self._tried: set[tuple[str, ...]] = set()

    def __call__(self, conversation: Conversation, form: Form) -> None:
        """Raises ValueError that names what the template does not write."""
        has_tools = "tools" if conversation.tools else ""
        for position, message in enumerate(conversation.messages):
            role = message["role"]
            if role != "assistant" and self._is_new(role, str(position == 0), has_tools):
                changed = {**message, "content": WORD}
                self._try(conversation, position, changed, form, f"messages of the role {role!r}")
            if message.get("tool_calls") and self._is_new("tool_calls", has_tools):
                calls = [
                    {**call, "function": {**call["function"], "name": WORD}} for call in message["tool_calls"]
                ]
                self._try(conversation, position, {**message, "tool_calls": calls}, form, "tool calls")
        self._note_reasoning(conversation, form)
        if conversation.tools and self._is_new("tools"):
            function = {"name": WORD, "description": WORD, "parameters": {"type": "object", "properties": {}}}
            tools = ({"type": "function", "function": function},)
            if not self._writes(replace(conversation, tools=tools), form):
                self.notes.append(f"{self.template.name} does not write the definitions of tools")

    def _note_reasoning(self, conversation: Conversation, form: Form) -> None:
        """Note it if the reasoning of the last turn, which no template drops on purpose, is left out."""
        turns = conversation.assistant_turns
        if not turns:
            return
        message = conversation.messages[turns[-1]]
        keys = [key for key in REASONING if message.get(key)]
        if not keys or not self._is_new("reasoning", *keys):
            return
        messages = list(conversation.messages)
        messages[turns[-1]] = {**message, **dict.fromkeys(keys, WORD)}
        if not self._writes(replace(conversation, messages=tuple(messages)), form):
            self.notes.append(
                f"{self.template.name} does not write {choices(keys)} of the assistant's messages"
            )

    def _is_new(self, *kind: str) -> bool:
        is_new = kind not in self._tried
        self._tried.add(kind)
        return is_new

    def _try(
        self, conversation: Conversation, position: int, changed: dict[str, object], form: Form, part: str
    ) -> None:
        messages = list(conversation.messages)
        messages[position] = changed
        if not self._writes(replace(conversation, messages=tuple(messages)), form):
            raise ValueError(
                f"{self.template.name} leaves out {part}: set chat_template to one that writes them (chatml, "
                "for example), or remove them from the row"
            )

    def _writes(self, conversation: Conversation, form: Form) -> bool:
        try:
            text = self.template.render(conversation, form=form).text
        except TemplateError:  # it reads the text, so that it does not leave it out
            return True
        return WORD in text.lower()
