"""Adapters with heads start from PEFT folders with heads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec, head_shape
from flora_train.config.errors import UserError
from flora_train.data.labels.spec import LabelSpec
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from tests.architectures import tiny_model
from tests.conftest import perturb, spec

KINDS = LabelSpec("single", ("x", "y", "z"))
METHODS: dict[str, dict[str, Any]] = {
    "flora": {"rank": 2, "variant": "residual"},
    "lora": {"rank": 2},
    "ia3": {},
    "head": {},
}


def labelled(method: str, labels: LabelSpec = KINDS, **options: Any) -> AdapterSpec:
    return replace(
        spec(method, "kinds", **METHODS[method], **options), head=head_shape(labels), labels=labels
    )


def exported(method: str, folder: Path) -> AdapterBank:
    """The bank whose only adapter the folder holds."""
    bank = AdapterBank.attach(tiny_model("distilbert"), [labelled(method)])
    perturb(bank)
    export_peft(bank, f"kinds-{method}", folder, base=BaseModel("base"))
    return bank


@pytest.mark.parametrize("method", METHODS)
def test_adapter_and_head_are_those_of_the_folder(method: str, tmp_path: Path) -> None:
    source = exported(method, tmp_path / "adapter")
    bank = AdapterBank.attach(
        tiny_model("distilbert"), [labelled(method, init_from=str(tmp_path / "adapter"))]
    )
    assert not torch.equal(bank.row(0), source.row(0))
    init_from_peft(bank, [0])
    assert torch.equal(bank.row(0), source.row(0))


@pytest.mark.parametrize("labels", [("a", "b", "c"), ("x", "y")], ids=["others", "fewer"])
def test_head_of_other_labels_begins_anew(labels: tuple[str, ...], tmp_path: Path) -> None:
    source = exported("lora", tmp_path / "adapter")
    own = labelled("lora", LabelSpec("single", labels), init_from=str(tmp_path / "adapter"))
    bank = AdapterBank.attach(tiny_model("distilbert"), [own])
    before = {name: tensor.clone() for name, tensor in bank.head_of("kinds-lora").items()}
    init_from_peft(bank, [0])
    pool, _ = bank.location[0]
    assert torch.equal(bank.row(0)[: pool.head_start], source.row(0)[: pool.head_start])
    for name, tensor in bank.head_of("kinds-lora").items():
        assert torch.equal(tensor, before[name])


def test_head_has_no_place_in_an_adapter_without_labels(tmp_path: Path) -> None:
    exported("lora", tmp_path / "adapter")
    own = spec("lora", "kinds", rank=2, init_from=str(tmp_path / "adapter"))
    bank = AdapterBank.attach(tiny_model("distilbert"), [own])
    with pytest.raises(UserError, match="has a head"):
        init_from_peft(bank, [0])
