"""What a person who watches a run sees."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from flora_train.runtime.progress import ProgressBar, duration, share_and_eta
from flora_train.training import trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer


@pytest.mark.usefixtures("log_to_stderr")
def test_a_long_evaluation_between_steps_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "ProgressBar", partial(ProgressBar, line_every=0.0))
    run = make_trainer([spec("ia3", "a"), spec("ia3", "b")], tmp_path, interval=1, steps=2, tokens_per_microbatch=64)
    run.train()
    said = capsys.readouterr().err
    assert "train: 50%" in said
    assert "evaluate 55% < 0s" in said
    assert said.rstrip().endswith("evaluate 100% < 0s")


def test_a_stage_within_another_has_an_eta_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 160.0)
    assert [share_and_eta(share, 100.0) for share in (0.0, 0.25, 1.0)] == ["0%", "25% < 3m00s", "100% < 0s"]


def test_durations_are_short_words() -> None:
    assert [duration(seconds) for seconds in (41.6, 185, 7620)] == ["42s", "3m05s", "2h07m"]
