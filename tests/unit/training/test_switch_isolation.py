"""Switch adapters, one decision of which all layers use: checkpointing, and a router that goes wrong."""

from __future__ import annotations

from pathlib import Path

import torch

from flora_train.adapters.routing import RowDraw, RowNoise
from tests.conftest import spec
from tests.unit.training.harness import make_trainer, plans_of, snapshot, train_together
from tests.unit.training.routed_specs import switch_specs


def test_every_kind_of_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    """One decision of a forward has users in all layers, which a backward may compute in parts."""
    rows = []
    for checkpointing in ("off", "reentrant", "non_reentrant"):
        specs = [
            spec("switch", "a", "one", experts=3, top_k=1, rank=2, balance_loss=0.5, jitter=0.1),
            spec("switch", "b", "two", experts=3, top_k=2, rank=2, balance_loss=0.5),
        ]
        trainer = make_trainer(specs, tmp_path, checkpointing=checkpointing, examples_per_draw=2)
        generator = torch.Generator().manual_seed(0)
        for pool in trainer.bank.pools:
            pool.values.add_(0.2 * torch.randn(pool.values.shape, generator=generator))
        bank = trainer.bank
        ids = torch.randint(2, 50, (3, 6), generator=generator)
        noise = [RowNoise(seed, 6) for seed in range(3)]
        bank.route([0, 1, 0], noise, [RowDraw(0, 1.0)] * 3, [6, 5, 6])
        bank.model(input_ids=ids, use_cache=False).logits.square().mean().backward()
        rows.append([bank.gradient_row(adapter).clone() for adapter in range(2)])
    for adapter in range(2):
        router = rows[0][adapter][-3 * 8 :]
        assert router.abs().max() > 0
        for other in rows[1:]:
            scale = rows[0][adapter].abs().max()
            assert (other[adapter] - rows[0][adapter]).abs().max() <= 1e-5 * scale


def test_nan_in_one_router_leaves_all_others_bit_identical(tmp_path: Path) -> None:
    states = []
    for is_broken in (False, True):
        options = {"optimizer": "adamw", "examples_per_draw": 2, "tokens_per_step": 180}
        trainer = make_trainer(switch_specs(lr=2e-3), tmp_path, **options)
        if is_broken:
            params = trainer.bank.parameters_of("a-switch").values()
            next(values["router"] for values in params if "router" in values)[0, 0] = float("nan")
        train_together(trainer, plans_of(trainer, 3))
        states.append(snapshot(trainer))
    clean, broken = states
    assert any(not torch.equal(a, b) for a, b in zip(clean["a-switch"], broken["a-switch"], strict=True))
    for name in clean.keys() - {"a-switch"}:
        assert all(torch.equal(a, b) for a, b in zip(clean[name], broken[name], strict=True)), name
