"""Communication between the processes of a run: sums, broadcasts, and errors that all of them raise."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flora_train.config.errors import Problem, UserError, first_line, user_error
from flora_train.config.json_format import JsonValue

Result = TypeVar("Result")


def check_world_size(expected: int | None, actual: int) -> None:
    """Raises UserError if the launcher started another number of processes than num_processes."""
    if expected is not None and expected != actual:
        raise user_error(
            "num_processes",
            expected,
            f"but {actual} process(es) run; start it with: accelerate launch --num_processes {expected} "
            "train.py ... "
            "(on CPUs: ACCELERATE_USE_CPU=true accelerate launch --config_file launch/cpu_2proc.yaml "
            "train.py ...)",
        )


def sum_over_processes(numbers: Tensor) -> Tensor:
    """The elementwise sum over processes, in place."""
    if several_processes():
        dist.all_reduce(numbers)
    return numbers


def on_any_process(condition: bool, device: torch.device) -> bool:
    """Whether the condition holds on at least one process; the result is the same on all."""
    return bool(sum_over_processes(torch.tensor(float(condition), device=device)))


def share_from_main(tensors: Iterable[Tensor], device: torch.device) -> None:
    """Broadcast tensors from the main process, in place. device: of the communication backend."""
    if not several_processes():
        return
    for tensor in tensors:
        for row in tensor:  # adapters on the host may fit on the device only one at a time
            on_device = row.to(device)
            dist.broadcast(on_device, 0)
            if on_device is not row:
                row.copy_(on_device)


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def wait_for_everyone() -> None:
    if several_processes():
        dist.barrier()


def world() -> tuple[int, int]:
    """(rank, number of processes)."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def on_main_process(action: Callable[[], Any]) -> Any:
    """Run `action` on the main process; all processes return its result, or raise UserError if it raised."""
    own: Exception | None = None
    outcome: list[Any] = [None, ()]
    if is_main_process():
        try:
            outcome[0] = action()
        except Exception as error:
            own, outcome[1] = error, _problems(error)
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if own is not None:
        raise own
    if outcome[1]:
        raise UserError(*outcome[1])
    return outcome[0]


def on_every_process(action: Callable[[], Result]) -> Result:
    """Run `action`, which must not communicate, on every process; raise on all of them if one fails, so that
    none waits for a process that has ended.

    Raises what `action` raised here, or UserError with the problem of another process, and its host.
    """
    own: Exception | None = None
    try:
        result = action()
    except Exception as error:
        own = error
    problems: list[tuple[Problem, ...]] = [()] * world()[1]
    if several_processes():
        dist.all_gather_object(problems, _problems(own))
    if own is not None:
        raise own
    if any(problems):
        raise UserError(*next(filter(None, problems)))
    return result


def _problems(error: Exception | None) -> tuple[Problem, ...]:
    """The problems that the other processes raise for an error of this one."""
    if error is None:
        return ()
    where = f"process {world()[0]} on {socket.gethostname()}"
    if not isinstance(error, UserError):
        return (Problem(where, None, f"ended with {type(error).__name__}: {first_line(error)}"),)
    return tuple(
        Problem(problem.key, problem.value, f"{problem.hint} (on {where})") for problem in error.problems
    )


def check_alike(facts: Callable[[], Mapping[str, JsonValue]]) -> None:
    """Raises UserError, on all processes, if a machine has other data, another base model or another recipe
    than the first.

    facts: returns key -> what must be the same; called only where there are several processes.
    """
    if not several_processes():
        return
    own = on_every_process(facts)
    broadcast = [own]
    dist.broadcast_object_list(broadcast)
    main = broadcast[0]

    def compare() -> None:
        problems = []
        for key in dict.fromkeys([*main, *own]):
            if main.get(key) != own.get(key):
                hint = f"is {main.get(key)!r} on process 0: give every machine the same recipe and files"
                problems.append(Problem(key, own.get(key), hint))
        if problems:
            raise UserError(*problems)

    on_every_process(compare)


def several_processes() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
