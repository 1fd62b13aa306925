"""Styles of chat templates with small tokenizers that have their special tokens, and conversations for them.

Templates that other projects publish are not copied: where TRL ships a training variant, `template` names its
file; the others are written here in the same style.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.base_tokenizers import GPT4_WORDS, PUBLISHED, byte_level, bytes_only, pre_tokenizers, split

MISTRAL = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content + '\\n\\n' %}
    {%- set turns = messages[1:] %}
{%- else %}
    {%- set system = '' %}
    {%- set turns = messages %}
{%- endif %}
{%- set last_user = namespace(index=-1) %}
{%- for message in turns %}
    {%- if message.role == 'user' and last_user.index < 0 %}
        {%- set last_user.index = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in turns %}
    {%- if message.role == 'user' %}
        {%- if tools and loop.index0 == last_user.index %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (system if loop.first else '') + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS] ' + {'content': message.content} | tojson + '[/TOOL_RESULTS]' }}
    {%- elif message.role == 'assistant' %}
        {%- generation %}
        {%- if message.tool_calls %}
            {{- '[TOOL_CALLS] [' }}
            {%- for call in message.tool_calls %}
                {{- call.function | tojson }}
                {{- ', ' if not loop.last }}
            {%- endfor %}
            {{- ']' }}
        {%- else %}
            {{- ' ' + message.content }}
        {%- endif %}
        {{- eos_token }}
        {%- endgeneration %}
    {%- endif %}
{%- endfor %}
"""
SMOLLM3 = """{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%Y') + '\\n\\n' }}
{%- if messages[0].role == 'system' %}
    {{- messages[0].content + '\\n\\n' }}
{%- endif %}
{%- if tools %}
    {{- '### Tools\\n\\n' }}
    {%- for tool in tools %}
        {{- tool | string + '\\n' }}
    {%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {%- endgeneration %}
    {%- elif message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
VICUNA = """{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- message.content + '\\n\\n' }}
    {%- elif message.role == 'user' %}
        {{- 'USER: ' + message.content + '\\n' }}
    {%- else %}
        {{- 'ASSISTANT:' }}
        {%- generation %}
        {{- ' ' + message.content + eos_token }}
        {%- endgeneration %}
        {{- '\\n' if not loop.last }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- 'ASSISTANT:' }}
{%- endif %}
"""
CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "weather", "arguments": {"city": "Brno"}}}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "description": "now", "parameters": PARAMETERS},
}

PLAIN: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]},
    {
        "messages": [
            {"role": "user", "content": "What is 2 + 2?\n\nIn words."},
            {"role": "assistant", "content": "It is four.\nFour!"},
            {"role": "user", "content": "And the naïve 😀 sum?"},
            {"role": "assistant", "content": "Still four, žluťoučký 😀"},
            {"role": "user", "content": "thanks"},
            {"role": "assistant", "content": "end\n"},
        ]
    },
]
SYSTEM: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "local x = 1"},
            {"role": "assistant", "content": "return x"},
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "for i = 1, 2 do end"},
        ]
    }
]
TOOLS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "weather in Brno?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "content": '{"degrees": 21}'},
            {"role": "assistant", "content": "21 degrees."},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "The same."},
        ],
        "tools": json.dumps([WEATHER]),
    }
]
THINKING: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "2 + 2?"},
            {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
            {"role": "user", "content": "3 + 3?"},
            {"role": "assistant", "content": "<think>\nthree and three\n</think>\n\n6"},
        ]
    }
]


@dataclass(frozen=True)
class Style:
    """A template with the tokens that it needs."""

    template: str
    """The template, or the name of TRL's file."""
    tokens: tuple[str, ...]
    """Special tokens, besides those of the beginning and of the end."""
    rows: Sequence[dict[str, Any]]
    bos: str | None = None
    eos: str = "<|im_end|>"
    ordinary: tuple[str, ...] = ()
    """Added tokens that are not flagged as special."""
    sentencepiece: bool = False
    strips_right: bool = False
    """Tokens take the white space after them, as Phi-3's do."""
    unmarked: str = "same"
    """What is learnt without the marks: `same`, `less` (not the tokens of the generation prompt, which the
    marks have, too), or part of the error."""
    options: dict[str, Any] = field(default_factory=dict)


IM = ("<|im_start|>", "<|endoftext|>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>")
DEEPSEEK = tuple(
    f"<\uff5c{name}\uff5c>"
    for name in (
        "User",
        "Assistant",
        *(
            f"tool\u2581{part}\u2581{end}"
            for part in ("calls", "call", "outputs", "output")
            for end in ("begin", "end")
        ),
        "tool\u2581sep",
    )
)
TOOL_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
MISTRAL_TAGS = tuple(
    f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for slash in ("", "/")
)

STYLES: dict[str, Style] = {
    "chatml": Style(
        "qwen2_5_training.jinja", IM, [*PLAIN, *SYSTEM, *TOOLS], ordinary=TOOL_TAGS, unmarked="less"
    ),
    "llama-3": Style(
        "llama3_training.jinja", LLAMA3, [*PLAIN, *SYSTEM], bos="<|begin_of_text|>", eos="<|eot_id|>"
    ),
    "qwen3": Style("qwen3_training.jinja", IM, [*PLAIN, *SYSTEM, *TOOLS, *THINKING], ordinary=TOOL_TAGS),
    "gemma": Style(
        "gemma_training.jinja",
        ("<start_of_turn>", "<end_of_turn>"),
        PLAIN,
        bos="<bos>",
        eos="<eos>",
        sentencepiece=True,
    ),
    "mistral": Style(
        MISTRAL, (*MISTRAL_TAGS, "[TOOL_CALLS]"), [*PLAIN, *SYSTEM, *TOOLS], bos="<s>", eos="</s>"
    ),
    "mistral-sentencepiece": Style(
        MISTRAL,
        (*MISTRAL_TAGS, "[TOOL_CALLS]"),
        [*PLAIN, *SYSTEM, *TOOLS],
        bos="<s>",
        eos="</s>",
        sentencepiece=True,
    ),
    "phi": Style(
        "phi3_training.jinja",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        [*PLAIN, *SYSTEM],
        bos="<s>",
        eos="<|endoftext|>",
        sentencepiece=True,
        strips_right=True,
    ),
    "phi-plain": Style(
        "phi3_training.jinja",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        [*PLAIN, *SYSTEM],
        eos="<|endoftext|>",
    ),
    "deepseek": Style(
        "deepseekv3_training.jinja",
        DEEPSEEK,
        [*PLAIN, *SYSTEM, *TOOLS],
        bos="<\uff5cbegin\u2581of\u2581sentence\uff5c>",
        eos="<\uff5cend\u2581of\u2581sentence\uff5c>",
        ordinary=("<think>", "</think>"),
        unmarked="begins the assistant's turn with",
    ),
    "smollm3": Style(SMOLLM3, IM, [*PLAIN, *SYSTEM, *TOOLS], ordinary=TOOL_TAGS),
    "vicuna": Style(VICUNA, (), [*PLAIN, *SYSTEM], bos="<s>", eos="</s>", sentencepiece=True),
}


@cache
def style_tokenizer(name: str) -> Any:
    """A small tokenizer with the special tokens of a style, without a template."""
    style = STYLES[name]
    if style.sentencepiece:
        core = PUBLISHED["codellama"]().core
        core = type(core).from_str(core.to_str())
    else:
        core = byte_level(pre_tokenizers.Sequence([split(GPT4_WORDS), bytes_only()]))
    ends = [token for token in (style.bos, style.eos) if token is not None]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ends])
    tokens = [
        AddedToken(token, normalized=False, special=True, rstrip=style.strips_right) for token in style.tokens
    ]
    core.add_special_tokens(tokens)
    core.add_tokens([AddedToken(token, normalized=False, special=False) for token in style.ordinary])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=style.bos, eos_token=style.eos)


def save_tokenizer(name: str, folder: Path) -> Path:
    """The tokenizer of a style as a folder."""
    style_tokenizer(name).save_pretrained(folder / name)
    return folder / name


MARKUP = re.compile(r"<\|?[a-z_]+\|?>|</[a-z_]+>|<\uff5c[^\uff5c]+\uff5c>|\[/?[A-Z_]+\]")
"""What looks like a special token in a template."""


def tokenizer_of(template: str) -> Any:
    """A small tokenizer with everything in a template that looks like a special token."""
    core = byte_level(pre_tokenizers.Sequence([split(GPT4_WORDS), bytes_only()]))
    tokens = ["<s>", "</s>", *sorted(set(MARKUP.findall(template)))]
    core.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in tokens])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
