"""Answers in the journal are used while they are of the same base, adapter, prompt and limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.answers.journal import AnswerLog, Key, LoggedAnswer

SETTINGS = {"model": "tiny", "dtype": "float32"}
ANSWERS = [
    LoggedAnswer(adapter, "qa", example, f"{adapter} {example}", "ž\n", "end", 3, 9, f"p{example}", adapter)
    for adapter in ("", "qa-lora")
    for example in range(3)
]
ORIGINS: dict[Key, tuple[str, str, int]] = {
    answer.key: (answer.prompt_sha, answer.adapter_sha, answer.max_new_tokens) for answer in ANSWERS
}


@pytest.fixture
def log(tmp_path: Path) -> AnswerLog:
    """A journal of two processes."""
    log = AnswerLog(tmp_path)
    assert log.known(SETTINGS, ORIGINS) == set()
    for rank in range(2):
        writer = log.writer(rank)
        for answer in ANSWERS[rank::2]:
            writer.append(answer)
    return log


def test_all_answers_are_known_again(log: AnswerLog) -> None:
    assert log.known(SETTINGS, ORIGINS) == ORIGINS.keys()
    assert set(log.read().values()) == set(ANSWERS)


@pytest.mark.parametrize("change", [("p9", "qa-lora", 9), ("p1", "other", 9), ("p1", "qa-lora", 8)])
def test_an_answer_of_another_origin_is_deleted(log: AnswerLog, change: tuple[str, str, int]) -> None:
    key = ("qa-lora", "qa", 1)
    known = log.known(SETTINGS, {**ORIGINS, key: change})
    assert known == ORIGINS.keys() - {key}
    assert log.read().keys() == known
    log.writer(1).append(replace(ANSWERS[4], answer="again"))
    assert log.known(SETTINGS, ORIGINS) == ORIGINS.keys()


def test_answers_to_prompts_that_are_not_asked_stay(log: AnswerLog) -> None:
    few = {key: origin for key, origin in ORIGINS.items() if key[2] == 0}
    assert few.keys() <= log.known(SETTINGS, few)
    assert log.read().keys() == ORIGINS.keys()


def test_answers_of_another_base_are_deleted(log: AnswerLog) -> None:
    assert log.known({**SETTINGS, "dtype": "bfloat16"}, ORIGINS) == set()
    assert log.read() == {}


def test_a_line_that_a_kill_cut_is_dropped_and_a_damaged_one_is_named(log: AnswerLog) -> None:
    file = log.path / "answers-0.jsonl"
    whole = file.read_text(encoding="utf-8")
    file.write_text(f'{whole}{{"adapter": "qa-l', encoding="utf-8")
    assert log.known(SETTINGS, ORIGINS) == ORIGINS.keys()
    file.write_text(whole.replace('"tokens": 3', '"tokens": 4', 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"answers-0.jsonl:1: is damaged, or not an answer: delete this line"):
        log.read()
