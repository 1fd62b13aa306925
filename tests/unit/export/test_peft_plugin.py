"""With flora_train.peft_plugin, plain peft computes, trains, saves, merges and refuses fLoRA as FLORA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.peft_plugin import FloraConfig
from tests.architectures import tiny_model
from tests.conftest import FEW, perturb, spec
from tests.unit.adapters.helpers import logits, plain_logits, tokens

VARIANTS = ("pure", "residual")


def flora_bank(architecture: str) -> AdapterBank:
    specs = [spec("flora", family=variant, rank=3, variant=variant) for variant in VARIANTS]
    bank = AdapterBank.attach(tiny_model(architecture).eval(), specs)
    perturb(bank)
    return bank


@pytest.fixture(params=FEW)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def exported(architecture: str, tmp_path: Path) -> tuple[AdapterBank, Path]:
    bank = flora_bank(architecture)
    for name in bank.ids:
        export_peft(bank, name, tmp_path / name, base=BaseModel("base"), own_type=True)
    return bank, tmp_path


def theirs(architecture: str, folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_model(architecture).eval(), folder).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_exported_adapter_computes_the_same_at_its_own_rank(
    exported: tuple[AdapterBank, Path], architecture: str, variant: str, tmp_path: Path
) -> None:
    bank, folder = exported
    name = f"task-{variant}"
    model = theirs(architecture, folder / name)
    assert (model.peft_config["default"].peft_type.value, model.peft_config["default"].r) == ("FLORA", 3)
    x = tokens(3)
    ours = logits(bank, x, [name] * 3)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=x).logits, ours, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=x).logits, plain_logits(architecture, x))
        model.save_pretrained(tmp_path / "saved")
        again = theirs(architecture, tmp_path / "saved")
        assert torch.equal(again(input_ids=x).logits, model(input_ids=x).logits)
        before = {key: value.clone() for key, value in model.state_dict().items() if "base_layer" in key}
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(input_ids=x).logits, ours, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
        merged = model.merge_and_unload(safe_merge=True)
        torch.testing.assert_close(merged(input_ids=x).logits, ours, rtol=1e-4, atol=1e-5)


def test_two_adapters_take_turns_and_do_not_mix(
    exported: tuple[AdapterBank, Path], architecture: str
) -> None:
    bank, folder = exported
    model = theirs(architecture, folder / "task-pure")
    model.load_adapter(folder / "task-residual", "other")
    for active, name in (("other", "task-residual"), ("default", "task-pure")):
        model.set_adapter(active)
        with torch.no_grad():
            ours = logits(bank, tokens(3), [name] * 3)
            torch.testing.assert_close(model(input_ids=tokens(3)).logits, ours, rtol=1e-4, atol=1e-5)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default and other are active, but only one fLoRA adapter can be"):
        model(input_ids=tokens(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_flora_starts_as_the_base_and_has_the_gradients_of_the_bank(variant: str) -> None:
    targets = ["q_proj", "down_proj"]
    model: Any = get_peft_model(
        tiny_model().double(), FloraConfig(r=3, variant=variant, target_modules=targets)
    )
    bank = AdapterBank.attach(
        tiny_model().double(),
        [spec("flora", rank=3, variant=variant, target_modules=targets)],
        dtype=torch.float64,
    )
    x = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=x).logits, tiny_model().double()(input_ids=x).logits)
    perturb(bank)
    for module, params in bank.parameters_of("task-flora").items():
        layer = model.get_submodule(f"base_model.model.{module}")
        layer.flora_A["default"].data.copy_(params["A"])
        layer.flora_B["default"].data.copy_(params["B"])
    model(input_ids=x).logits.square().mean().backward()
    bank.route([0, 0])
    bank.model(input_ids=x).logits.square().mean().backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("flora_" in name for name in trained)
    (pool,) = bank.pools
    for module in bank.parameters_of("task-flora"):
        for side in "AB":
            mine = gradient_of(pool, bank, module, side)
            torch.testing.assert_close(trained[f"base_model.model.{module}.flora_{side}.default"], mine)


def gradient_of(pool: Any, bank: AdapterBank, module: str, side: str) -> Tensor:
    """A view of the pool's gradients where the parameter is a view of its values."""
    view = bank.parameters_of("task-flora")[module][side]
    gradients = pool.gradients.reshape(-1)
    return gradients.as_strided(
        view.shape, view.stride(), view.storage_offset() - pool.values.storage_offset()
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"r": 0}, "r = 0: the rank must be at least 1"),
        ({"variant": "plain"}, "variant = 'plain': must be pure, W0 * (B A), or residual"),
    ],
)
def test_bad_values_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)").replace("*", r"\*")):
        FloraConfig(**words)


def test_layer_that_is_not_linear_is_refused() -> None:
    with pytest.raises(
        TypeError, match="embed_tokens has the type Embedding: fLoRA supports Linear and Conv1D"
    ):
        get_peft_model(tiny_model(), FloraConfig(target_modules=["embed_tokens"]))
