"""What is read from an adapter folder computes what PEFT computes; everything else is refused with its
reason."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, HiraConfig, IA3Config, LoraConfig, VeraConfig
from torch import Tensor

from flora_train.config.errors import UserError
from flora_train.peft_plugin import FloraConfig
from flora_train.serving import adapter_files
from flora_train.serving.adapter_files import LoraFolder, flora_multiplier, read_adapter
from flora_train.serving.multipliers import MultiplicativeAdapter, Multiplier
from tests.unit.serving.adapter_folders import (
    CONFIG,
    WEIGHTS,
    change_config,
    change_tensors,
    exported,
    loaded_by_peft,
    saved_by_peft,
)
from tests.unit.serving.damages import DAMAGES

LLAMA = ["q_proj", "down_proj"]
CASES: dict[str, tuple[str, Any]] = {
    "HIRA": ("llama", HiraConfig(r=3, target_modules=LLAMA, task_type="CAUSAL_LM")),
    "HIRA with a bias": ("gpt_bigcode", HiraConfig(r=2, target_modules=["c_attn", "c_proj"])),
    "HIRA on Conv1D": ("gpt2", HiraConfig(r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "FLORA pure": ("llama", FloraConfig(r=3, variant="pure", target_modules=LLAMA)),
    "FLORA residual": ("llama", FloraConfig(r=3, variant="residual", target_modules=LLAMA)),
    "FLORA with ranks": (
        "llama",
        FloraConfig(r=2, variant="pure", target_modules=LLAMA, rank_pattern={"down_proj": 3}),
    ),
    "IA3": ("llama", IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"])),
    "IA3 with a bias": (
        "gpt_bigcode",
        IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"]),
    ),
    "IA3 on Conv1D": (
        "gpt2",
        IA3Config(target_modules=["c_attn", "c_proj"], feedforward_modules=["c_proj"], fan_in_fan_out=True),
    ),
}


def applied(multiplier: Multiplier, base: Any, x: Tensor) -> Tensor:
    """The formula of `Multiplier`, term by term, in float64."""
    bias = base.bias if base.bias is not None else torch.zeros((), dtype=x.dtype)

    def product(rows: Tensor) -> Tensor:
        return base(rows) - bias

    y = product(x) * float(multiplier.keep_base)
    total_bias = bias
    for a, b in zip(multiplier.A.double(), multiplier.B.double().T, strict=True):
        y = y + b * product(a * x)
        if multiplier.scales_output:
            total_bias = total_bias * (1 + b)
    return y + total_bias


def check_equal_to_peft(folder: Path, architecture: str) -> MultiplicativeAdapter:
    """Every layer of the adapter computes in float64 what the layer of PEFT computes."""
    adapter = read_adapter(folder)
    assert isinstance(adapter, MultiplicativeAdapter)
    peft_model = loaded_by_peft(folder, architecture)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peft_model.named_modules()
        if hasattr(layer, "base_layer")
    }
    assert set(adapter.multipliers) == set(layers)
    generator = torch.Generator().manual_seed(5)
    for name, multiplier in adapter.multipliers.items():
        layer: Any = layers[name]
        inputs = layer.in_features
        x = torch.randn(4, inputs, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected = layer(x)
            result = applied(multiplier, layer.base_layer, x)
            torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
            whole = multiplier.expanded(inputs, layer.out_features)
            assert whole.A.shape == (multiplier.rank, inputs)
            assert whole.B.shape == (layer.out_features, multiplier.rank)
            torch.testing.assert_close(applied(whole, layer.base_layer, x), expected, rtol=1e-6, atol=1e-6)
            assert (expected - layer.base_layer(x)).abs().max() > 1e-2
    return adapter


@pytest.mark.parametrize("case", CASES)
def test_adapters_that_peft_saved_compute_the_same(case: str, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    folder = saved_by_peft(config, tmp_path / "a", architecture=architecture)
    check_equal_to_peft(folder, architecture)


@pytest.mark.parametrize("variant", ["pure", "residual"])
@pytest.mark.parametrize("own_type", [False, True])
def test_exported_flora_computes_the_same_with_its_trained_rank(
    variant: str, own_type: bool, tmp_path: Path
) -> None:
    folder = exported(tmp_path / "a", "flora", rank=4, variant=variant, own_type=own_type)
    adapter = check_equal_to_peft(folder, "llama")
    assert adapter.rank == 4
    assert {multiplier.keep_base for multiplier in adapter.multipliers.values()} == {variant == "residual"}


@pytest.mark.parametrize("variant", ["pure", "residual"])
def test_ranks_that_an_export_adds_are_dropped(variant: str, tmp_path: Path) -> None:
    folder = exported(tmp_path / "a", "flora", rank=2, variant=variant, rank_pattern={"q_proj": 5})
    adapter = check_equal_to_peft(folder, "llama")
    for name, multiplier in adapter.multipliers.items():
        assert multiplier.rank == (5 if "q_proj" in name else 2)


def test_exported_ia3_computes_the_same(tmp_path: Path) -> None:
    folder = exported(
        tmp_path / "a", "ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    adapter = check_equal_to_peft(folder, "llama")
    assert adapter.method == "ia3"
    for name, multiplier in adapter.multipliers.items():
        assert multiplier.scales_output == ("k_proj" in name)


def test_a_rank_that_subtracts_the_base_is_found_anywhere_and_once() -> None:
    A, B = torch.rand(3, 5), torch.rand(4, 3)
    A[0], B[:, 0] = 1, -1
    multiplier = flora_multiplier(A, B, keep_base=True)
    assert not multiplier.keep_base
    assert torch.equal(multiplier.A, A[1:])
    assert torch.equal(multiplier.B, B[:, 1:])
    A[1], B[:, 1] = 1, -1
    twice = flora_multiplier(A, B, keep_base=True)
    assert not twice.keep_base
    assert twice.rank == 2
    kept = flora_multiplier(A, B, keep_base=False)
    assert kept.rank == 3
    A[2, 3] = 0.5
    B[1, 0] = -1.0001
    assert flora_multiplier(A[[0]], B[:, [0]], keep_base=True).keep_base


def test_one_rank_stays_where_none_has_an_effect() -> None:
    nothing = flora_multiplier(torch.rand(3, 5), torch.zeros(4, 3), keep_base=True)
    assert nothing.rank == 1
    assert not nothing.B.any()
    removed = flora_multiplier(torch.ones(1, 5), -torch.ones(4, 1), keep_base=True)
    assert removed.keep_base
    assert removed.rank == 1


def test_half_precision_is_read_exactly(tmp_path: Path) -> None:
    folder = saved_by_peft(HiraConfig(r=3, target_modules=LLAMA), tmp_path / "a")
    change_tensors(folder, lambda tensors: {name: t.bfloat16() for name, t in tensors.items()})
    adapter = check_equal_to_peft(folder, "llama")
    assert all(multiplier.A.dtype == torch.float32 for multiplier in adapter.multipliers.values())


def test_lora_is_checked_and_left_to_vllm(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules=LLAMA, rank_pattern={"q_proj": 5}, use_rslora=True)
    folder = saved_by_peft(config, tmp_path / "a")
    lora = read_adapter(folder)
    assert isinstance(lora, LoraFolder)
    assert lora.rank == 5
    assert lora.converted is None
    assert {layer.rank for name, layer in lora.layers.items() if "down_proj" in name} == {3}


def test_adalora_becomes_an_equal_lora(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=3, target_r=3, total_step=10, target_modules=LLAMA, lora_alpha=6)
    lora = read_adapter(saved_by_peft(config, tmp_path / "a"))
    assert isinstance(lora, LoraFolder)
    assert lora.converted is not None
    new, tensors = lora.converted
    peft_model: Any = loaded_by_peft(tmp_path / "a")
    for name, layer in peft_model.named_modules():
        if not hasattr(layer, "lora_E"):
            continue
        A, B = (tensors[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        x = torch.randn(4, layer.in_features, dtype=torch.float64)
        scale = new.scale_at(name.removeprefix("base_model.model."))
        torch.testing.assert_close(
            layer(x), layer.base_layer(x) + scale * (x @ A.T @ B.T), rtol=1e-6, atol=1e-6
        )


def first(tensors: dict[str, Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


def with_number(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[first(tensors, "hira_B")][0, 0] = value

    return change


def removed(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[first(tensors, part)]

    return change


def reshaped(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        name = first(tensors, part)
        tensors[name] = tensors[name].flatten()

    return change


def added(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = torch.zeros(shape)

    return change


HIRA = HiraConfig(r=3, target_modules=LLAMA)
LORA = LoraConfig(r=3, target_modules=LLAMA)
LAYER = "base_model.model.model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("config", "change", "reason"),
    [
        (HIRA, with_number(math.nan), "not finite"),
        (HIRA, with_number(math.inf), "not finite"),
        (HIRA, removed("hira_A"), "is damaged: it lacks .*hira_A"),
        (HIRA, reshaped("hira_A"), "has shape .*the files do not belong together"),
        (HIRA, lambda tensors: dict.fromkeys(()) or {"x": torch.zeros(1)}, "not a tensor of a plain HIRA"),
        (HIRA, added("base_model.model.model.embed_tokens.hira_embedding_A", (3, 8)), "adapts an embedding"),
        (HIRA, added("base_model.model.lm_head.weight", (8, 8)), "not a tensor of a plain HIRA"),
        (LORA, removed("lora_B"), "has .*lora_A.weight, and no B of that layer"),
        (LORA, reshaped("lora_A"), "has shape .*and adapter_config.json the rank 3"),
        (LORA, added(f"{LAYER}.lora_magnitude_vector", (8,)), "not a tensor of a plain LORA"),
        (LORA, added(f"{LAYER}.lora_B.bias", (8,)), "not a tensor of a plain LORA"),
        (LORA, added(f"{LAYER}.ia3_l", (8, 1)), "not a tensor of a plain LORA"),
        (
            LORA,
            lambda tensors: {name: (100 * t).to(torch.int8) for name, t in tensors.items()},
            "has dtype torch.int8",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(config: Any, change: Any, reason: str, tmp_path: Path) -> None:
    folder = saved_by_peft(config, tmp_path / "a")
    read_adapter(folder)
    change_tensors(folder, change)
    with pytest.raises(UserError, match=reason):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (HIRA, {"r": 5}, "the files do not belong together"),
        (HIRA, {"r": 0}, "must be a whole number of 1 or more"),
        (HIRA, {"r": "3"}, "must be a whole number of 1 or more"),
        (HIRA, {"peft_type": "LORA", "lora_alpha": 3}, "hira"),
        (HIRA, {"peft_type": "VERA"}, "has the PEFT type VERA: supported are"),
        (HIRA, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (HIRA, {"hira_alpha": 2.0}, "unknown key, which may change what the adapter computes"),
        (LORA, {"r": 5}, "has shape .* the rank 5"),
        (LORA, {"rank_pattern": {"q_proj": 4}}, "has shape .* the rank 4"),
        (LORA, {"use_dora": True}, "is a DoRA.*--as merged"),
        (LORA, {"lora_bias": True}, "lora_bias"),
        (LORA, {"trainable_token_indices": [1]}, "trainable_token_indices"),
        (LORA, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (LORA, {"init_lora_weights": "pissa"}, "relative to a changed base model"),
        (LORA, {"arrow_config": {"x": 1}}, "arrow_config"),
        (LORA, {"lora_alpha": "x"}, "lora_alpha"),
    ],
)
def test_options_that_change_the_computation_are_refused(
    config: Any, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = saved_by_peft(config, tmp_path / "a")
    change_config(folder, **options)
    with pytest.raises(UserError, match=reason):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["r", "lora_alpha"])
def test_lora_without_a_required_key_is_refused(name: str, tmp_path: Path) -> None:
    folder = saved_by_peft(LORA, tmp_path / "a")
    content = json.loads((folder / CONFIG).read_text())
    del content[name]
    (folder / CONFIG).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"has no {name}"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"task_type": "SEQ_CLS", "modules_to_save": ["score"]},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "mica"},
        {"fan_in_fan_out": True},
    ],
)
def test_lora_that_vllm_serves_exactly_is_accepted(options: dict[str, Any], tmp_path: Path) -> None:
    folder = saved_by_peft(LORA, tmp_path / "a")
    change_config(folder, **options)
    change_tensors(folder, added("base_model.model.model.embed_tokens.base_layer.weight", (8, 8)))
    if "modules_to_save" in options:
        change_tensors(folder, added("base_model.model.score.weight", (2, 8)))
    assert isinstance(read_adapter(folder), LoraFolder)


def test_other_types_are_refused(tmp_path: Path) -> None:
    config = VeraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="has the PEFT type VERA"):
        read_adapter(saved_by_peft(config, tmp_path / "a"))


def test_ia3_whose_shapes_contradict_its_configuration_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=LLAMA, feedforward_modules=["down_proj"])
    folder = saved_by_peft(config, tmp_path / "a")
    change_config(folder, feedforward_modules=["q_proj", "down_proj"])
    with pytest.raises(UserError, match="feedforward_modules makes it one of inputs"):
        read_adapter(folder)


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
@pytest.mark.parametrize("config", [HIRA, LORA])
def test_damaged_folders_are_refused(
    damage: Callable[[Path], None], reason: str, config: Any, tmp_path: Path
) -> None:
    folder = saved_by_peft(config, tmp_path / "a")
    damage(folder)
    with pytest.raises(UserError, match=reason):
        read_adapter(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b"])
def test_impossible_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter = "):
        read_adapter(tmp_path / name)


def test_names_on_the_hub_are_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="adapter = 'someone/adapter': there is no such folder"):
        read_adapter("someone/adapter")


def test_odd_names_and_links_are_read(tmp_path: Path) -> None:
    folder = saved_by_peft(HIRA, tmp_path / "a\n\x1b[31m ü'\"")
    (tmp_path / "link").symlink_to(folder)
    assert isinstance(read_adapter(tmp_path / "link"), MultiplicativeAdapter)
    change_config(folder, r=5)
    with pytest.raises(UserError) as error:
        read_adapter(folder)
    assert "\x1b" not in str(error.value)
    assert "\n" not in str(error.value)


def test_too_large_files_are_refused_without_being_read(tmp_path: Path) -> None:
    folder = saved_by_peft(HIRA, tmp_path / "a")
    os.truncate(folder / WEIGHTS, adapter_files.MOST_BYTES + 1)
    with pytest.raises(UserError, match="too large for an adapter"):
        read_adapter(folder)


def test_error_names_what_the_caller_shows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter = 'lua-flora': there is no such folder"):
        read_adapter(tmp_path / "nothing", shown="lua-flora")
