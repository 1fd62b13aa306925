"""Whether memory, disk and time suffice: GPUs, host memory, the hub's cache, and estimates for CPUs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage

from flora_train.config.model_schema import ModelConfig
from flora_train.config.published_models import published_model, published_models
from flora_train.config.schema import RunConfig
from flora_train.prerequisites.base_size import BaseSize
from flora_train.prerequisites.findings import Findings
from flora_train.runtime.hardware import (
    Gpus,
    cpu_rate,
    find_gpus,
    free_host_memory,
    multiplies_bfloat16_fast,
    usable_cores,
)
from flora_train.runtime.hub_probe import Answer, Repository

VALUE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5}
"""Number format -> bytes of a value."""
PASSES = 4
"""Operations per parameter and token: 2 forward, and 2 backward through a frozen base."""
SPEECH_PASSES = 2
"""The same for an encoder-decoder: a position passes one half of it."""
MOST_DAYS = 30.0
"""Days of training on a CPU that are accepted without training.allow_slow."""
DAY = 86_400.0
ROOM = 0.8
"""Share of the free memory that a suggested base may fill."""
LARGE = 1e9
"""Parameters of a base that is described in billions."""


@dataclass(frozen=True)
class Machine:
    """What a run has on this machine."""

    gpus: Gpus
    free_host: int
    """Bytes."""
    local_processes: int
    processes: int

    @staticmethod
    def measure() -> Machine:
        return Machine(find_gpus(), free_host_memory(), *process_counts())

    @property
    def on_cpu(self) -> bool:
        return not self.gpus.devices and not self.gpus.unknown

    @property
    def free_device(self) -> int | None:
        """Free bytes for one process where the base is: on the fullest of the GPUs, or on the host. None:
        unknown."""
        if self.gpus.unknown:
            return None
        if self.gpus.devices:
            return min(gpu.free for gpu in self.gpus.devices[: self.local_processes])
        return self.free_host // self.local_processes


def process_counts() -> tuple[int, int]:
    """Processes of the run on this machine, and on all machines."""
    local = _count("LOCAL_WORLD_SIZE", 1)
    return local, _count("WORLD_SIZE", local)


def _count(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    return max(1, int(text)) if text.isdecimal() else default


def check_resources(
    config: RunConfig, base: BaseSize, findings: Findings, *, trains: bool, machine: Machine | None = None
) -> None:
    """Add a problem where the base does not fit, or training would not end in a reasonable time."""
    machine = machine or Machine.measure()
    if machine.on_cpu and config.model.quantization != "none":
        advice = "leave it at none (model.dtype=bfloat16 halves the base)"
        hint = f"needs a CUDA GPU, and this run is on cpu: {advice}"
        findings.add("model.quantization", config.model.quantization, hint)
    if not base.parameters:
        return
    _check_memory(config.model, base, machine, findings)
    if trains and machine.on_cpu:
        _check_days(config, base, machine, findings)


def _check_memory(model: ModelConfig, base: BaseSize, machine: Machine, findings: Findings) -> None:
    free = machine.free_device
    if free is None:
        return
    number_format = _number_format(model, machine)
    shards = machine.processes if model.fsdp else 1
    needed = base.parameters * VALUE_BYTES[number_format] / shards
    where = "on the GPU" if machine.gpus.devices else "in memory"
    each = " for each process" if machine.local_processes > 1 else ""
    size = f"{model.path} has {_parameters(base.parameters)} parameters"
    row = f"the base needs {_gb(needed)} in {number_format}; {_gb(free)} are free {where}{each}"
    findings.rows.append(("base size", row))
    if needed > free:
        help_text = _help_for_memory(model, base, machine)
        hint = (
            f"{size}, which need {_gb(needed)} in {number_format}{each}, and {_gb(free)} are free {where}: "
            f"{help_text}"
        )
        findings.add("memory", None, hint, suggests_smaller=True)
        return
    # the weights are read into host memory before they are moved to the GPU
    loaded = base.parameters * VALUE_BYTES[number_format] * machine.local_processes
    if machine.gpus.devices and model.quantization == "none" and loaded > machine.free_host:
        hint = (
            f"{size}, and the host needs {_gb(loaded)} to load them before they are moved to the GPU; "
            f"{_gb(machine.free_host)} are free: model.quantization=8bit loads them without that copy, or "
            "choose a machine with more memory"
        )
        findings.add("memory", None, hint, suggests_smaller=True)


def _number_format(model: ModelConfig, machine: Machine) -> str:
    """float32, bfloat16, 8bit or 4bit: how the base is kept. `auto` is taken as the smaller one where the
    device may multiply it fast."""
    if model.quantization != "none" and not machine.on_cpu:
        return model.quantization
    if model.dtype != "auto":
        return model.dtype
    if machine.on_cpu and not multiplies_bfloat16_fast():
        return "float32"
    return "bfloat16"


def _help_for_memory(model: ModelConfig, base: BaseSize, machine: Machine) -> str:
    """The settings that make the base fit, else the machine that is needed."""
    free = machine.free_device or 0
    number_format = _number_format(model, machine)
    ways = []
    formats = {"bfloat16": "model.dtype=bfloat16"}
    if machine.gpus.devices:
        formats |= {"8bit": "model.quantization=8bit", "4bit": "model.quantization=4bit"}
    for name, setting in formats.items():
        size = base.parameters * VALUE_BYTES[name]
        if VALUE_BYTES[name] < VALUE_BYTES[number_format] and size < ROOM * free:
            ways.append(f"{setting} ({_gb(size)})")
            break
    if machine.gpus.devices and not model.fsdp and model.quantization == "none":
        count = -(-int(base.parameters * VALUE_BYTES[number_format]) // max(1, int(ROOM * free)))
        ways.append(f"model.fsdp=true on {count} GPUs")
    smaller = _smaller_base(model, VALUE_BYTES[number_format], ROOM * free)
    if smaller is not None:
        ways.append(f"model.path={smaller}")
    if machine.on_cpu:
        ways.append(f"a GPU with more than {_gb(base.parameters * VALUE_BYTES['bfloat16'])}")
        ways.append("half of that with model.quantization=8bit (flora-train plan shows both)")
    return ", or ".join(ways) or "choose a smaller model.path"


def _smaller_base(model: ModelConfig, value_bytes: float, free: float) -> str | None:
    """The largest published model of the same architecture that fits."""
    published = published_model(model.path)
    if published is None:
        return None
    model_type = published.config.get("model_type")
    fitting = [
        other
        for other in published_models()
        if other.config.get("model_type") == model_type
        and other.parameters < published.parameters
        and other.parameters * value_bytes < free
    ]
    return max(fitting, key=lambda other: other.parameters).name if fitting else None


def _check_days(config: RunConfig, base: BaseSize, machine: Machine, findings: Findings) -> None:
    """Add a problem where training on the CPU takes more than MOST_DAYS."""
    is_speech = any(task.speech is not None for task in config.tasks.values())
    passes = SPEECH_PASSES if is_speech else PASSES
    tokens = config.training.steps * config.training.tokens_per_step
    cores = usable_cores()
    machines = max(1, machine.processes // machine.local_processes)
    days = passes * base.parameters * tokens / (machines * cpu_rate(cores)) / DAY
    if days <= MOST_DAYS or config.training.allow_slow:
        return
    hint = (
        f"{machine.gpus.why_none}, and training on {cores} CPU cores would take {_long(days)} or more "
        f"(an estimate: {config.training.steps:,} steps of {config.training.tokens_per_step:,} tokens, "
        f"{_parameters(base.parameters)} parameters): run it on a machine with a GPU (flora-train plan "
        "shows the memory that it needs), or set training.allow_slow=true"
    )
    findings.add("GPU", None, hint, suggests_smaller=True)
    findings.rows.append(("GPU", f"none; training would take {_long(days)} or more (an estimate)"))


def _long(days: float) -> str:
    if days < 730:
        return f"{days:,.0f} days"
    return f"{days / 365:,.0f} years"


def check_disk(answers: Mapping[Repository, Answer], base: BaseSize, findings: Findings) -> None:
    """Add a problem where the hub's cache has no room for what would be downloaded."""
    from huggingface_hub import constants

    needed = base.download + sum(map(_bytes_of_rows, answers, answers.values()))
    if not needed:
        return
    cache = Path(constants.HF_HUB_CACHE)
    existing = next((folder for folder in (cache, *cache.parents) if folder.exists()), Path.cwd())
    free = disk_usage(existing).free
    findings.rows.append(("download", f"{_gb(needed)} into {cache}, where {_gb(free)} are free"))
    if needed > free:
        hint = (
            f"{_gb(needed)} would be downloaded into {cache}, where {_gb(free)} are free: set HF_HOME to a "
            "folder on a larger disk"
        )
        findings.add("disk", None, hint, suggests_smaller=True)


def _bytes_of_rows(repository: Repository, answer: Answer) -> int:
    """Bytes of the files of a data set that are downloaded, where they are known."""
    if repository.type != "dataset":
        return 0
    folder = repository.file or ""
    return sum(size for name, size in answer.files.items() if name.startswith(folder))


def _parameters(count: int) -> str:
    if count >= LARGE:
        return f"{count / 1e9:.1f} billion"
    return f"{count / 1e6:,.0f} million"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
