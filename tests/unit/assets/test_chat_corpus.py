"""The dialogues: their layout and splits, and the builder on small entries."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml

from assets.chat_corpus.dialogues import (
    EXCHANGES,
    LONGEST_TURN,
    MOST_TURNS,
    Dialogue,
    join_exchanges,
    read_topic,
    shared_texts,
    split_dialogues,
)
from assets.chat_corpus.notice import LICENCE
from assets.chat_corpus.sources import LANGUAGES, LEFT_OUT, VERSION

ROOT = Path(__file__).resolve().parents[3]
CHAT = ROOT / "assets/chat"


def dialogues(language: str, split: str) -> list[Dialogue]:
    lines = (CHAT / f"{language}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = []
    for row in rows:
        topic = Path(row["source"]).stem
        found.append(Dialogue(topic, tuple(message["content"] for message in row["messages"])))
        assert found[-1].messages() == row["messages"]
    return found


def written(topic: str, *entries: object) -> list[tuple[str, ...]]:
    text = yaml.safe_dump({"conversations": list(entries)})
    return [unit.turns for unit in read_topic(topic, text).units]


def test_eight_languages_with_a_notice_and_the_licence() -> None:
    assert len(LANGUAGES) >= 8
    notice = (CHAT / "NOTICE.md").read_text(encoding="utf-8")
    assert f"`chatterbot-corpus` {VERSION}" in notice
    assert f"({LICENCE})" in notice
    assert "Copyright (c) 2017, Gunther Cox" in (CHAT / LICENCE).read_text(encoding="utf-8")
    for language in LANGUAGES:
        assert f"| {language} |" in notice


@pytest.mark.parametrize("language", LANGUAGES)
def test_dialogues_are_well_formed_and_held_out_texts_are_not_in_training(language: str) -> None:
    train, validation = dialogues(language, "train"), dialogues(language, "validation")
    assert len(train) >= 90
    assert len(validation) >= 25
    for dialogue in train + validation:
        assert len(dialogue.turns) % 2 == 0
        assert len(dialogue.turns) <= max(MOST_TURNS, 2 * EXCHANGES)
        assert all(turn.strip() and len(turn) <= LONGEST_TURN for turn in dialogue.turns)
        assert dialogue.topic not in LEFT_OUT
    seen = set().union(*map(shared_texts, train))
    assert not seen & set().union(*map(shared_texts, validation))
    assert len(set(train + validation)) == len(train) + len(validation)
    assert sum(len(dialogue.turns) > 2 for dialogue in validation) >= 10


def test_an_entry_is_a_dialogue_or_a_question_with_alternative_answers() -> None:
    assert written("greetings", ["Hi", "Hello", "How are you?"]) == [("Hi", "Hello")]
    assert written("food", ["Cake?", "Yes", "No", "Maybe", "Never"]) == [
        ("Cake?", "Yes"),
        ("Cake?", "No"),
        ("Cake?", "Maybe"),
    ]


def test_entries_that_are_no_dialogue_are_counted() -> None:
    entries = [
        "text",
        ["One turn"],
        ["Q", ""],
        ["Q", "x" * (LONGEST_TURN + 1)],
        ["Same?", "same"],
        ["Q", " a  b "],
    ]
    read = read_topic("food", yaml.safe_dump({"conversations": entries}))
    assert [unit.turns for unit in read.units] == [("Q", "a b")]
    assert read.dropped == 5


def test_exchanges_of_one_topic_are_joined_but_never_two_answers_to_a_question() -> None:
    units = [Dialogue("food", (f"q{i}", f"a{i}")) for i in range(4)]
    units += [Dialogue("food", ("q0", "another")), Dialogue("sport", ("q", "a"))]
    whole = Dialogue("greetings", ("Hi", "Hello", "Bye", "Bye"))
    joined = join_exchanges([*units, whole])
    assert joined == [
        whole,
        Dialogue("food", ("q0", "a0", "q1", "a1", "q2", "a2")),
        Dialogue("food", ("q3", "a3", "q0", "another")),
        Dialogue("sport", ("q", "a")),
    ]


def test_entries_that_share_a_question_or_a_long_answer_are_in_one_split() -> None:
    shared = "The same long answer."
    units = [Dialogue("t", (f"question {i}", f"answer number {i} of many")) for i in range(60)]
    units += [Dialogue("t", (f"question {i}", shared)) for i in range(0, 60, 2)]
    splits = split_dialogues(units)
    assert all(splits.values())
    texts = [{turn for dialogue in dialogues for turn in dialogue.turns} for dialogues in splits.values()]
    assert not texts[0] & texts[1]


def test_builder_writes_the_same_bytes_from_a_wheel_and_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "assets"))
    from assets.build_chat_corpus import main

    wheel = tmp_path / "chat.whl"
    entries = [[f"Question {i}?", f"Answer {i} of this test."] for i in range(40)]
    with zipfile.ZipFile(wheel, "w") as archive:
        for language in LANGUAGES:
            text = yaml.safe_dump({"conversations": entries})
            archive.writestr(f"chatterbot_corpus/data/{language}/food.yml", text)
            archive.writestr(f"chatterbot_corpus/data/{language}/gossip.yml", text)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["--wheel", str(wheel), "--output", str(first)]) == 0
    assert main(["--wheel", str(wheel), "--output", str(second)]) == 0
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(
        [LICENCE, "NOTICE.md"] + [f"{a}.{b}.jsonl" for a in LANGUAGES for b in ("train", "validation")]
    )
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)
    rows = [json.loads(line) for line in (first / "dutch.train.jsonl").read_text().splitlines()]
    assert {row["source"] for row in rows} == {"dutch/food.yml"}
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("chatterbot_corpus/data/dutch/food.yml", text)
    assert main(["--wheel", str(wheel), "--output", str(first)]) == 1
    assert "chat.whl has no language 'english'" in capsys.readouterr().err
