"""What a person who watches a run sees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from flora_train.training import trainer
from flora_train.training.progress import Watch, duration
from tests.conftest import spec
from tests.unit.training.harness import make_trainer


def test_a_long_evaluation_between_steps_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "Watch", partial(Watch, line_every=0.0))
    run = make_trainer([spec("ia3", "a"), spec("ia3", "b")], tmp_path, every=1, steps=2, tokens_per_microbatch=64)
    run.train()
    said = capsys.readouterr().err
    assert "train: 50%" in said
    assert "evaluate 55%" in said
    assert said.rstrip().endswith("evaluate 100%")


def test_durations_are_short_words() -> None:
    assert [duration(seconds) for seconds in (41.6, 185, 7620)] == ["42s", "3m05s", "2h07m"]
