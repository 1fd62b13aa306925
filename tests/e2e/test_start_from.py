"""A run that starts from another run's exported adapters begins where that one ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Launch


@pytest.fixture(scope="module")
def before(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("start") / "before"
    done = launch(f"recipe={recipe}", f"output_dir={run}")
    assert done.returncode == 0, done.stderr
    return run


def test_adapters_start_from_those_of_another_run(before: Path, recipe: Path, launch: Launch) -> None:
    """One step at a rate that moves nothing much."""
    run = before.parent / "after"
    words = [
        f"adapters.{name}.init_from={before}/adapters/{{task}}-{name}" for name in ("flora", "lora", "ia3")
    ]
    words += [f"adapters.{name}.lr=1e-7" for name in ("flora", "lora", "ia3")]
    done = launch(
        f"recipe={recipe}", f"output_dir={run}", "training.steps=1", "evaluation.interval=null", *words
    )
    assert done.returncode == 0, done.stderr
    for folder in sorted((before / "adapters").iterdir()):
        theirs = load_file(folder / "adapter_model.safetensors")
        ours = load_file(run / "adapters" / folder.name / "adapter_model.safetensors")
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)


def test_a_missing_adapter_is_an_error_before_anything_is_written(
    before: Path, recipe: Path, launch: Launch
) -> None:
    run = before.parent / "wrong"
    done = launch(
        f"recipe={recipe}", f"output_dir={run}", f"adapters.lora.init_from={before}/adapters/{{task}}-lorra"
    )
    assert done.returncode != 0
    for task in ("letters", "digits"):
        assert (
            f"adapters.lora.init_from = '{before}/adapters/{task}-lorra': is not a PEFT adapter"
            in done.stderr
        )
    assert not run.exists()
