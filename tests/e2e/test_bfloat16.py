"""A base in bfloat16, the default on GPUs and CPUs that multiply it fast, from training to export.

`model.dtype=bfloat16` is what `auto` is there; the recipes of the other end-to-end tests name float32."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flora_train.runtime.signals import SAVED
from tests.e2e.conftest import Launch, launch_environment
from tests.e2e.test_export import logits_of
from tests.e2e.test_resume import WORDS, wait_for_a_checkpoint
from tests.e2e.test_run import ADAPTERS, adapter_bytes
from tests.e2e.test_speech import report_of, speech_recipe, transcripts_of
from tests.forked import Forked, python

__all__ = ["speech_recipe"]  # a fixture

IN_BFLOAT16 = "model.dtype=bfloat16"


@pytest.fixture(scope="module")
def finished(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    done = launch(f"recipe={recipe}", IN_BFLOAT16, *WORDS, f"output_dir={folder}")
    assert done.returncode == 0, done.stderr
    assert "base in bfloat16" in done.stderr
    return folder


def losses_of(report: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["loss"] for result in report["results"] for row in result["contenders"]}


def test_a_run_in_bfloat16_learns_and_keeps_its_adapters_in_float32(finished: Path) -> None:
    report = report_of(finished)
    assert report["facts"]["dtype"] == "bfloat16"
    for result in report["results"]:
        assert all(contender["difference_to_base"]["high"] < 0 for contender in result["contenders"])
    for name in ADAPTERS:
        tensors = load_file(finished / "adapters" / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_a_run_in_bfloat16_that_is_stopped_resumes_to_the_same_bytes(
    finished: Path, recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    words = (f"recipe={recipe}", IN_BFLOAT16, *WORDS, f"output_dir={tmp_path / 'parts'}", "resume=true")
    begun = Forked(["train.py", *words], launch_environment(tmp_path / "cache"))
    wait_for_a_checkpoint(tmp_path / "parts", 20, begun.poll)
    os.kill(begun.pid, signal.SIGTERM)
    assert begun.wait(60).returncode == SAVED
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stderr
    assert adapter_bytes(tmp_path / "parts") == adapter_bytes(finished)


def test_every_command_reads_a_run_in_bfloat16(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    before, losses = adapter_bytes(finished), losses_of(report_of(finished))
    for words in (
        ("evaluate",),
        ("report",),
        ("export",),
        ("export", "digits-lora", "--as", "lora-svd", "--rank", "4"),
    ):
        done = python("-m", "flora_train", words[0], str(finished), *words[1:])
        assert done.returncode == 0, (words, done.stderr)
    assert adapter_bytes(finished) == before
    assert losses_of(report_of(finished)) == losses
    done = python(
        "-m", "flora_train", "export", str(finished), "digits-flora", "--as", "merged", "--out", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    merged, adapted = (
        logits_of(tmp_path / "digits-flora"),
        logits_of(checkpoint, finished / "adapters" / "digits-flora"),
    )
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-5)  # both in float32
    assert (merged - logits_of(checkpoint)).abs().max() > 0.01
    half: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    adapter = PeftModel.from_pretrained(half, finished / "adapters" / "digits-flora").eval()
    with torch.no_grad():
        theirs = adapter(torch.arange(3, 19)[None]).logits.float()
    assert (theirs - adapted).norm() <= 3e-2 * adapted.norm()


def test_plan_in_bfloat16_halves_the_base(recipe: Path, tmp_path: Path) -> None:
    sizes = []
    for dtype in ("float32", "bfloat16"):
        done = python(
            "-m",
            "flora_train",
            "plan",
            f"recipe={recipe}",
            f"model.dtype={dtype}",
            f"output_dir={tmp_path / 'run'}",
        )
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("device")]
        sizes.append(float(line.partition("base ")[2].split()[0]))
    assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.02)


def test_speech_in_bfloat16_is_trained_and_transcribed(
    speech_recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    done = launch(
        f"recipe={speech_recipe}", IN_BFLOAT16, f"output_dir={run}", "training.steps=2", "audio.workers=0"
    )
    assert done.returncode == 0, done.stderr
    texts, losses = transcripts_of(run), losses_of(report_of(run))
    assert all(loss == loss for loss in losses.values())
    done = python("-m", "flora_train", "evaluate", str(run))
    assert done.returncode == 0, done.stderr
    assert transcripts_of(run) == texts
    assert losses_of(report_of(run)) == losses
    assert json.loads((run / "run.json").read_text())["training"]["dtype"] == "bfloat16"
