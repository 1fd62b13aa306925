"""What do the processes of a run tell each other? Gradients of the adapters in the step, and sums for the log."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import fail


def check_world_size(expected: int | None, actual: int) -> None:
    """Raises UserError if the launcher started another number of processes than the recipe asks for."""
    if expected is not None and expected != actual:
        raise fail(
            "num_processes",
            expected,
            f"but {actual} process(es) run; start it with: accelerate launch --num_processes {expected} train.py ... "
            "(on CPUs: ACCELERATE_USE_CPU=true accelerate launch --config_file launch/cpu_2proc.yaml train.py ...)",
        )


def sum_gradients(bank: AdapterBank, adapters: Iterable[int]) -> None:
    """Add up the gradients of these adapters over all processes, in place. Every process names the same adapters:
    the step is planned alike everywhere, also where a process holds no row of one of them."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return
    for adapter in sorted(adapters):
        dist.all_reduce(bank.gradient_row(adapter))


def sum_over_processes(numbers: Tensor) -> Tensor:
    """The elementwise sum over processes, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(numbers)
    return numbers


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_everyone() -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
