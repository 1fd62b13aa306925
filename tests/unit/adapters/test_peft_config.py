"""PEFT adapters are read only if their tensors define what they compute; all others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, HiraConfig, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.peft_config import HARMLESS, PeftConfig, check_harmless
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.export.peft_import import init_from_peft, read_peft
from flora_train.peft_plugin import FloraConfig
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.adapters.helpers import logits, tokens

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "LORA": LoraConfig,
    "ADALORA": AdaLoraConfig,
    "IA3": IA3Config,
    "HIRA": HiraConfig,
    "FLORA": FloraConfig,
}


def saved(
    folder: Path, *, model: Any = None, initial: Path | None = None, **options: Any
) -> tuple[Path, Any]:
    """A LORA of random numbers that PEFT made and saved, and its model."""
    wanted = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    adapted = get_peft_model(tiny_model() if model is None else model, LoraConfig(**wanted)).eval()
    if initial is not None:
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(initial)
        adapted.peft_config["default"].init_lora_weights = options["init_lora_weights"]
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(
        folder, path_initial_model_for_weight_conversion=None if initial is None else str(initial)
    )
    return folder, adapted


def started(folder: Path, ours: AdapterSpec) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model().eval(), [replace(ours, init_from=str(folder))])
    init_from_peft(bank, [0])
    return bank


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_key_of_peft_s_configurations_is_decided(kind: str) -> None:
    assert {field.name for field in fields(CONFIGS[kind])} <= HARMLESS[kind].keys()


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"use_rslora": True},
        {"fan_in_fan_out": True},
        {"lora_dropout": 0.1},
        {"task_type": None},
        {"task_type": "FEATURE_EXTRACTION"},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"target_modules": r".*\.(q_proj|down_proj)"},
    ],
    ids=str,
)
def test_a_lora_with_harmless_options_gives_peft_s_logits(options: dict[str, Any], tmp_path: Path) -> None:
    folder, theirs = saved(tmp_path / "a", **options)
    x, alpha = tokens(2), 6.0
    modules = [
        n.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for n in read_peft(str(folder), "k")[1]
        if "_A" in n
    ]
    bank = started(
        folder,
        spec("lora", rank=4, alpha=alpha, rslora=bool(options.get("use_rslora")), target_modules=modules),
    )
    with torch.no_grad():
        expected = theirs.base_model.model(input_ids=x).logits
    torch.testing.assert_close(logits(bank, x, [0, 0]), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
        ({"use_dora": True}, "is a DoRA.*set method to dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, "embed_tokens"),
        ({"task_type": "SEQ_CLS"}, "has a head .modules_to_save., and tasks.task has no labels"),
        ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    ],
    ids=str,
)
def test_peft_options_with_another_meaning_are_refused_by_name(
    options: dict[str, Any], named: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    from tests.architectures import architecture_config

    model = None
    if options.get("task_type") == "SEQ_CLS":
        model = AutoModelForSequenceClassification.from_config(architecture_config("llama"))
    folder, _ = saved(tmp_path / "a", model=model, **options)
    with pytest.raises(UserError, match=f"adapters.lora.init_from.*{named}"):
        started(folder, spec("lora", rank=4, alpha=6.0, target_modules=TARGETS))


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "a_new_method"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "lora_ga"},
        {"init_lora_weights": 1},
        {"init_lora_weights": ["pissa"]},
        {"init_lora_weights": "pissa_niter_x"},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"(": 2}},
        {"use_dora": 1},
        {"a_new_option": True},
        {"a_new_option": "x"},
        {"a_new_option": {"deep": 1}},
        {"use_qalora": True},
        {"lora_bias": True},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"use_bdlora": {"nblocks": 2}},
        {"arrow_config": {"top_k": 2}},
        {"kasa_config": {}, "velora_config": {"rank": 1}},
        {"megatron_config": {"a": 1}},
        {"ensure_weight_tying": True},
        {"r": 0},
        {"r": "4"},
        {"r": True},
        {"r": 3},
        {"lora_alpha": float("nan")},
        {"lora_alpha": None},
        {"target_modules": ["q_proj"]},
        {"target_modules": [*TARGETS, "v_proj"]},
        {"target_modules": 5},
        {"target_modules": "("},
        {"layers_to_transform": [0]},
        {"peft_type": "VERA"},
        {"peft_type": "A_NEW_KIND"},
        {"peft_type": None},
        {"task_type": "A_NEW_TASK"},
        {"inference_mode": "yes"},
    ],
    ids=str,
)
def test_a_configuration_that_is_not_known_to_be_harmless_is_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path / "a")
    edit(folder, **change)
    with pytest.raises(UserError, match=r"adapters\.lora\.init_from = "):
        started(folder, spec("lora", rank=4, alpha=6.0, target_modules=TARGETS))


def test_configuration_of_a_newer_peft_is_accepted(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a")
    edit(
        folder,
        peft_version="9.0.0",
        a_new_option=None,
        another=False,
        a_third={},
        revision="main",
        auto_mapping={"x": "y"},
    )
    started(folder, spec("lora", rank=4, alpha=6.0, target_modules=TARGETS))


def remove(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.pop(name)


def put(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def apply(tensors: dict[str, Any]) -> None:
        tensors[name] = change(tensors.get(name))

    return apply


LAYER = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove(f"{LAYER}.lora_B.weight"), r"lacks base_model.*lora_B"),
        (put(f"{LAYER}.lora_magnitude_vector", lambda t: torch.ones(32)), "holds .*lora_magnitude_vector"),
        (put(f"{LAYER}.lora_B.bias", lambda t: torch.ones(32)), r"holds .*lora_B\.bias"),
        (put(f"{LAYER}.base_layer.weight", lambda t: torch.ones(32, 32)), "holds .*base_layer"),
        (put("base_model.model.score.weight", lambda t: torch.ones(2, 32)), "holds .*score"),
        (put(f"{LAYER}.lora_A.weight", lambda t: t * float("nan")), "not finite"),
        (put(f"{LAYER}.lora_A.weight", lambda t: t.half().fill_(float("inf"))), "not finite"),
        (put(f"{LAYER}.lora_A.weight", lambda t: t.int()), "torch.int32"),
        (put(f"{LAYER}.lora_A.weight", lambda t: t[:2].clone()), "do not belong together"),
        (put(f"{LAYER}.lora_A.weight", lambda t: t.flatten()), "do not belong together"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_a_tensor_that_nothing_accounts_for_is_refused_by_name(
    damage: Any, words: str, tmp_path: Path
) -> None:
    folder, _ = saved(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=words):
        started(folder, spec("lora", rank=4, alpha=6.0, target_modules=TARGETS))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        '"LORA"',
        "[" * 100_000,
        '{"peft_type": {}}',
        '{"peft_type": "LORA", "peft_type": "IA3"}',
        "\0",
        "{}",
    ],
    ids=range(10),
)
def test_a_damaged_configuration_is_one_error(text: str, tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(UserError, match=r"key = .*is not a PEFT adapter"):
        read_peft(str(folder), "key")


def test_damaged_files_of_tensors_are_one_error_and_a_pickle_of_tensors_is_read(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    tensors = {
        name: tensor.clone() for name, tensor in load_file(file).items()
    }  # not of the file, which is damaged next
    whole = file.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2], b"\xff" * 100):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"key = .*is not a PEFT adapter"):
            read_peft(str(folder), "key")
    file.unlink()
    with pytest.raises(UserError, match=r"lacks adapter_model\.safetensors"):
        read_peft(str(folder), "key")
    pickle = folder / "adapter_model.bin"
    for content in ({"a": [1]}, [1, 2], {1: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()}):
        torch.save(content, pickle)
        with pytest.raises(UserError, match="key = "):
            read_peft(str(folder), "key")
    torch.save(tensors, pickle)
    found = read_peft(str(folder), "key")[1]
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["pissa", "all-linear", "("]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.attack
@given(kind=st.sampled_from(sorted(HARMLESS)), data=st.data())
def test_any_value_of_any_key_is_accepted_or_a_user_error(kind: str, data: st.DataObject) -> None:
    config = {"peft_type": kind, "r": 4, "init_r": 4, "lora_alpha": 6, "variant": "pure"}
    for key in data.draw(st.lists(st.sampled_from([*HARMLESS[kind], "new"]), max_size=3)):
        config[key] = data.draw(VALUES)
    if not isinstance(config["peft_type"], str):
        config["peft_type"] = kind
    with suppress(UserError):
        check_harmless(PeftConfig(config), "adapter", "key")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("whole") / "a")[0]


@pytest.mark.attack
@given(data=st.data())
def test_any_damage_to_either_file_is_read_or_a_user_error(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray((whole / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(content) - 1, 4000)))  # the header, and a few numbers
        content[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    with TemporaryDirectory() as place_of_copy:
        folder = Path(copytree(whole, Path(place_of_copy) / "a"))
        (folder / name).write_bytes(content)
        with suppress(UserError):
            read_peft(str(folder), "key")
