"""A run and its terminal: a broken pipe, an ASCII encoding, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.conftest import Launch, launch_environment
from tests.e2e.test_speech import speech_recipe
from tests.forked import ROOT, Forked, python

__all__ = ["speech_recipe"]  # a fixture

MAIN = "import sys; from flora_train.__main__ import start; start({words!r})"
NO_READER = """
import os
read, write = os.pipe()
os.close(read)
for number in {numbers}:
    os.dup2(write, number)
os.close(write)
"""
ASCII = "import sys; sys.stdout.reconfigure(encoding='ascii', errors='strict')\n"


@pytest.fixture(scope="module")
def finished(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", "training.steps=4")
    assert done.returncode == 0, done.stderr
    return folder


def test_run_with_broken_pipes_trains_to_its_end(recipe: Path, tmp_path: Path) -> None:
    words = ["train", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", "training.steps=4"]
    done = python(
        "-c",
        NO_READER.format(numbers=(1, 2)) + MAIN.format(words=words),
        environment=launch_environment(tmp_path),
    )
    assert done.returncode == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"]


@pytest.mark.parametrize("command", ["report", "evaluate", "export"])
def test_broken_pipe_ends_a_command_quietly(command: str, finished: Path, tmp_path: Path) -> None:
    program = NO_READER.format(numbers=(1,)) + MAIN.format(words=[command, str(finished)])
    done = python("-c", program, environment=launch_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize(
    "words", [["recipes"], ["--help"], ["train", "--help"], ["nothing"], ["train", "recipe=nothing"]]
)
def test_head_may_leave_early(words: list[str]) -> None:
    """Two real pipes, and a reader of one line of neither."""
    command = [sys.executable, "-m", "flora_train", *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        said = process.stderr.read().decode() if process.stderr else ""
    assert process.returncode == (2 if "nothing" in words[-1] else 0)
    assert said.count("\n") == (1 if process.returncode else 0)
    assert "Traceback" not in said


def test_output_that_a_full_disk_swallows_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "flora_train", "recipes"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: standard output: could not be written (No space left on device)\n"


@pytest.mark.parametrize(
    "words",
    [["report", "{run}"], ["evaluate", "{run}"], ["report", "{run}", "{run}"], ["plan", "recipe={run}"]],
)
def test_an_ascii_terminal_ends_no_command(words: list[str], finished: Path, tmp_path: Path) -> None:
    words = [word.format(run=finished) for word in words]
    if words[0] == "plan":
        words.append(f"output_dir={tmp_path / 'other'}")
    done = python("-c", ASCII + MAIN.format(words=words), environment=launch_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii()
    assert done.stdout


def test_a_run_at_an_ascii_terminal_ends_well(recipe: Path, tmp_path: Path) -> None:
    words = ["train", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", "training.steps=2"]
    prompts = 'tasks.letters.sample_prompts=["é\\e[31m[/red]"]'
    done = python(
        "-c", ASCII + MAIN.format(words=[*words, prompts]), environment=launch_environment(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "\\xe9\\x1b[31m[/red]" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr


def interrupted(process: Forked) -> subprocess.CompletedProcess[str]:
    """Press Ctrl-C: every process of the terminal's group gets the signal."""
    children = psutil.Process(process.pid).children(recursive=True)
    for one in (psutil.Process(process.pid), *children):
        one.send_signal(signal.SIGINT)
    done = process.wait(60)
    psutil.wait_procs(children, timeout=20)
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return done


STAGES = {"first words": "", "training": "train: ", "evaluation": "evaluate: "}


def test_ctrl_c_while_clips_are_read_is_one_line_and_leaves_no_process(
    speech_recipe: Path, tmp_path: Path
) -> None:
    words = ["train.py", f"recipe={speech_recipe}", f"output_dir={tmp_path / 'run'}", "audio.workers=2"]
    begun = Forked(words, launch_environment(tmp_path))
    patience = time.monotonic() + 60
    while len(psutil.Process(begun.pid).children(recursive=True)) < 2:
        assert begun.poll() is None, begun.said()
        assert time.monotonic() < patience
        time.sleep(0.005)
    done = interrupted(begun)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted: files that were written are complete"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize(
    "stage",
    ["load_tokenizer", "load_tasks", "load_base_model", "heldout_losses", "write_report", "export_peft"],
)
@pytest.mark.quick("load_tasks", "heldout_losses", "write_report")
def test_ctrl_c_at_any_stage_is_one_line(stage: str, recipe: Path, tmp_path: Path) -> None:
    """The signal comes when the stage begins; what a run has written by then is whole."""
    at = {"load_tokenizer": "run_context", "load_tasks": "run_context", "load_base_model": "run_context"}.get(
        stage, "final_evaluation"
    )
    program = f"""
import signal, sys
import flora_train.{at} as module
def stopped(*args, **kwargs):
    signal.raise_signal(signal.SIGINT)
module.{stage} = stopped
"""
    words = ["train", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", "training.steps=2"]
    done = python("-c", program + MAIN.format(words=words), environment=launch_environment(tmp_path))
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted: files that were written are complete"
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("*.tmp"))
    if at == "final_evaluation":
        again = python("train.py", *words[1:], "resume=true", environment=launch_environment(tmp_path))
        assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("answer", ["raise ImportError('numpy failed')", "raise RuntimeError('x')"])
def test_ctrl_c_that_a_library_makes_an_error_of_is_still_ctrl_c(answer: str, tmp_path: Path) -> None:
    program = f"""
import signal
import flora_train.config.load as module
def shipped(kind):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        {answer}
module.shipped = shipped
"""
    done = python("-c", program + MAIN.format(words=["recipes"]), environment=dict(os.environ))
    assert done.returncode == 130
    assert done.stderr == "interrupted: files that were written are complete\n"


@pytest.mark.parametrize("closed", [(1,), (2,), (1, 2)])
def test_a_command_without_output_ends_quietly(closed: tuple[int, ...]) -> None:
    streams = " ".join(f"{number}>&-" for number in closed)
    done = subprocess.run(
        f"{sys.executable} -m flora_train recipes {streams}",
        shell=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_ctrl_c_while_the_process_ends_shows_no_traceback() -> None:
    late = "import atexit, os, signal, sys; atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); "
    program = f"{late}from flora_train.__main__ import start; start(['recipes'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT
    assert done.stderr == ""
    assert "quickstart" in done.stdout
