"""Run by test_sharded_base.py in two processes: a base sharded by FSDP2 gives the same numbers."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flora_train.adapters.bank import AdapterBank
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, perturb
from tests.unit.adapters.helpers import tokens


def step(bank: AdapterBank, ids: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits, and every pool's gradients."""
    bank.route(ids)
    logits = bank.model(input_ids=tokens(len(ids), length=9 + dist.get_rank())).logits
    logits.square().mean().backward()
    return logits.detach(), [pool.gradients for pool in bank.pools]


def fresh_bank(checkpointing: str) -> AdapterBank:
    model: Any = tiny_model().train()
    if checkpointing != "off":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    bank = AdapterBank.attach(model, mixed_specs())
    perturb(bank)
    return bank


def main(checkpointing: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ids = [[0, 1, 2, 3, 4, 5, -1], [2, 0, 5, -1]][
        rank
    ]  # the other process lacks adapters, and has them in another order
    expected, expected_gradients = step(fresh_bank(checkpointing), ids)
    mesh = init_device_mesh("cpu", (2,))
    bank = fresh_bank(checkpointing)
    model: Any = bank.model
    for block in model.model.layers:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh)
    sharded = [parameter for parameter in model.parameters() if isinstance(parameter, DTensor)]
    assert len(sharded) == len(list(model.parameters()))
    assert all(parameter.to_local().numel() <= parameter.numel() // 2 + 32 for parameter in sharded)
    assert not any(isinstance(pool.values, DTensor) for pool in bank.pools)
    for _ in range(2):  # the second pass meets weights that were gathered and dropped before
        for pool in bank.pools:
            pool.gradients.zero_()
        logits, gradients = step(bank, ids)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(gradients, expected_gradients)
    dist.barrier()
    dist.destroy_process_group()
    print(f"process {rank} agrees")


if __name__ == "__main__":
    main(*sys.argv[1:])
