"""Log lines: silent in a library call until configured, plain lines for people, one process of a run."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flora_train
from flora_train.runtime.logging import LIBRARY, init_logging, stop_logging
from flora_train.runtime.progress import ProgressBar
from tests.conftest import spec
from tests.unit.training.harness import make_trainer

ROOT = Path(__file__).resolve().parents[3]
logger = logging.getLogger(f"{LIBRARY}.part")


def train_two_steps(folder: Path) -> None:
    make_trainer([spec("ia3", "a")], folder, steps=2, tokens_per_microbatch=64).train()


def test_library_is_silent_until_logging_is_configured(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import flora_train, logging; logging.getLogger('flora_train.part').error('one line')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    train_two_steps(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_init_logging_prints_training_lines_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flora_train.init_logging()
    flora_train.init_logging()
    train_two_steps(tmp_path)
    stop_logging()
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("train: ") for line in lines)
    assert len(lines) == len(set(lines))


def test_notes_alone_are_printed_at_level_warning(capsys: pytest.CaptureFixture[str]) -> None:
    init_logging("WARNING")
    logger.info("two adapters")
    logger.warning("one clip is too long")
    stop_logging()
    logger.warning("nobody listens")
    assert capsys.readouterr().err == "note: one clip is too long\n"


def test_lines_can_be_redirected_and_carry_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    parent = logging.getLogger(LIBRARY)
    parent.addHandler(handler)
    parent.setLevel(logging.INFO)
    train_two_steps(tmp_path)
    parent.removeHandler(handler)
    parent.setLevel(logging.NOTSET)
    assert re.search(
        r"^\d{4}-\d\d-\d\d .* flora_train\.runtime\.progress train: ", text.getvalue(), re.MULTILINE
    )
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("log_to_stderr")
@pytest.mark.parametrize(("rank", "lines"), [("0", "here\n"), ("1", "")])
def test_only_the_main_process_prints(
    rank: str, lines: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    logger.info("here")
    assert capsys.readouterr().err == lines


def on_terminal(program: str) -> str:
    """Everything that a program writes to a terminal of 40 columns as its standard error."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": "40", "TERM": "xterm"}
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stderr=theirs, env=environment)
    os.close(theirs)
    content = b""
    try:
        while part := os.read(ours, 65536):
            content += part
    except OSError:  # the terminal's other end is closed
        pass
    assert child.wait(60) == 0
    os.close(ours)
    return content.decode()


def test_a_terminal_shows_a_line_whole_above_the_bar_and_obeys_nothing_in_it() -> None:
    program = """
import logging
from flora_train.runtime.logging import init_logging
from flora_train.runtime.progress import ProgressBar
init_logging()
with ProgressBar("train", 2) as bar:
    bar.update(1)
    logging.getLogger("flora_train.part").warning("[bold]a file\\x1b]0;x\\x07 " + "long " * 12 + "name")
    bar.update(2)
"""
    shown = on_terminal(program)
    line = next(line for line in shown.splitlines() if "a file" in line)
    assert "[bold]a file\\x1b]0;x\\x07 " + "long " * 12 + "name" in line
    assert "\x07" not in shown
    assert shown.index("a file") < shown.rindex("100%")


def test_a_raised_level_hides_the_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with ProgressBar("train", 2) as shown:
        assert shown._display is not None
    monkeypatch.setattr(logging.getLogger(LIBRARY), "level", logging.ERROR)
    with ProgressBar("train", 2) as hidden:
        assert hidden._display is None
