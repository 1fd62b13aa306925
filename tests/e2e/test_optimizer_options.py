"""Whole runs with LoRA+, NEFTune noise, averages and several seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flora_train.evaluation.report.files import read_report
from flora_train.runtime.run_folder import RunFolder
from tests.e2e.conftest import Launch

OPTIONS = [
    "adapters.lora.seed=[0,1]",
    "adapters.lora.lr_ratio=4",
    "adapters.lora.lr=0.02",
    "adapters.lora.neftune_noise_alpha=5",
    "adapters.lora.ema_decay=0.7",
    "adapters.flora.lr_ratio=0.5",
    "adapters.flora.ema_decay=0.9",
    "adapters.ia3.neftune_noise_alpha=2",
]
ADAPTERS = ["flora", "lora_seed0", "lora_seed1", "ia3"]
APART = ["model.fsdp=true", "adapters.device_slots=7", "model.gradient_checkpointing=non_reentrant"]


@pytest.fixture(scope="module")
def whole(launch: Launch, recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options") / "whole"
    done = launch(f"recipe={recipe}", f"output_dir={folder}", *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "lora: seeds 0, 1" in done.stdout
    return folder


def test_the_report_has_means_over_seeds(whole: Path) -> None:
    report = read_report(RunFolder(whole))
    for result in report.results:
        assert [row.family for row in result.contenders] == ADAPTERS
        (mean,) = result.over_seeds
        assert mean.family == "lora"
        assert mean.bits_per_byte.deviation is not None
        assert mean.bits_per_byte.deviation > 0
        seeds = [result.by_family[f"lora_seed{seed}"].bits_per_byte.value for seed in (0, 1)]
        assert None not in seeds
        assert mean.bits_per_byte.value == pytest.approx(sum(seeds) / 2)  # type: ignore[arg-type]
    assert "±" in (whole / "eval" / "report.html").read_text()
    card = (whole / "adapters" / "letters-lora_seed1" / "README.md").read_text()
    assert "lora, mean over seeds" in card
    assert (
        "; learning rate of B x 4.0 (LoRA+); NEFTune noise 5.0; average of the weights with decay 0.7" in card
    )


def test_what_is_exported_is_the_average(whole: Path) -> None:
    """The folders hold the numbers of the best adapters' files, which were saved in evaluations."""
    for task in ("letters", "digits"):
        for name in ("flora", "lora_seed0"):
            best = load_file(RunFolder(whole).best_adapters / f"{task}-{name}.safetensors")
            exported = load_file(whole / "adapters" / f"{task}-{name}" / "adapter_model.safetensors")
            ours = sorted(float(tensor.double().norm()) for tensor in best.values())
            theirs = sorted(float(tensor.double().norm()) for tensor in exported.values())
            assert ours == pytest.approx(theirs, rel=1e-6)


def test_two_processes_equal_one_to_1e_6(whole: Path, launch: Launch, recipe: Path, tmp_path: Path) -> None:
    """Also with a base that is divided, adapters on the host, and activations that are recomputed."""
    done = launch(f"recipe={recipe}", f"output_dir={tmp_path / 'two'}", *OPTIONS, *APART, processes=2)
    assert done.returncode == 0, done.stderr
    for task in ("letters", "digits"):
        for family in ADAPTERS:
            file = Path("adapters", f"{task}-{family}", "adapter_model.safetensors")
            one, two = load_file(whole / file), load_file(tmp_path / "two" / file)
            for name, tensor in one.items():
                assert (two[name] - tensor).abs().max() <= 1e-6, (task, family, name)


def test_a_seed_alone_is_the_seed_of_the_list(
    whole: Path, launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    alone = [option for option in OPTIONS if not option.startswith("adapters.lora.seed")]
    done = launch(
        f"recipe={recipe}",
        f"output_dir={tmp_path / 'alone'}",
        *alone,
        "adapters.lora.seed=1",
        "training.tokens_per_step=75",
    )
    assert done.returncode == 0, done.stderr
    for task in ("letters", "digits"):
        listed = load_file(whole / "adapters" / f"{task}-lora_seed1" / "adapter_model.safetensors")
        single = load_file(tmp_path / "alone" / "adapters" / f"{task}-lora" / "adapter_model.safetensors")
        for name, tensor in listed.items():
            torch.testing.assert_close(single[name], tensor, rtol=0, atol=1e-4)


def test_evaluations_are_of_averages(whole: Path) -> None:
    """The last evaluation during training, of all held-out examples, is that of the exported adapters."""
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "evaluation"][-1]["adapters"]
    report = read_report(RunFolder(whole))
    selected = {adapter.name: adapter.selected_step for adapter in report.adapters}
    compared = 0
    for result in report.results:
        for row in result.contenders:
            if selected[row.name] == 12:
                assert row.loss == pytest.approx(last[row.name]["loss"], rel=1e-6)
                compared += 1
    assert compared
