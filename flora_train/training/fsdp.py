"""FSDP2 for the frozen base: each process holds a shard of every weight, and gathers a layer when it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import user_error
from flora_train.config.schema import RunConfig
from flora_train.data.batch import MixedBatch, Row, share_of_rank
from flora_train.runtime.distributed import world
from flora_train.training.loss import RowLosses

logger = logging.getLogger(__name__)

ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""Variable that accelerate's launcher sets for an engine of its configuration file -> the engine's name."""


def check_launcher() -> None:
    """Raises UserError if the launcher is configured to wrap the model itself, which has no effect here."""
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "").lower() in ("true", "1"):
            hint = (
                f"{engine} of accelerate's configuration has no effect: launch with launch/ddp.yaml; "
                "model.fsdp=true shards the base"
            )
            raise user_error(variable, os.environ[variable], hint)


def uses_sharding(config: RunConfig) -> bool:
    """Whether the base is to be sharded, and there are several processes."""
    return config.model.fsdp and world()[1] > 1


def apply_fsdp(bank: AdapterBank) -> None:
    """Shard the bank's base over all processes, in place. It may be in host memory; its shards move to the
    bank's device.

    Layers are gathered one at a time and dropped again. Modules outside of them, such as embeddings and
    output head, stay gathered from the forward to the backward. The adapters are not sharded. Collective.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: Any = bank.model
    mesh = init_device_mesh(bank.device.type, (world()[1],))
    for block in layers_of(model):
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.get_input_embeddings().register_forward_hook(_ask_for_gradients)
    logger.info(f"every process holds 1/{world()[1]} of the base")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered and dropped as a whole: transformers' `_no_split_modules`."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def largest_part(model: nn.Module, processes: int) -> float:
    """The largest share of the base's values that a process holds at once: its shards of the layers, two
    gathered layers (one is fetched while the other runs), and all modules outside of the layers.
    """
    sizes = [_numbers(layer) for layer in layers_of(model)]
    total = _numbers(model)
    return min(1.0, (sum(sizes) / processes + 2 * max(sizes, default=0) + total - sum(sizes)) / total)


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _ask_for_gradients(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Make the backward run through every layer on every process, whatever the adapters of its rows:
    gathering is collective.
    """
    if torch.is_grad_enabled() and not output.requires_grad:
        return output.requires_grad_(
            True
        ).clone()  # some models change their embeddings in place, which leaves forbid
    return output


def is_sharded(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def full_tensor(weight: Tensor) -> Tensor:
    """A whole weight, which may be sharded. Collective if it is."""
    gather = getattr(weight, "full_tensor", None)
    return weight if gather is None else gather()


def unshard(model: nn.Module) -> None:
    """Keep the whole base on every process from now on, so that each can run it independently. Collective;
    without effect on a base that is not sharded.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.unshard()


def run_dummy_passes(row_losses: RowLosses, bank: AdapterBank, groups: Sequence[Sequence[Row]]) -> None:
    """Run a sharded base as often as the process with the most of these groups has run it, since gathering is
    collective:
    two tokens, without adapters, forward and, where gradients are enabled, backward. The run's state does not
    change.
    """
    if not is_sharded(row_losses.model):
        return
    rank, processes = world()
    passes = [len(share_of_rank(groups, other, processes)) for other in range(processes)]
    for number in range(passes[rank], max(passes)):
        if torch.is_grad_enabled():
            run_dummy_frozen_pass(row_losses, bank, groups, number)
        _dummy_pass(row_losses, bank)


def run_dummy_frozen_pass(
    row_losses: RowLosses, bank: AdapterBank, groups: Sequence[Sequence[Row]], number: int
) -> None:
    """Run a sharded base without gradients if another process does so for the rows of its group `number` that
    get none, and this process has no such rows.
    """
    if not is_sharded(row_losses.model):
        return
    rank, processes = world()
    frozen = [_has_frozen_rows(groups, number, other, processes) for other in range(processes)]
    if any(frozen) and not frozen[rank]:
        with torch.no_grad():
            _dummy_pass(row_losses, bank)


def _has_frozen_rows(groups: Sequence[Sequence[Row]], number: int, rank: int, processes: int) -> bool:
    share = share_of_rank(groups, rank, processes)
    return number < len(share) and any(row.frozen for row in share[number])


def _dummy_pass(row_losses: RowLosses, bank: AdapterBank) -> None:
    two = torch.zeros(1, 2, dtype=torch.long, device=bank.device)
    with bank.without_adapters():
        losses = row_losses(MixedBatch({"input_ids": two, "attention_mask": two + 1}, two, two[:, 0] - 1, ()))
        if torch.is_grad_enabled():
            losses.sum().backward()
