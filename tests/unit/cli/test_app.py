"""The command line: help, version, exit statuses, and one line with a suggestion for every wrong argument."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flora_train import __version__
from flora_train.cli import main
from flora_train.cli.app import COMMANDS, check_arguments
from flora_train.config.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line that a wrong command line prints."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("error: ")


def test_help_lists_every_command_and_imports_nothing_slow() -> None:
    program = (
        "import sys; from flora_train.cli import main; main(['--help']); main(['export', '--help']);"
        "slow = {'torch', 'transformers', 'numpy', 'rich', 'matplotlib'} & set(sys.modules);"
        "sys.exit(str(slow) if slow else 0)"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5  # 0.2 s on an idle machine
    for command in COMMANDS:
        assert re.search(rf"^  {command}  ", done.stdout, re.MULTILINE), command


def test_no_arguments_and_the_word_help_show_help(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["help"], ["-h"], ["--help"]):
        assert main(argv) == 0
        assert "Commands:" in capsys.readouterr().out
    for argv in (["help", "export"], ["export", "a", "-h"]):
        assert main(argv) == 0
        assert "--max-error X" in capsys.readouterr().out


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flora-train {__version__}\n"


def test_every_option_that_the_commands_share_is_in_each_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        "push": [
            "--repo",
            "--repo-per-adapter",
            "--base",
            "--public",
            "--dry-run",
            "--pause",
            "--allow-different-base",
        ],
        "execute": [
            "--prompts",
            "--languages",
            "--pass-at-k",
            "--sandbox",
            "--workers",
            "--cpu-seconds",
            "--out",
        ],
        "init": ["--model", "--out", "--language", "--name"],
        "solve": ["--languages", "--contenders", "--multipl-e", "--out", "--allow-different-base"],
        "evaluate": ["--allow-different-base", "--allow-different-data"],
        "report": ["--out", "--table"],
        "export": [
            "--as",
            "--rank",
            "--max-error",
            "--out",
            "--allow-different-base",
            "--allow-different-data",
        ],
        "convert": ["--out", "--rank", "--model"],
        "data": ["--task", "--examples", "--full"],
        "chat": [
            "--system",
            "--temperature",
            "--top-p",
            "--max-new-tokens",
            "--seed",
            "--chat-template",
            "--plain",
            "--allow-different-base",
        ],
    }
    for command, options in expected.items():
        assert main([command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert [option for option in options if f"  {option} " not in shown] == [], command


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("exprot", r"no command 'exprot': there are .* Did you mean 'export'\?"),
        ("--versoin", r"--versoin: unknown option; .* Did you mean '--version'\?"),
        ("export r --rnk 1", r"--rnk: unknown option; .* Did you mean '--rank'\?"),
        ("export r --max_error 0.1", r"--max_error: unknown option; .* Did you mean '--max-error'\?"),
        ("export r --rank x", "--rank: must be a whole number"),
        ("export r --max-error x", "--max-error: must be a number"),
        ("export r --rank", "--rank: .*needs a value|--rank: requires an argument"),
        ("export r --rank --out x", "--rank: needs a value: --rank VALUE"),
        ("export r --as lora_svd", r"as = 'lora_svd': must be .* Did you mean 'lora-svd'\?"),
        ("export r --rank 0 --as lora-svd", "rank = 0: must be at least 1"),
        ("export r --rank 4", "rank = 4: has no meaning for --as peft: it is for --as lora-svd"),
        ("push r --repo a/b --dry-run=1", "--dry-run: does not take a value"),
        ("push r", "--repo: is required; usage: flora-train push RUN .*"),
        ("push r --repo a/b --pause -1", "pause = -1.0: must be at least 0"),
        ("recipes all", r".*unexpected extra argument.*\(all\)"),
        ("execute c prompts=FOLDER", r"prompts = 'FOLDER': .* Did you mean '--prompts FOLDER'\?"),
        ("execute c k=[1,10]", r"k = '\[1,10\]': .* Did you mean '--pass-at-k 1,10'\?"),
        ("execute c --k 1,10", r"--k: unknown option; .* Did you mean '--pass-at-k'\?"),
        ("solve r languages=[lua]", r"languages = '\[lua\]': .* Did you mean '--languages lua'\?"),
        ("solve r k=[1]", r"k = '\[1\]': unknown key. Did you mean 'evaluation.pass_at_k=\[1\]'\?"),
        ("solve r --n 5", "--n: keys of the recipe are written key=value: evaluation.num_samples=VALUE"),
        ("push r dry_run=true --repo a/b", r"dry_run = 'true': .* Did you mean '--dry-run'\?"),
        (
            "train recipe=quickstart --training.steps 5",
            "--training.steps 5: options are written key=value: training.steps=5",
        ),
        ("plan -m", "-m: is Hydra syntax: .*"),
    ],
)
def test_wrong_arguments_are_one_line_with_a_suggestion(
    argv: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.fullmatch(line, error_of(capsys, *argv.split()))


def test_command_without_its_required_argument_shows_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (
        ["export", "--as", "merged"],
        ["push", "--repo", "a/b"],
        ["report", "--out", "x.html"],
        ["evaluate"],
    ):
        assert re.match("RUN.*: is required; usage: flora-train", error_of(capsys, *argv))
    for command in ("evaluate", "solve", "execute", "export", "convert", "push", "report", "init"):
        assert f"is required; usage: flora-train {command} " in error_of(capsys, command)


def test_arguments_that_are_not_utf8_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not valid UTF-8 text" in error_of(capsys, "evaluate", "outputs/\udce9")


def test_check_arguments_runs_nothing() -> None:
    check_arguments(["export", "outputs/nowhere", "--as", "merged"])
    with pytest.raises(UserError, match="unknown option"):
        check_arguments(["export", "outputs/nowhere", "--nothing"])


@pytest.mark.parametrize(
    ("words", "completed"),
    [("flora-train ex", "execute\nexport\n"), ("flora-train push --dr", "--dry-run\n")],
)
def test_shells_complete_commands_and_options(words: str, completed: str) -> None:
    asked = {
        "_FLORA_TRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "flora_train"],
        cwd=ROOT,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
    )
    assert done.stdout == completed, done.stderr
