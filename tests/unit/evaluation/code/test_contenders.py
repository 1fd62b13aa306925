"""PEFT contenders have their own base model, and only those that PEFT loads completely are accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, OSFConfig, PolyConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flora_train.config.errors import UserError
from flora_train.evaluation.code.contenders import check_fit, check_peft_contenders, peft_contender
from tests.architectures import tiny_model

TARGETS = ["q_proj", "v_proj"]
X = torch.arange(2, 20).reshape(2, 9)


def saved(folder: Path, config: Any, **options: Any) -> str:
    """An adapter of random numbers that PEFT made and saved."""
    model = get_peft_model(base(), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if options.get("save_embedding_layers"):
        model.get_input_embeddings().weight.data += 1.0
    model.save_pretrained(folder, **options)
    return str(folder)


def base() -> nn.Module:
    return tiny_model().eval()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options)


def judged(sources: list[str]) -> list[Tensor]:
    """Logits of contenders one after the other."""
    found = []
    for source in sources:
        with peft_contender(source, base, ["sh"]) as (_, model, _), torch.no_grad():
            found.append(model(input_ids=X).logits)
    return found


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_of_a_changed_base_is_refused_by_name(init: str, tmp_path: Path) -> None:
    source = saved(tmp_path / "theirs", lora(init_lora_weights=init))
    with pytest.raises(
        UserError,
        match=f"contenders = .*init_lora_weights='{init}'.*path_initial_model_for_weight_conversion",
    ):
        check_peft_contenders([source], [])


def test_no_contender_changes_the_base_model_of_the_next(tmp_path: Path) -> None:
    changing = [
        saved(tmp_path / "embeddings", lora(), save_embedding_layers=True),
        saved(tmp_path / "osf", OSFConfig(target_modules=TARGETS, task_type="CAUSAL_LM")),
    ]
    plain = saved(tmp_path / "plain", lora())
    check_peft_contenders([*changing, plain], ["base"])
    alone = judged([plain])[0]
    for source in changing:
        first, second = judged([source, plain])
        assert torch.equal(second, alone)
        assert not torch.equal(first, alone)


def test_peft_contenders_of_every_method_that_fits_are_evaluated(tmp_path: Path) -> None:
    sources = [
        saved(tmp_path / "dora", lora(use_dora=True)),
        saved(tmp_path / "vera", VeraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")),
    ]
    check_peft_contenders(sources, ["base"])
    check_fit(sources, base)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path / "theirs", lora())
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"contenders = .*not finite"):
        check_peft_contenders([source], [])


@pytest.mark.parametrize("targets", [["q_proj"], [*TARGETS, "k_proj"]], ids=["left-out", "missing"])
def test_an_adapter_that_peft_loads_in_part_is_refused_before_anything_is_written(
    targets: list[str], tmp_path: Path
) -> None:
    source = saved(tmp_path / "theirs", lora())
    file = tmp_path / "theirs" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": targets}))
    with pytest.raises(UserError, match=r"contenders = .*does not fit this base model"):
        check_fit([source], base)


def test_an_adapter_that_needs_more_than_tokens_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = saved(tmp_path / "theirs", PolyConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match=r"contenders = .*does not run on tokens alone"):
        check_fit([source], base)
