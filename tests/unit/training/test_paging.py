"""Paging changes no bit of any result, and moves exactly what the theory requires."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.paging import Paging
from flora_train.config.errors import UserError
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs, spec
from tests.unit.training.harness import make_trainer, plans_of, snapshot
from tests.unit.training.test_checkpoint import result, stop_before

SLOTS = 5


def trainer_in(folder: Path, slots: int | None, disk: bool = False, **options: Any) -> Trainer:
    """Twelve adapters of all methods, of which the device has room for about ten."""
    folder.mkdir(exist_ok=True)
    paging = None if slots is None else Paging(slots, folder if disk else None)
    settings: dict[str, Any] = {
        "steps": 12,
        "save_every": 3,
        "tokens_per_step": 72,
        "optimizer": "adamw",
        **options,
    }
    specs = [replace(s, dropout=0.3) if s.name == "a-lora" else s for s in mixed_specs(lr=5e-3)]
    next_task = {"a": "b", "b": "c", "c": "a"}
    specs += [replace(s, task=next_task[s.task], name=f"{next_task[s.task]}2-{s.family}") for s in specs]
    return make_trainer(specs, folder, interval=4, paging=paging, **settings)


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, tensor in theirs["states"].items():
        assert torch.equal(ours["states"][name], tensor), name
    for key in ("steps", "records"):  # as text, in which NaN is NaN
        assert str(ours[key]) == str(theirs[key]), key
    assert str(sorted(ours["kept"].items())) == str(sorted(theirs["kept"].items()))


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.quick("skip-sgd-memory", "rollback-adamw-disk")
def test_a_run_ends_with_the_same_bits(disk: bool, optimizer: str, policy: str, tmp_path: Path) -> None:
    """Weights, moments, selection, and all that is logged; one adapter starts with a weight that is not
    finite."""
    found = []
    for name, slots in (("resident", None), ("paged", SLOTS)):
        trainer = trainer_in(tmp_path / name, slots, disk, optimizer=optimizer, guard={"policy": policy})
        trainer.bank.row(trainer.bank.ids["c-pure"])[5] = float("inf")
        trainer.train()
        found.append(result(trainer))
        assert not [file for file in (tmp_path / name).rglob("*") if "pages" in file.name]
    assert trainer.bank.pager is not None
    assert trainer.bank.pager.traffic.to_host > 0
    assert sum(len(pool.values) for pool in trainer.bank.pools) < 12
    same(found[1], found[0])


def is_in_a_file(tensor: torch.Tensor, folder: Path) -> bool:
    """Whether the system has its memory from a file there, whose pages it can write out."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(address, 16) for address in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(folder) in line
    return False


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_copies_are_where_the_pages_are(disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a checkpoint that is being written, and of what the guard goes back to."""
    trainer = trainer_in(tmp_path / "run", SLOTS, disk, guard={"policy": "rollback"})
    written: list[torch.Tensor] = []
    monkeypatch.setattr(
        trainer.checkpoints, "_write", lambda step, tensors, facts: written.extend(tensors.values())
    )
    trainer.guard.snapshot()
    trainer.save()
    trainer.finish_saving()
    assert trainer.guard._snapshot is not None
    copies = [*written, *trainer.guard._snapshot[0].values()]
    assert len(copies) == 2 * len(trainer.bank.tensors())
    assert [is_in_a_file(copy, tmp_path) for copy in copies] == [disk] * len(copies)


def test_every_step_gives_the_same_bits_of_every_adapter(tmp_path: Path) -> None:
    resident, paged = (trainer_in(tmp_path / str(slots), slots) for slots in (None, SLOTS))
    absent = 0
    for number, plan in enumerate(plans_of(resident, 12)):
        resident.step(number, plan)
        paged.step(number, plan)
        ours, theirs = snapshot(paged), snapshot(resident)
        assert all(
            torch.equal(a, b) for name in theirs for a, b in zip(ours[name], theirs[name], strict=True)
        ), number
        absent += len(ours) - len(plan.label_tokens)
    assert absent > 40


@pytest.mark.parametrize(("before", "after"), [(None, SLOTS), (SLOTS, None)])
def test_run_resumes_with_other_slots(before: int | None, after: int | None, tmp_path: Path) -> None:
    whole = trainer_in(tmp_path / "whole", None)
    whole.train()
    stop_before(trainer_in(tmp_path / "parts", before), 8)
    again = trainer_in(tmp_path / "parts", after)
    again.resume()
    assert again.state.step == 6
    again.train()
    same(result(again), result(whole))


def one_kind(count: int) -> list[Any]:
    """So many adapters of one kind, each on the one task or the other in turn."""
    return [
        replace(spec("lora", "abc"[i % 3], rank=2), name=f"lora{i}", max_steps=10**6) for i in range(count)
    ]


def least_loads(uses: list[set[int]], slots: int) -> int:
    """Belady's own rule on a list of steps, written without our code: loads of a memory that starts empty,
    where a step's adapters come while the one before computes, whose adapters stay as long as others can
    leave."""
    inside: set[int] = set()
    loads = 0
    for now, wanted in enumerate(uses):
        computing = uses[now - 1] if now else set()
        for adapter in sorted(wanted - inside):
            if len(inside) == slots:
                may_leave = inside - wanted - computing or inside - wanted
                later = {
                    a: next((s for s in range(now + 1, len(uses)) if a in uses[s]), len(uses))
                    for a in may_leave
                }
                inside.remove(max(later, key=lambda a: (later[a], a)))
            inside.add(adapter)
            loads += 1
    return loads


def test_paging_loads_as_little_as_beladys_rule(tmp_path: Path) -> None:
    """Nine adapters in three tasks, of which a step has one or two."""
    trainer = make_trainer(one_kind(9), tmp_path, paging=Paging(6), steps=40, tokens_per_step=42)
    plans = plans_of(trainer, 40)
    for number, plan in enumerate(plans):
        trainer.step(number, plan)
    pager = trainer.bank.pager
    assert pager is not None
    uses = [set(plan.label_tokens) for plan in plans]
    assert {len(wanted) for wanted in uses} == {3, 6}
    row = 3 * 4 * trainer.bank.pools[0].row_size  # values and two moments
    assert pager.traffic.to_device == row * least_loads(uses, 6)
    assert pager.traffic.to_device < row * sum(map(len, uses)) / 2
    assert pager.traffic.to_host <= pager.traffic.to_device


def test_too_few_slots_are_an_error_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"adapters\.device_slots = 1: .*step 1: set it to 3 or more.*tokens_per_step"
    ):
        make_trainer(one_kind(9), tmp_path, paging=Paging(1), steps=4, tokens_per_step=42)
