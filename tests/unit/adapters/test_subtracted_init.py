"""PiSSA, OLoRA and similar adapters, which PEFT relates to a changed base, on the original base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.init_from import read_outline
from flora_train.adapters.peft_config import PeftConfig
from flora_train.adapters.subtracted_init import plain_config
from flora_train.config.errors import UserError
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft, read_peft
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.adapters.helpers import logits, tokens

TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}


def trained(
    folder: Path, init: str, *, architecture: str = "llama", initial: Path | None = None, **options: Any
) -> Any:
    """A model of PEFT with random numbers; its adapter is in `folder`, its first state in `initial`."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[architecture], **options}
    config = LoraConfig(
        init_lora_weights=init, task_type="CAUSAL_LM", fan_in_fan_out=architecture == "gpt2", **options
    )
    model: Any = get_peft_model(tiny_model(architecture), config).eval()
    if initial is not None:
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(initial)
        model.peft_config["default"].init_lora_weights = init
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def started(
    folder: Path, method: str = "lora", *, architecture: str = "llama", **options: Any
) -> AdapterBank:
    """A bank of one adapter of the same settings, on the original base."""
    config = plain_config(PeftConfig({**read_peft(str(folder), "key")[0].options}))
    settings = {"rank": config.rank, "alpha": config.alpha, "rslora": config.rslora}
    settings |= {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    ours = spec(method, target_modules=TARGETS[architecture], init_from=str(folder), **settings, **options)
    bank = AdapterBank.attach(tiny_model(architecture).eval(), [ours])
    init_from_peft(bank, [0])
    return bank


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {r"0\..*q_proj": 3}},
        {"use_dora": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_it_computes_on_the_original_base_what_it_computes_in_peft(
    init: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = trained(tmp_path / "theirs", init, **options)
    bank = started(tmp_path / "theirs", "dora" if "use_dora" in options else "lora")
    x = tokens(2)
    with torch.no_grad():
        expected = theirs(input_ids=x).logits
    assert (expected - logits(bank, x, [-1, -1])).abs().max() > 0.05
    torch.testing.assert_close(logits(bank, x, [0, 0]), expected, rtol=1e-4, atol=1e-5)
    folder = export_peft(bank, bank.specs[0].name, tmp_path / "ours", base=BaseModel("base"))
    again = PeftModel.from_pretrained(tiny_model().eval(), str(folder))
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=x).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_pissa_of_transposed_layers(tmp_path: Path) -> None:
    theirs = trained(tmp_path / "theirs", "pissa", architecture="gpt2")
    bank = started(tmp_path / "theirs", architecture="gpt2")
    x = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(logits(bank, x, [0, 0]), theirs(input_ids=x).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("where", ["inside", "beside"])
def test_a_random_initialisation_is_read_with_its_initial_adapter(where: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "theirs"
    theirs = trained(folder, "pissa_niter_2", initial=tmp_path / "pissa_init")
    name = r"init_lora_weights='pissa_niter_2'.*pissa_init.*path_initial_model_for_weight_conversion"
    with pytest.raises(UserError, match=name):
        read_peft(str(folder), "key")
    with pytest.raises(UserError, match=name):
        read_outline(str(folder), "key", [])
    place = folder if where == "inside" else folder.parent
    shutil.copytree(tmp_path / "pissa_init", place / "pissa_init")
    bank = started(folder)
    x = tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(logits(bank, x, [0, 0]), theirs(input_ids=x).logits, rtol=1e-4, atol=1e-5)


def test_an_initial_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "theirs", "pissa_niter_2")
    trained(tmp_path / "other", "pissa", initial=tmp_path / "pissa_init", r=2)
    with pytest.raises(UserError, match=r"does not begin as .*pissa_init.*differ"):
        read_peft(str(tmp_path / "theirs"), "key")
    (tmp_path / "pissa_init" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"initial adapter that cannot be read"):
        read_peft(str(tmp_path / "theirs"), "key")


def test_peft_s_own_conversion_is_the_same_lora(tmp_path: Path) -> None:
    """Converted by PEFT: twice the rank, and read as any LORA."""
    theirs = trained(tmp_path / "theirs", "pissa", initial=tmp_path / "pissa_init")
    x = tokens(2)
    with torch.no_grad():
        expected = theirs(input_ids=x).logits
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "pissa_init")
    )
    converted = started(tmp_path / "converted")
    assert converted.specs[0].rank == 8
    torch.testing.assert_close(logits(converted, x, [0, 0]), expected, rtol=1e-4, atol=1e-5)
    ours = started(tmp_path / "theirs")
    torch.testing.assert_close(logits(ours, x, [0, 0]), expected, rtol=1e-4, atol=1e-5)
