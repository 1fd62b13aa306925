"""Tokens and learnt tokens of conversations are those of TRL's SFTTrainer with assistant_only_loss."""

from __future__ import annotations

from datetime import date
from typing import Any

import numpy as np
import pytest

from flora_train.data.chat.encoder import ChatEncoder
from flora_train.data.chat.messages import ChatColumns, parse_conversation
from flora_train.data.chat.template import MARKS, ChatTemplate
from tests.chat_styles import STYLES, save_tokenizer, style_tokenizer
from tests.trl.environment import run_script

COLUMNS = ChatColumns(messages="messages", tools="tools")


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Name of a style -> the template and the examples of TRL."""
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
    return content["cases"]


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
    chats = encoder(name, trl[name]["template"])
    assert chats.template.has_marks
    for row, example in zip(STYLES[name].rows, trl[name]["examples"], strict=True):
        document = chats.document(parse_conversation(row, COLUMNS, merged=False))
        assert document.tokens.tolist() == example["ids"]
        expected = np.array(example["labels"]) != -100
        assert expected.any()
        assert not expected.all()
        np.testing.assert_array_equal(mask(document.spans, len(document.tokens)), expected)


@pytest.mark.parametrize("name", STYLES)
def test_learnt_tokens_without_marks_are_the_same_or_an_error_says_why(name: str, trl: Any) -> None:
    marked = encoder(name, trl[name]["template"])
    unmarked = encoder(name, without_marks(trl[name]["template"]))
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
