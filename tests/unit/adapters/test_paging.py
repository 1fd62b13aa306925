"""Adapters that move between device and host keep their values, and every user reads the current ones."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters import host_memory
from flora_train.adapters import paging as paging_module
from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.paging import Paging, partition_rows
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.evaluation.generation import Decoder, Generated, Request, Sampling
from flora_train.export.peft_format import peft_tensors
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.generation.test_complete import PROMPTS, model_for
from tests.unit.training.small_disk import file_size_limit


def test_methods_of_other_sizes_share_one_arena_without_gaps() -> None:
    """IA3's rows are small: many more of them than slots have room, and LoRA's come where they were."""
    specs = [replace(spec("ia3", "a"), name=f"ia3{i}") for i in range(20)] + [
        replace(spec("lora", "b", rank=8), name=f"lora{i}") for i in range(4)
    ]
    bank = AdapterBank.attach(tiny_model(), specs, paging=Paging(3))
    pager = bank.pager
    assert pager is not None
    small, large = (pool.row_size for pool in bank.pools)
    assert pager.capacity == 3 * large
    before = {i: bank.row(i).clone() for i in range(24)}
    for wanted in (range(20), range(20, 23), (0, 1, 20, 23), range(20)):
        pager.load(wanted)
        for i in wanted:
            pool, member = bank.location[i]
            assert torch.equal(pool.values[pool.slot_of[member]], before[i])
        used = sum(len(pool.values) * pool.row_size for pool in bank.pools)
        assert pager.capacity - used < (large if len(bank.pools[0].values) == 20 else small)


def twelve() -> list[AdapterSpec]:
    """Every method twice."""
    return [*mixed_specs(), *(replace(s, name=f"{s.name}2") for s in mixed_specs())]


def moved(bank: AdapterBank) -> AdapterBank:
    """Every adapter away from the identity, wherever it is."""
    for adapter in range(len(bank.specs)):
        row = bank.row(adapter)
        row += 0.1 * torch.randn(row.shape, generator=torch.Generator().manual_seed(adapter))
    return bank


def test_texts_and_exports_are_those_of_adapters_that_never_move() -> None:
    tokenizer, texts, exports = byte_tokenizer(), [], []
    for paging in (None, Paging(2)):
        bank = moved(AdapterBank.attach(model_for("llama", tokenizer), twelve(), paging=paging))
        requests = [Request(adapter, prompt, ("",)) for prompt in PROMPTS for adapter in range(-1, 12)]
        found = [""] * len(requests)

        def keep(generated: Generated, found: list[str] = found) -> None:
            found[generated.request] = generated.text

        greedy = Sampling(0.0, 1.0, 0)
        options = {"sampling": greedy, "max_new_tokens": 8, "blocks": bank.blocks}
        Decoder(bank.model, tokenizer, bank.routed, **options).run(requests, keep)
        texts.append(found)
        exports.append([peft_tensors(bank, s.name) for s in bank.specs])
    assert len(bank.blocks(range(-1, 12))) > 3
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 12
    for ours, theirs in zip(*exports, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_batch_of_more_adapters_than_have_room_is_refused() -> None:
    bank = AdapterBank.attach(tiny_model(), twelve(), paging=Paging(2))
    with pytest.raises(
        UserError, match=r"device_slots = 2: is too small for the 12 adapters of a step or batch: set it to 8"
    ):
        bank.route(range(12))
    bank.route([0, -1, 1])  # and nothing is lost


def test_the_numbers_of_every_adapter_survive_any_order_of_moves() -> None:
    bank = moved(AdapterBank.attach(tiny_model(), twelve(), paging=Paging(2)))
    pager = bank.pager
    assert pager is not None
    expected = [bank.row(i).clone() for i in range(12)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        adapter = int(torch.randint(12, (), generator=generator))
        pager.load([adapter])
        for _, ids, rows in bank.by_pool([adapter]):
            assert ids == [adapter]
            pool, _ = bank.location[adapter]
            pool.values[rows] += 1.0
        expected[adapter] = expected[adapter] + 1.0
        pager.prefetch([int(torch.randint(12, (), generator=generator))], lambda adapter: float(adapter))
    for i in range(12):
        assert torch.equal(bank.row(i), expected[i])
    pager.flush_to_host()
    for i in range(12):
        pool, member = bank.location[i]
        assert torch.equal(pool.host["values"][member], expected[i])


def test_a_step_does_not_wait_for_what_the_next_one_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy hangs until the step's forward and backward are done."""
    bank = AdapterBank.attach(tiny_model(), twelve(), paging=Paging(3))
    pager, may_copy, copy = bank.pager, threading.Event(), paging_module._copy
    assert pager is not None
    pager.make_resident([0, 1], lambda adapter: 0.0)

    def later(*moves: Any) -> None:
        assert may_copy.wait(20)
        copy(*moves)

    monkeypatch.setattr(paging_module, "_copy", later)
    pager.prefetch([2], lambda adapter: 0.0)
    bank.route([0, 1])
    bank.model(input_ids=torch.zeros(2, 5, dtype=torch.long)).logits.sum().backward()
    may_copy.set()
    assert torch.isfinite(bank.row(2)).all()


@pytest.mark.parametrize("room", [0, 7, 50, 99, 1000])
def test_an_arena_is_cut_into_what_is_needed_and_fair_parts(room: int) -> None:
    sizes, counts = [10, 3, 1], [4, 6, 9]
    for needs in ([0, 0, 0], [0, 2, 1], [4, 3, 0]):
        if sum(n * s for n, s in zip(needs, sizes, strict=True)) > room:
            continue
        rows = partition_rows(room, sizes, counts, needs=needs)
        used = sum(n * s for n, s in zip(rows, sizes, strict=True))
        assert used <= room
        assert all(need <= row <= count for need, row, count in zip(needs, rows, counts, strict=True))
        assert (
            room - used < 1 or rows[2] == counts[2]
        )  # rows of one number fill every gap while there are any


def test_short_memory_names_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "free_memory", lambda: 1000)
    with pytest.raises(
        UserError,
        match=r"paging\.host = 'memory': needs .* more memory for adapters, and 0\.0 GB are free: disk keeps",
    ):
        AdapterBank.attach(tiny_model(), twelve(), paging=Paging(2))


def test_a_full_disk_is_an_error_before_training_and_leaves_nothing(tmp_path: Path) -> None:
    with file_size_limit(4096), pytest.raises(UserError, match="the disk is full"):
        AdapterBank.attach(tiny_model(), twelve(), paging=Paging(2, tmp_path))
    assert list(tmp_path.iterdir()) == []
    AdapterBank.attach(tiny_model(), twelve(), paging=Paging(2, tmp_path))
    assert list(tmp_path.iterdir()) == []
