"""What a person who watches a run sees."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from flora_train.runtime import progress as progress_module
from flora_train.runtime.progress import ProgressBar, duration, share_and_time_left
from flora_train.training import trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer


@pytest.mark.usefixtures("log_to_stderr")
def test_a_long_evaluation_between_steps_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "ProgressBar", partial(ProgressBar, line_every=0.0))
    run = make_trainer(
        [spec("ia3", "a"), spec("ia3", "b")], tmp_path, interval=1, steps=2, tokens_per_microbatch=64
    )
    run.train()
    said = capsys.readouterr().err
    assert "train: 50%" in said
    assert "evaluate 55%, 0s left" in said
    assert said.rstrip().endswith("evaluate 100%, 0s left")


def test_a_stage_within_another_has_an_eta_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.monotonic", lambda: 160.0)
    assert [share_and_time_left(share, 100.0) for share in (0.0, 0.25, 1.0)] == [
        "0%",
        "25%, 3m00s left",
        "100%, 0s left",
    ]


@pytest.mark.usefixtures("log_to_stderr")
def test_a_line_says_how_much_time_has_passed_and_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = ProgressBar("train", 20, 4)
    clock[0] += 16
    progress.update(5, {"tok/s": "61"})
    assert capsys.readouterr().err == "train: 25%  16s elapsed, 4m00s left  tok/s 61\n"


def test_a_notebook_without_widgets_gets_one_line_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the functions of IPython.display that the line calls, recorded."""
    shown: list[str] = []

    class Handle:
        def update(self, content: dict[str, str], raw: bool) -> None:
            shown.append(f"replaced by {content['text/plain']}")

    def display(content: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        shown.append(content["text/plain"])
        return Handle()

    module = ModuleType("IPython.display")
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr(progress_module, "find_spec", lambda name: None)
    monkeypatch.setattr(progress_module, "error_console", lambda: Console(force_jupyter=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ProgressBar("train", 2) as progress:
            progress.update(1)
            progress.update(2)
    assert shown[0].startswith("train: 50%")
    assert shown[-1].startswith("replaced by train: 100%")


def test_durations_are_short_words() -> None:
    assert [duration(seconds) for seconds in (41.6, 185, 7620)] == ["42s", "3m05s", "2h07m"]
