"""Packed pieces train as they would apart, and a model that cannot keep them apart is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.data.batch import Row, collate
from flora_train.data.packing import pack
from flora_train.training.loss import RowLosses
from flora_train.training.packing_check import check_packing
from tests.architectures import ARCHITECTURES, tiny_model
from tests.conftest import spec
from tests.unit.training.harness import PAD, make_trainer, random_chats, random_split

CAUSAL = [name for name in ARCHITECTURES if name not in ("t5", "whisper")]
SEE_EACH_OTHER = {"bloom", "falcon", "opt"}  # their masks or distances come from attention_mask


@pytest.mark.parametrize("name", CAUSAL)
def test_a_model_is_refused_exactly_if_packed_pieces_would_see_each_other(name: str) -> None:
    row_losses = RowLosses(tiny_model(name).eval())
    if name in SEE_EACH_OTHER:
        with pytest.raises(UserError, match=r"tasks\.lua\.packing.*set it to false"):
            check_packing(row_losses, "lua")
    else:
        check_packing(row_losses, "lua")


@pytest.mark.parametrize("method", ["flora", "lora", "ia3"])
@pytest.mark.parametrize("make_split", [random_split, random_chats], ids=["texts", "conversations"])
def test_gradients_of_packed_documents_equal_those_of_separate_ones(
    method: str, make_split: Any, tmp_path: Path
) -> None:
    options = {} if method == "ia3" else {"rank": 2}
    trainer: Any = make_trainer([spec(method, "a", **options)], tmp_path)
    apart = make_split(5, 12)
    together = pack(apart, 40)
    assert together.is_packed

    def gradients(split: Any) -> torch.Tensor:
        trainer.bank.pools[0].gradients.zero_()
        rows = [Row(0, "a", i, int(length)) for i, length in enumerate(split.lengths)]
        trainer.bank.route([0] * len(rows))
        trainer.row_losses(collate(rows, lambda task: split, PAD)).sum().backward()
        return trainer.bank.gradient_row(0).clone()

    first = gradients(apart)
    assert first.abs().max() > 0
    torch.testing.assert_close(gradients(together), first, rtol=2e-4, atol=1e-6)


def test_packed_document_is_independent_of_its_neighbours(tmp_path: Path) -> None:
    trainer: Any = make_trainer([spec("flora", "a", rank=2)], tmp_path)
    split = pack(random_split(5, 12), 40)
    row = Row(0, "a", 0, int(split.lengths[0]))
    (first, _), (second, spans), *_ = split.documents(0)
    prompt = int(spans[0, 0])

    def loss_of_second() -> float:
        batch = collate([row], lambda task: split, PAD)
        batch.labels[:, : len(first) + max(prompt, 1)] = -100
        batch.labels[:, len(first) + len(second) :] = -100
        with trainer.bank.routed([0]):
            return float(trainer.row_losses(batch)[0].detach())

    before = loss_of_second()
    split.tokens[: len(first)] = 7
    assert loss_of_second() == before
