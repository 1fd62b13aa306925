"""Small templates and encoders of conversations for tests."""

from __future__ import annotations

from typing import Any

from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.messages import ChatColumns, Conversation, parse_conversation
from flora_train.data.chat.template import ChatTemplate
from flora_train.data.documents import EncodedDocument

TURNS = """{{- start }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- turn + 'assistant:' }}
        {%- generation %}
            {{- message.content }}
            {%- for call in message.tool_calls or [] %}
                {{- call.function | tojson }}
            {%- endfor %}
            {{- eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- turn + message.role + (message.name or '') + ':' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- turn + 'assistant:' }}
{%- endif %}
"""
"""Every message between a token that begins a turn and the end token; `start` and `turn` are variables."""
COLUMNS = ChatColumns(messages="messages", tools="tools", system="system")


def without_marks(source: str) -> str:
    """A template without its {% generation %}."""
    for mark in ("{%- generation %}", "{%- endgeneration %}", "{% generation %}", "{% endgeneration %}"):
        source = source.replace(mark, "")
    return source


def chat_encoder(
    tokenizer: Any, source: str = TURNS, *, start: str = "", turn: str = "", special_tokens: bool = False
) -> ChatEncoder:
    variables = {**tokenizer.special_tokens_map, "start": start, "turn": turn}
    return ChatEncoder(ChatTemplate("a template", source, variables=variables), tokenizer, special_tokens)


def conversation(*turns: tuple[str, str], **row: Any) -> Conversation:
    """A conversation of (role, content)."""
    messages = [{"role": role, "content": content} for role, content in turns]
    return parse_conversation({"messages": messages, **row}, COLUMNS, merged=False)


def learnt_texts(tokenizer: Any, document: EncodedDocument) -> list[str]:
    """The text of each learnt span."""
    return [tokenizer.decode(document.tokens[begin:end].tolist()) for begin, end in document.spans]
