"""Memory, time and disk: what is refused on which machine, with which setting as the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import psutil
import pytest

from flora_train.config.load import load_config
from flora_train.prerequisites.base_size import BaseSize, bytes_of_weights
from flora_train.prerequisites.findings import Findings
from flora_train.prerequisites.resources import Machine, check_disk, check_resources
from flora_train.runtime.hardware import Gpu, Gpus, find_gpus, free_host_memory
from flora_train.runtime.hub_probe import Answer, Repository
from tests.forked import ROOT

STARCODER = BaseSize(15_517_456_384)
GB = 10**9
WITHOUT_GPU = Gpus(why_none="this machine has none")


def machine(*free: float, host: float = 500.0, processes: int = 1, unknown: bool = False) -> Machine:
    """A machine with GPUs that have this much free memory (GB), or with none."""
    devices = tuple(Gpu("GPU", int(size * GB), int(size * GB)) for size in free)
    gpus = Gpus(devices, unknown=unknown) if devices or unknown else WITHOUT_GPU
    return Machine(gpus, int(host * GB), processes, processes)


def problems(machine: Machine, *words: str, base: BaseSize = STARCODER, **options: Any) -> dict[str, str]:
    """Key -> hint of what is missing for recipe=multipl_e."""
    findings = Findings()
    config = load_config(["recipe=multipl_e", *words])
    check_resources(config, base, findings, machine=machine, **{"trains": True, **options})
    return {problem.key: problem.hint for problem in findings.problems}


@pytest.mark.parametrize(
    ("gpu", "words"),
    [
        (80.0, []),
        (80.0, ["model.dtype=float32"]),
        (24.0, ["model.quantization=8bit"]),
        (12.0, ["model.quantization=4bit"]),
    ],
)
def test_a_base_that_fits_on_the_gpu_has_no_problem(gpu: float, words: list[str]) -> None:
    assert problems(machine(gpu), *words) == {}


def test_a_base_that_does_not_fit_names_the_settings_that_help() -> None:
    hint = problems(machine(24.0))["memory"]
    assert "15.5 billion parameters, which need 31.0 GB in bfloat16, and 24.0 GB are free on the GPU" in hint
    assert "model.quantization=8bit (15.5 GB)" in hint
    assert "model.fsdp=true on 2 GPUs" in hint
    assert "model.path=bigcode/starcoderbase-7b" in hint
    assert "model.dtype=bfloat16 (31.0 GB)" in problems(machine(40.0), "model.dtype=float32")["memory"]


def test_a_sharded_base_needs_a_share_of_each_gpu() -> None:
    two = machine(24.0, 24.0, processes=2)
    assert "for each process" in problems(two)["memory"]
    assert problems(two, "model.fsdp=true") == {}


def test_the_fullest_gpu_decides() -> None:
    assert "8.0 GB are free" in problems(machine(80.0, 8.0, processes=2))["memory"]
    assert problems(machine(80.0, 8.0)) == {}


def test_the_host_holds_the_base_before_it_is_moved_to_the_gpu() -> None:
    assert "the host needs 31.0 GB to load them" in problems(machine(80.0, host=16.0))["memory"]
    assert problems(machine(80.0, host=16.0), "model.quantization=8bit") == {}


def test_gpus_that_only_torch_can_describe_are_not_judged() -> None:
    assert problems(machine(unknown=True)) == {}


def test_without_a_gpu_years_of_training_are_refused_and_allowed_on_request() -> None:
    hint = problems(machine())["GPU"]
    assert hint.startswith("this machine has none, and training on ")
    assert "an estimate: 1,500 steps of 221,184 tokens, 15.5 billion parameters" in hint
    assert problems(machine(), "training.allow_slow=true") == {}
    assert problems(machine(), "training.steps=1") == {}
    assert problems(machine(), trains=False) == {}


def test_a_tiny_base_trains_on_a_cpu() -> None:
    assert problems(machine(), base=BaseSize(10**6)) == {}
    assert problems(machine(), base=BaseSize(0)) == {}


def test_quantization_without_a_gpu_is_one_problem() -> None:
    hints = problems(machine(), "model.quantization=8bit", base=BaseSize(10**6))
    assert list(hints) == ["model.quantization"]
    assert hints["model.quantization"].startswith("needs a CUDA GPU, and this run is on cpu")


def test_only_what_is_downloaded_needs_room() -> None:
    rows = Repository("dataset", "a/b", file="data/d/", with_sizes=True)
    answers = {rows: Answer("ok", files={"data/d/a.parquet": 10**18, "data/lua/a.parquet": 10**18})}
    findings = Findings()
    check_disk(answers, BaseSize(1), findings)
    (problem,) = findings.problems
    assert problem.hint.startswith("1000000000.0 GB would be downloaded into ")
    few = Findings()
    check_disk({rows: Answer("ok", files={"data/lua/a.parquet": 10**18})}, BaseSize(1, 10), few)
    assert few.problems == []


def test_weights_are_counted_once_where_a_repository_has_two_formats() -> None:
    files = {
        "model-1.safetensors": 3,
        "model-2.safetensors": 4,
        "pytorch_model.bin": 7,
        "tf/x.safetensors": 9,
    }
    assert bytes_of_weights(files) == 7
    assert bytes_of_weights({"pytorch_model-1.bin": 5, "README.md": 2}) == 5
    assert bytes_of_weights({}) == 0
    duplicates = {"consolidated.safetensors": 9, "model.fp32-00001-of-00002.safetensors": 8, "adapter.bin": 4}
    shards = {"model-00001-of-00002.safetensors": 2, "model-00002-of-00002.safetensors": 3}
    index = {"model.safetensors.index.json": 1, "pytorch_model.bin": 20}
    assert bytes_of_weights({**duplicates, **shards, **index}) == 5
    assert bytes_of_weights({**duplicates, **shards, **index, "model.safetensors": 6}) == 6
    assert bytes_of_weights({"training_args.bin": 4, "pytorch_model.bin": 20}) == 20
    assert bytes_of_weights({"a.safetensors": 3, "model.safetensors.index.json": 1}) == 3


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("ACCELERATE_USE_CPU", "true", "ACCELERATE_USE_CPU is set"),
        ("CUDA_VISIBLE_DEVICES", "", "CUDA_VISIBLE_DEVICES hides them"),
    ],
)
def test_hidden_gpus_are_none(
    variable: str, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setenv(variable, value)
    assert find_gpus() == Gpus(why_none=reason)


def test_the_gpus_are_those_that_torch_sees() -> None:
    program = "import torch; print(torch.cuda.device_count())"
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    ours = "from flora_train.runtime.hardware import find_gpus; print(len(find_gpus().devices))"
    counted = subprocess.run(
        [sys.executable, "-c", ours], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert counted.stdout == found.stdout


def test_free_memory_is_at_most_that_of_the_machine() -> None:
    everything = psutil.virtual_memory().total + psutil.swap_memory().total
    assert 0 < free_host_memory() <= everything
