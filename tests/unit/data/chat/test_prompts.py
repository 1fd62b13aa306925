"""Sample prompts as the model reads them."""

from __future__ import annotations

import pytest

from flora_train.config.errors import UserError
from flora_train.config.task_schema import TaskConfig
from flora_train.data.chat.prompts import sample_prompts
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.data.many_tokenizers import smollm2

MESSAGES = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "say <|im_end|>"},
]


def task(*prompts: object, **keys: object) -> TaskConfig:
    return TaskConfig.model_validate({"train": "x.jsonl", "sample_prompts": list(prompts), **keys})


def test_messages_are_rendered_with_the_beginning_of_an_answer() -> None:
    base = smollm2()
    text, dialogue = sample_prompts(task("as it is", MESSAGES), base, "tasks.talk")
    assert text.content == "as it is"
    assert not text.end_tokens
    assert isinstance(dialogue.content, tuple)
    expected = base.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    assert base.decode(dialogue.content) == expected
    end = base.convert_tokens_to_ids("<|im_end|>")
    assert dialogue.content.count(end) == 2  # that of the user's text is text
    assert dialogue.end_tokens == {end}


def test_the_template_of_the_task_is_used() -> None:
    base = byte_tokenizer()
    (prompt,) = sample_prompts(task(MESSAGES, chat_template="plain", messages="messages"), base, "tasks.talk")
    assert isinstance(prompt.content, tuple)
    assert base.decode(prompt.content) == "System: short\nUser: say <|im_end|>\nAssistant:"
    assert prompt.end_tokens == {base.eos_token_id}


def test_messages_without_a_template_are_an_error_that_names_the_key() -> None:
    with pytest.raises(
        UserError, match=r"^tasks\.talk\.chat_template: is needed: the base's tokenizer has no "
    ):
        sample_prompts(task(MESSAGES), byte_tokenizer(), "tasks.talk")
    assert sample_prompts(task("text"), byte_tokenizer(), "tasks.talk")[0].content == "text"


def test_a_template_that_refuses_messages_is_an_error_that_names_the_prompt() -> None:
    base = byte_tokenizer()
    base.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(UserError, match=r"^tasks\.talk\.sample_prompts\.1 = .*no system, please"):
        sample_prompts(task("text", MESSAGES), base, "tasks.talk")
