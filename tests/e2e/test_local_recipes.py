"""The recipes for two cores that need only what is shipped: their rows are read and shown as learnt."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flora_train.cli import main

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "assets/models/smollm2-135m"
CHATS = ("dutch", "english", "italian", "japanese", "korean", "portuguese", "spanish", "ukrainian")


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if not MODEL.exists():
        pytest.skip("assets/models/smollm2-135m is not built: python assets/build_smollm2.py")


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["data", *words]) == 0
    return capsys.readouterr().out


def test_every_language_of_chat_local_learns_the_turns_of_the_assistant(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(capsys, "recipe=chat_local")
    for task in CHATS:
        assert f"{task}: learn assistant, max_length 384" in text
    learnt = re.findall(r"\[\[(.*?)\]\]", text, re.DOTALL)
    assert len(learnt) >= 2 * len(CHATS)
    assert not [part for part in learnt if "<|im_start|>" in part]
    # but for a turn that max_length cuts
    ended = [part for part in learnt if part.rstrip("| \n").endswith("<|im_end|>")]
    assert len(ended) >= 0.9 * len(learnt)
