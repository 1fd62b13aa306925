"""Free memory of the GPUs and of the host, and the speed of the CPU, without loading torch."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

FLOAT32_RATE = 1e11
"""Operations a second of one CPU core in matrix products, more than most reach."""
AVX512_BFLOAT16_RATE, AMX_RATE = 3e11, 2e12
"""The same in bfloat16, with AVX-512 and with matrix units."""
NVML_LIBRARIES = ("libnvidia-ml.so.1", "libnvidia-ml.so", "nvml.dll")
GPU_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg", "/dev/nvhost-gpu", "/dev/nvmap")
"""Devices of GPU drivers: NVIDIA, AMD, Windows' Linux, Jetson."""
TRUE = ("1", "true", "yes", "on", "y", "t")


@dataclass(frozen=True)
class Gpu:
    name: str
    total: int
    """Bytes."""
    free: int
    """Bytes."""


@dataclass(frozen=True)
class Gpus:
    """The GPUs that a run can use."""

    devices: tuple[Gpu, ...] = ()
    """Empty where there is none, or where their memory is unknown."""
    unknown: bool = False
    """Whether there may be GPUs that only torch can describe."""
    why_none: str = ""
    """Why no GPU can be used."""


def find_gpus() -> Gpus:
    """The GPUs that torch would use, in this process and in others of the run on this machine."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE:
        return Gpus(why_none="ACCELERATE_USE_CPU is set")
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return Gpus(why_none="CUDA_VISIBLE_DEVICES hides them")
    platform = _torch_platform()
    if platform == "cpu":
        return Gpus(why_none="the installed torch is a build for CPUs")
    has_driver = any(map(os.path.exists, GPU_FILES))
    if platform != "cuda":
        return Gpus(unknown=has_driver, why_none="" if has_driver else "this machine has none")
    try:
        devices = tuple(_nvml_devices())
    except (OSError, AttributeError, ValueError):
        return Gpus(unknown=has_driver, why_none="" if has_driver else "this machine has none")
    return Gpus(devices, why_none="" if devices else "this machine has none")


def _torch_platform() -> str:
    """cuda, hip or cpu: what the installed torch is built for."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return "cpu"
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    for name in ("cuda", "hip"):
        if re.search(rf"^{name}\b[^=]*=\s*['\"]", text, re.MULTILINE):
            return name
    return "cpu"


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _nvml_devices() -> Iterator[Gpu]:
    """The visible NVIDIA GPUs, from the driver's management library. Raises OSError where there is none."""
    nvml = _load_nvml()
    _check(nvml.nvmlInit_v2())
    try:
        for handle in _visible_handles(nvml):
            memory, name = _Memory(), ctypes.create_string_buffer(96)
            _check(nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)))
            nvml.nvmlDeviceGetName(handle, name, len(name))
            yield Gpu(name.value.decode(errors="replace"), memory.total, memory.free)
    finally:
        nvml.nvmlShutdown()


def _load_nvml() -> ctypes.CDLL:
    for name in NVML_LIBRARIES:
        with suppress(OSError):
            return ctypes.CDLL(name)
    raise OSError("no NVML")


def _visible_handles(nvml: ctypes.CDLL) -> Iterator[ctypes.c_void_p]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        count = ctypes.c_uint()
        _check(nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        names = [str(index) for index in range(count.value)]
    else:
        names = [name.strip() for name in visible.split(",")]
    for name in names:
        handle = ctypes.c_void_p()
        if name.isdecimal():
            status = nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(int(name)), ctypes.byref(handle))
        else:
            status = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
        if status:
            return  # CUDA ignores all names after an invalid one
        yield handle


def _check(status: int) -> None:
    if status:
        raise OSError(f"NVML error {status}")


def free_host_memory() -> int:
    """Bytes that this process can allocate: free on the machine, within the limit of its container, and
    swap."""
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, RuntimeError):
        free += int(psutil.swap_memory().free)
    return min([free, *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """Bytes below the limits of this process's control groups (containers, SLURM, systemd)."""
    for folder in _group_folders():
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            with suppress(OSError, ValueError):
                limit = int((folder / limit_name).read_text())
                used = int((folder / used_name).read_text())
                yield max(0, limit - used + _reclaimable(folder))


def _group_folders() -> Iterator[Path]:
    root = Path("/sys/fs/cgroup")
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        folder = top / name.lstrip("/")
        yield folder
        yield from (parent for parent in folder.parents if parent.is_relative_to(top))


def _reclaimable(folder: Path) -> int:
    """Bytes of files in memory, which the system drops when it needs the memory."""
    pattern = r"^(?:total_)?(?:in)?active_file (\d+)$"
    text = (folder / "memory.stat").read_text()
    totals = re.findall(pattern.replace("(?:total_)?", "total_"), text, re.MULTILINE)
    return sum(map(int, totals or re.findall(pattern, text, re.MULTILINE)))


def multiplies_bfloat16_fast() -> bool:
    """Whether this CPU may multiply bfloat16 faster than float32."""
    return _bfloat16_rate() is not None


def cpu_rate(cores: int) -> float:
    """Operations a second that these cores do not exceed."""
    return cores * (_bfloat16_rate() or FLOAT32_RATE)


def _bfloat16_rate() -> float | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    if "amx_tile" in text:
        return AMX_RATE
    # without AMX, Intel's processors multiply bfloat16 slower than float32
    if "avx512_bf16" in text and "GenuineIntel" not in text:
        return AVX512_BFLOAT16_RATE
    return None


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
