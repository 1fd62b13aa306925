"""The best state of every adapter is saved and restored bit by bit."""

from __future__ import annotations

import os
from math import inf, nan
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.training.best_adapters import (
    BestAdapters,
    BestCheckpoint,
    adapter_file,
    best_step,
    load_adapter,
    save_adapter,
    verified_step,
)
from tests.architectures import tiny_model
from tests.conftest import mixed_specs, perturb, spec


@pytest.fixture
def bank() -> AdapterBank:
    return AdapterBank.attach(tiny_model(), mixed_specs())


def values(bank: AdapterBank) -> list[torch.Tensor]:
    return [bank.row(i).clone() for i in range(len(bank.specs))]


def test_each_adapter_comes_back_bit_identical_from_its_own_best_evaluation(
    bank: AdapterBank, tmp_path: Path
) -> None:
    selection = BestAdapters(bank, tmp_path, select_best=True)
    history = []
    best_at = [0, 1, 2, 3, 1, 3]
    for evaluation in range(4):
        history.append(values(bank))
        selection.offer({a: 1.0 + abs(evaluation - best_at[a]) for a in range(6)}, step=10 * (evaluation + 1))
        perturb(bank)
    selection.restore()
    for adapter, evaluation in enumerate(best_at):
        assert torch.equal(bank.row(adapter), history[evaluation][adapter])
        assert not torch.equal(history[evaluation][adapter], history[evaluation - 1][adapter])
        assert selection.best[adapter] == BestCheckpoint(10 * (evaluation + 1), 1.0)


def test_equal_loss_keeps_the_earlier_state(bank: AdapterBank, tmp_path: Path) -> None:
    selection = BestAdapters(bank, tmp_path, select_best=True)
    selection.offer({0: 2.0}, 5)
    selection.offer({0: 2.0}, 10)
    assert selection.best[0].step == 5


def test_latest_state_is_saved_without_select_best(bank: AdapterBank, tmp_path: Path) -> None:
    selection = BestAdapters(bank, tmp_path, select_best=False)
    for step, loss in ((5, 1.0), (10, 3.0), (15, nan)):
        perturb(bank)
        latest = bank.row(0).clone()
        selection.offer({0: loss}, step)
    perturb(bank)
    selection.restore()
    assert torch.equal(bank.row(0), latest)
    assert selection.best[0].step == 15


@pytest.mark.parametrize(
    ("losses", "kept"),
    [
        ([nan, 3.0, 2.0], 2),
        ([nan, 3.0, 4.0], 1),
        ([3.0, nan, 4.0], 0),
        ([nan, nan, nan], 0),
        ([inf, nan, 5.0], 2),
        ([nan, inf, inf], 1),
    ],
)
def test_loss_that_is_not_a_number_never_stands_in_the_way(
    bank: AdapterBank, tmp_path: Path, losses: list[float], kept: int
) -> None:
    selection = BestAdapters(bank, tmp_path, select_best=True)
    for step, loss in enumerate(losses):
        selection.offer({0: loss}, step)
    assert selection.best[0].step == kept


def test_facts_travel_with_the_checkpoint(bank: AdapterBank, tmp_path: Path) -> None:
    save_adapter(bank, 2, tmp_path, {"step": 7, "heldout_loss": 1.25})
    assert load_adapter(bank, 2, tmp_path) == {"step": 7, "heldout_loss": 1.25}
    assert [path.name for path in tmp_path.iterdir()] == [f"{bank.specs[2].name}.safetensors"]


def test_missing_checkpoint_is_a_clear_error(bank: AdapterBank, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a-lora\.safetensors: no such checkpoint"):
        load_adapter(bank, bank.ids["a-lora"], tmp_path)


@pytest.mark.parametrize("content", ["cut", "empty", "text", "flipped", "other facts"])
def test_damaged_checkpoint_is_a_clear_error(bank: AdapterBank, tmp_path: Path, content: str) -> None:
    save_adapter(bank, 0, tmp_path, {"step": 1})
    path = adapter_file(tmp_path, "a-flora")
    whole = path.read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"step: 1\n" * 50}
    damaged |= {
        "flipped": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
        "other facts": whole.replace(b"step", b"stop"),
    }
    path.write_bytes(damaged[content])
    with pytest.raises(UserError, match=r"a-flora\.safetensors: is not a whole checkpoint of a-flora"):
        load_adapter(bank, 0, tmp_path)


def test_checkpoint_without_a_tensor_or_facts_is_a_clear_error(bank: AdapterBank, tmp_path: Path) -> None:
    save_adapter(bank, 0, tmp_path, {"step": 1})
    path = adapter_file(tmp_path, "a-flora")
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(UserError, match="is not a whole checkpoint of a-flora: 'facts'"):
        load_adapter(bank, 0, tmp_path)
    missing = sorted(tensors)[0]
    del tensors[missing]
    save_file(tensors, path, {"facts": "{}"})
    with pytest.raises(UserError, match=f"is not a whole checkpoint of a-flora: .*{missing}"):
        load_adapter(bank, 0, tmp_path)


def test_checkpoint_of_another_rank_names_tensor_and_shapes(bank: AdapterBank, tmp_path: Path) -> None:
    other = AdapterBank.attach(tiny_model(), [spec("flora", "a", "flora", rank=5)])
    save_adapter(other, 0, tmp_path, {"step": 1})
    with pytest.raises(
        UserError,
        match=r"'model\.layers\.0\.self_attn\.q_proj\.A': has shape \(5, 32\), the adapter \(3, 32\)",
    ):
        load_adapter(bank, 0, tmp_path)


def test_the_kept_file_of_another_adapter_is_refused(tmp_path: Path) -> None:
    bank = AdapterBank.attach(
        tiny_model(), [spec("lora", family=family, rank=2) for family in ("left", "right")]
    )
    left, right = (each.name for each in bank.specs)
    save_adapter(bank, 0, tmp_path, {"step": 1})
    assert (best_step(tmp_path, left), verified_step(tmp_path, left)) == (1, 1)
    adapter_file(tmp_path, left).rename(adapter_file(tmp_path, right))
    assert (best_step(tmp_path, right), verified_step(tmp_path, right)) == (None, None)
    with pytest.raises(UserError, match=f"is not a whole checkpoint of {right}: it holds the adapter {left}"):
        load_adapter(bank, 1, tmp_path)


def test_a_pipe_in_the_place_of_a_kept_file_is_an_error_and_no_wait(
    bank: AdapterBank, tmp_path: Path
) -> None:
    os.mkfifo(adapter_file(tmp_path, "a-flora"))
    assert (best_step(tmp_path, "a-flora"), verified_step(tmp_path, "a-flora")) == (None, None)
    with pytest.raises(UserError, match="is not a whole checkpoint of a-flora: it is not a regular file"):
        load_adapter(bank, 0, tmp_path)
