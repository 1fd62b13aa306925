"""What do the processes of a run tell each other? Gradients of the adapters in the step, and sums for the log."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flora_train.config.errors import Problem, UserError, first_line, user_error

Result = TypeVar("Result")


def check_world_size(expected: int | None, actual: int) -> None:
    """Raises UserError if the launcher started another number of processes than the recipe asks for."""
    if expected is not None and expected != actual:
        raise user_error(
            "num_processes",
            expected,
            f"but {actual} process(es) run; start it with: accelerate launch --num_processes {expected} train.py ... "
            "(on CPUs: ACCELERATE_USE_CPU=true accelerate launch --config_file launch/cpu_2proc.yaml train.py ...)",
        )


def sum_over_processes(numbers: Tensor) -> Tensor:
    """The elementwise sum over processes, in place."""
    if several_processes():
        dist.all_reduce(numbers)
    return numbers


def on_any_process(is_so: bool, device: torch.device) -> bool:
    """Whether it is so on one of the processes at least; all get the same answer."""
    return bool(sum_over_processes(torch.tensor(float(is_so), device=device)))


def share_from_main(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Give every process the main one's numbers, in place. device: what the processes' exchange goes through."""
    for tensor in tensors if several_processes() else ():
        for row in tensor:  # of adapters on the host one at a time has room on the device
            there = row.to(device)
            dist.broadcast(there, 0)
            if there is not row:
                row.copy_(there)


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_everyone() -> None:
    if several_processes():
        dist.barrier()


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_main_process(action: Callable[[], Any]) -> Any:
    """Run `action` on the main process; every process gets its result, or a UserError where it raised."""
    mine: Exception | None = None
    outcome: list[Any] = [None, ()]
    if is_main_process():
        try:
            outcome[0] = action()
        except Exception as error:
            mine, outcome[1] = error, _problems(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if mine is not None:
        raise mine
    if outcome[1]:
        raise UserError(*outcome[1])
    return outcome[0]


def on_every_process(action: Callable[[], Result]) -> Result:
    """Run `action`, which exchanges nothing, on every process, and go on where it worked on all: one that failed alone, on a machine
    of its own, would leave the others waiting for it.

    Raises what it raised here, or UserError with what another process was told, and where.
    """
    mine: Exception | None = None
    try:
        result = action()
    except Exception as error:
        mine = error
    told: list[tuple[Problem, ...]] = [()] * world()[1]
    if several_processes():
        dist.all_gather_object(told, _problems(mine))
    if mine is not None:
        raise mine
    if any(told):
        raise UserError(*next(filter(None, told)))
    return result


def _problems(error: Exception | None) -> tuple[Problem, ...]:
    """What the other processes say of it."""
    if error is None:
        return ()
    where = f"process {world()[0]} on {socket.gethostname()}"
    if not isinstance(error, UserError):
        return (Problem(where, None, f"ended with {type(error).__name__}: {first_line(error)}"),)
    return tuple(
        Problem(problem.key, problem.value, f"{problem.hint} (said by {where})") for problem in error.problems
    )


def check_alike(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Raises UserError, on all processes, if a machine has other data, another base model or another recipe than the first. facts: key ->
    what must be the same; not asked for where one process runs."""
    if not several_processes():
        return
    mine = on_every_process(facts)
    first = [mine]
    dist.broadcast_object_list(first)

    def compare() -> None:
        others = [key for key in dict.fromkeys([*first[0], *mine]) if first[0].get(key) != mine.get(key)]
        hint = "is {!r} on process 0: give every machine the same recipe and files"
        if others:
            raise UserError(*(Problem(key, mine.get(key), hint.format(first[0].get(key))) for key in others))

    on_every_process(compare)


def several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
