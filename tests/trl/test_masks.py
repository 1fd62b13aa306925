"""Tokens and learnt tokens of conversations are those of TRL's SFTTrainer with assistant_only_loss."""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy as np
import pytest
from jinja2 import TemplateError

from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.messages import ChatColumns, parse_conversation
from flora_train.data.chat.template import MARKS, ChatTemplate
from tests.chat_styles import (
    PLAIN,
    STYLES,
    SYSTEM,
    THINKING,
    TOOLS,
    save_tokenizer,
    style_tokenizer,
    tokenizer_of,
)
from tests.trl.environment import run_script

COLUMNS = ChatColumns(messages="messages", tools="tools")


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """TRL's templates, and for each style its template and TRL's examples."""
    folder = tmp_path_factory.mktemp("masks")
    cases = [
        {
            "name": name,
            "tokenizer": str(save_tokenizer(name, folder)),
            "template": style.template,
            "rows": list(style.rows),
        }
        for name, style in STYLES.items()
    ]
    content, _ = run_script("masks.py", folder, cases=cases)
    return content


def encoder(name: str, source: str) -> ChatEncoder:
    tokenizer = style_tokenizer(name)
    template = ChatTemplate(name, source, variables=tokenizer.special_tokens_map, today=date.today())
    return ChatEncoder(template, tokenizer)


def without_marks(source: str) -> str:
    """A template without its {% generation %}."""
    return MARKS.sub("", source.replace("endgeneration", "generation"))


def mask(spans: Any, length: int) -> np.ndarray:
    learnt = np.zeros(length, dtype=bool)
    for begin, end in spans:
        learnt[begin:end] = True
    return learnt


@pytest.mark.parametrize("name", STYLES)
def test_learnt_tokens_are_those_of_trl(name: str, trl: Any) -> None:
    chats = encoder(name, trl["cases"][name]["template"])
    assert chats.template.has_marks
    for row, example in zip(STYLES[name].rows, trl["cases"][name]["examples"], strict=True):
        document = chats.document(parse_conversation(row, COLUMNS, merged=False))
        assert document.tokens.tolist() == example["ids"]
        expected = np.array(example["labels"]) != -100
        assert expected.any()
        assert not expected.all()
        np.testing.assert_array_equal(mask(document.spans, len(document.tokens)), expected)


@pytest.mark.parametrize("name", STYLES)
def test_learnt_tokens_without_marks_are_the_same_or_an_error_says_why(name: str, trl: Any) -> None:
    marked = encoder(name, trl["cases"][name]["template"])
    unmarked = encoder(name, without_marks(trl["cases"][name]["template"]))
    assert not unmarked.template.has_marks
    expectation = STYLES[name].unmarked
    for row in STYLES[name].rows:
        conversation = parse_conversation(row, COLUMNS, merged=False)
        expected = marked.document(conversation)
        if expectation not in ("same", "less"):
            with pytest.raises(ValueError, match=expectation):
                unmarked.document(conversation)
            continue
        document = unmarked.document(conversation)
        assert document.tokens.tolist() == expected.tokens.tolist()
        ours, theirs = (mask(one.spans, len(one.tokens)) for one in (document, expected))
        if expectation == "less":  # the marks have the line end of the generation prompt, too
            theirs &= ours | ~_of_prompts(unmarked, conversation, len(theirs))
        np.testing.assert_array_equal(ours, theirs)


def _of_prompts(chats: ChatEncoder, conversation: Any, length: int) -> np.ndarray:
    """The last token of each generation prompt."""
    found = np.zeros(length, dtype=bool)
    for turn in conversation.assistant_turns:
        found[len(chats.prompt(conversation.before(turn))) - 1] = True
    return found


def test_every_training_template_of_trl_learns_what_transformers_marks(trl: Any) -> None:
    """All conversations that transformers renders with a template, or an error; never another mask."""
    compared, refused = 0, 0
    for name, source in trl["templates"].items():
        tokenizer = tokenizer_of(source)
        for row in (*PLAIN, *SYSTEM, *TOOLS, *THINKING):
            conversation = parse_conversation(row, COLUMNS, merged=False)
            for template in (source, without_marks(source)):
                chats = ChatEncoder(
                    ChatTemplate(name, template, variables=tokenizer.special_tokens_map, today=date.today()),
                    tokenizer,
                    special_tokens=True,
                )
                try:
                    document = chats.document(conversation)
                except ValueError:
                    refused += 1
                    continue
                expected = _marked_by_transformers(tokenizer, source, conversation)
                if expected is None:
                    continue
                ids, marked = expected
                assert document.tokens.tolist() == ids, name
                learnt = mask(document.spans, len(ids))
                compared += 1
                # transformers leaves out the last bytes of a character at which a mark ends
                more = [tokenizer.decode(ids[i]) for i in np.flatnonzero(learnt & ~marked)]
                assert set(more) <= {"\ufffd"}, name
                if template == source:
                    assert not (marked & ~learnt).any(), name
    assert compared > 150
    assert refused < compared


def _marked_by_transformers(tokenizer: Any, source: str, conversation: Any) -> Any:
    """(tokens, mask) of apply_chat_template with text contents, None where it cannot render them."""
    messages = [dict(message) for message in conversation.messages]
    tools = list(conversation.tools) or None
    try:
        found = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=source, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, TypeError, ValueError):
        return None
    text = tokenizer.decode(found["input_ids"])
    if not all(str(message.get("content") or "").strip() in text for message in messages):
        return None  # a template of models with images writes no content that is text
    return list(found["input_ids"]), np.array(found["assistant_masks"], dtype=bool)
