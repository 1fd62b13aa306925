"""Resuming with any damaged file: the run ends as undisturbed, or refuses before its first step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from flora_train.config.errors import UserError
from flora_train.training.best_adapters import adapter_file, verified_step
from flora_train.training.trainer import Trainer
from tests.conftest import at_most, spec
from tests.unit.training.harness import make_trainer
from tests.unit.training.test_checkpoint import assert_equal, result, stop_before

STOP = 8


def trainer_in(folder: Path) -> Trainer:
    """Two adapters, evaluated every second step, saved after steps 3 and 6."""
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {
        "steps": 10,
        "save_every": 3,
        "log_every": 1,
        "optimizer": "adamw",
        "tokens_per_step": 60,
    }
    return make_trainer(
        [spec("lora", "a", rank=2, lr=0.3), spec("ia3", "b", lr=0.3)], folder, interval=2, **settings
    )


@pytest.fixture(scope="module")
def preserved_state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    trainer = trainer_in(tmp_path_factory.mktemp("damage") / "whole")
    trainer.train()
    return result(trainer)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "parts"
    stop_before(trainer_in(folder), STOP)
    return folder


def resumed(folder: Path, preserved_state: dict[str, Any]) -> str:
    """Go on; returns what a user was told before the first step, or "" after a whole run."""
    trainer = trainer_in(folder)
    try:
        trainer.resume()
    except UserError as error:
        return str(error)
    trainer.train()
    assert_equal(result(trainer), dict(preserved_state))
    return ""


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.attack
@at_most(8)
@given(data=st.data())
def test_resume_with_any_damaged_file_ends_as_undisturbed_or_refuses_at_once(
    data: st.DataObject,
    stopped: Path,
    preserved_state: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("run") / "parts"
    shutil.copytree(stopped, folder)
    file = data.draw(st.sampled_from(files(folder)), label="file")
    content = bytearray(file.read_bytes())
    place = data.draw(
        st.integers(0, len(content) - 1) | st.integers(0, min(400, len(content) - 1)), label="place"
    )
    how = data.draw(st.sampled_from(["flip", "cut", "zeros", "gone"]), label="how")
    if how == "flip":
        content[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    elif how == "cut":
        del content[place:]
    elif how == "zeros":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    file.write_bytes(content)
    if how == "gone":
        file.unlink()
    resumed(folder, preserved_state)
    shutil.rmtree(folder.parent)


def copy_of(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "parts"))


def flip(path: Path, word: bytes) -> None:
    content = path.read_bytes()
    place = content.index(word)
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])


@pytest.mark.parametrize(
    "word", [b'"facts"', b'"facts_sha256"', b'"sha256"', b"__metadata__", b"data_offsets", b'"F32"']
)
@pytest.mark.usefixtures("log_to_stderr")
def test_checkpoint_with_a_damaged_word_in_its_header_is_passed_over(
    stopped: Path,
    preserved_state: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    word: bytes,
) -> None:
    folder = copy_of(stopped, tmp_path)
    content = (last := folder / "checkpoints" / "step-00000006.safetensors").read_bytes()
    last.write_bytes(content.replace(word, word[:2] + bytes([word[2] ^ 1]) + word[3:], 1))
    assert resumed(folder, preserved_state) == ""
    assert "resuming after step 3" in capsys.readouterr().err


@pytest.mark.usefixtures("log_to_stderr")
def test_damaged_metrics_after_a_checkpoint_resume_from_that_checkpoint(
    stopped: Path, preserved_state: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(stopped, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    late = next(i for i, line in enumerate(lines) if json.loads(line)["step"] == 5)
    lines[late] = lines[late].replace("5", "4", 1)
    (folder / "metrics.jsonl").write_text("".join(lines))
    assert resumed(folder, preserved_state) == ""
    assert "resuming after step 3" in capsys.readouterr().err


def test_damaged_metrics_that_every_checkpoint_needs_are_refused_before_training(
    stopped: Path, preserved_state: dict[str, Any], tmp_path: Path
) -> None:
    folder = copy_of(stopped, tmp_path)
    flip(folder / "metrics.jsonl", b'"step"')
    before = {path: path.read_bytes() for path in files(folder)}
    told = resumed(folder, preserved_state)
    assert (
        "metrics.jsonl: is damaged, cut short or missing, and every checkpoint needs it: "
        "put it back from a copy"
    ) in told
    assert {path: path.read_bytes() for path in files(folder)} == before


def test_a_damaged_kept_adapter_is_computed_again_or_refused_before_training(
    stopped: Path, preserved_state: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a-lora", "b-ia3"):
        folder = copy_of(stopped, tmp_path / name)
        path = adapter_file(folder / "checkpoints" / "best", name)
        with safe_open(path, framework="pt") as file:
            step = json.loads(file.metadata()["facts"])["step"]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert verified_step(folder / "checkpoints" / "best", name) is None
        told = resumed(folder, preserved_state)
        assert told == "" or (
            f"{path}: is damaged or missing" in told and "put it back from a copy" in told
        ), step
