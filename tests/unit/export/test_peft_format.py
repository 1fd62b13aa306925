"""Exported adapters have the same outputs in plain PEFT, and a failed export leaves no trace."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.export import peft_format
from flora_train.export.peft_format import export_peft, peft_config
from flora_train.export.peft_forms import BaseModel
from tests.architectures import tiny_model
from tests.conftest import FEW, perturb, spec
from tests.unit.adapters.helpers import logits, plain_logits, tiny_t5, tokens
from tests.unit.training.small_disk import file_size_limit

SUBSET = {
    "llama": ["q_proj", "down_proj"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "opt": ["q_proj", "fc2"],
    "phi": ["dense", "fc1"],
}
EXPLICIT: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["q_proj", "o_proj", "up_proj"], ["up_proj"]),
    "gpt2": (["c_attn", "c_proj"], ["attn.c_proj"]),
    "opt": (["q_proj", "out_proj", "fc1"], ["out_proj", "fc1"]),
    "phi": (["q_proj", "dense"], ["dense"]),
}
FAMILIES = ["pure", "residual", "lora", "rslora", "lora_subset", "ia3", "ia3_explicit", "one_layer"]


def exported_specs(architecture: str) -> list[AdapterSpec]:
    targets, inputs = EXPLICIT[architecture]
    layer = {
        "llama": "1.self_attn.o_proj",
        "gpt2": "1.attn.c_proj",
        "opt": "1.self_attn.out_proj",
        "phi": "1.self_attn.dense",
    }
    return [
        spec("flora", family="pure", rank=3, variant="pure"),
        spec("flora", family="residual", rank=4, variant="residual"),
        spec("lora", family="lora", rank=4, alpha=3.0),
        spec("lora", family="rslora", rank=4, alpha=3.0, rslora=True),
        spec("lora", family="lora_subset", rank=2, target_modules=SUBSET[architecture]),
        spec("ia3", family="ia3"),
        spec("ia3", family="ia3_explicit", target_modules=targets, feedforward_modules=inputs),
        spec("flora", family="one_layer", rank=2, target_modules=[layer[architecture]]),
    ]


def perturbed_bank(architecture: str) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model(architecture).eval(), exported_specs(architecture))
    perturb(bank)
    return bank


@dataclass(frozen=True)
class Export:
    """One architecture's adapters: ours in memory, theirs from disk in a process of its own."""

    ours: dict[str, Tensor]
    theirs: dict[str, Tensor]
    plain: Tensor


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    root, x = tmp_path_factory.mktemp("exports"), tokens(3)
    banks = {architecture: perturbed_bank(architecture) for architecture in FEW}
    for architecture, bank in banks.items():
        folder, model = root / architecture, cast(Any, tiny_model(architecture))
        model.save_pretrained(folder / "base")
        save_file({"input_ids": x}, folder / "inputs.safetensors")
        (folder / "class").write_text("AutoModelForCausalLM")
        for name in bank.ids:
            export_peft(bank, name, folder / "adapters" / name, base=BaseModel(str(folder / "base")))
    program = [
        sys.executable,
        str(Path(__file__).with_name("load_with_peft.py")),
        *(str(root / name) for name in banks),
    ]
    done = subprocess.run(program, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {
        architecture: Export(
            ours={name: logits(bank, x, [name] * len(x)) for name in bank.ids},
            theirs=load_file(root / architecture / "logits.safetensors"),
            plain=plain_logits(architecture, x),
        )
        for architecture, bank in banks.items()
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", FEW)
def test_plain_peft_computes_our_logits_from_the_exported_folder(
    exports: dict[str, Export], architecture: str, family: str
) -> None:
    export, name = exports[architecture], f"task-{family}"
    difference = (export.theirs[name] - export.ours[name]).abs().max()
    assert difference <= 1e-5
    assert (export.ours[name] - export.plain).abs().max() > 1e-4


@pytest.mark.parametrize("architecture", FEW)
def test_target_modules_are_short_endings_that_select_exactly_the_targets(architecture: str) -> None:
    bank = perturbed_bank(architecture)
    modules = [name for name, _ in tiny_model(architecture).named_modules()]
    for name, i in bank.ids.items():
        config = PeftConfig.from_peft_type(**peft_config(bank, name, BaseModel("base")))
        pool, _ = bank.location[i]
        assert {module for module in modules if check_target_module_exists(config, module)} == set(
            pool.targets
        ), name
        longest = 3 if name == "task-one_layer" else 2
        assert all(len(suffix.split(".")) <= longest for suffix in config.target_modules)
        inputs = {target.name for target in pool.targets.values() if target.feedforward}
        named = [
            module
            for module in pool.targets
            if module.endswith(tuple(getattr(config, "feedforward_modules", None) or ("\0",)))
        ]
        assert set(named) == inputs, name


def test_folder_holds_peft_s_two_files_with_peft_s_names(tmp_path: Path) -> None:
    bank = perturbed_bank("llama")
    folder = export_peft(bank, "task-pure", tmp_path / "task-pure", base=BaseModel("models/base"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(folder / "adapter_model.safetensors")
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    assert tensors[f"{module}.hira_A"].shape == (4, 32)  # pure, r = 3: one rank more
    assert tensors[f"{module}.hira_B"].shape == (32, 4)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/base"
    assert (config["peft_type"], config["r"], config["task_type"]) == ("HIRA", 4, "CAUSAL_LM")


def test_adapter_of_an_encoder_decoder_says_so_to_peft() -> None:
    bank = AdapterBank.attach(tiny_t5(), [spec("lora", target_modules="all-linear")])
    assert peft_config(bank, "task-lora", BaseModel("base"))["task_type"] == "SEQ_2_SEQ_LM"


def test_export_peft_replaces_its_own_files_and_keeps_others(tmp_path: Path) -> None:
    bank = perturbed_bank("llama")
    folder = tmp_path / "adapter"
    export_peft(bank, "task-lora", folder, base=BaseModel("base"))
    (folder / "notes.txt").write_text("mine")
    bank.row(bank.ids["task-lora"]).fill_(0.5)
    export_peft(bank, "task-lora", folder, base=BaseModel("base"))
    assert (folder / "notes.txt").read_text() == "mine"
    assert all((tensor == 0.5).all() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


FULL_DISKS = {
    "system": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    ),
    "safetensors-quota": SafetensorError(
        "Error while serializing: I/O error: Disk quota exceeded (os error 122)"
    ),
}


@pytest.mark.parametrize("error", FULL_DISKS.values(), ids=FULL_DISKS)
@pytest.mark.parametrize("exists", [False, True])
def test_full_disk_leaves_what_was_there_and_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool, error: Exception
) -> None:
    bank, folder = perturbed_bank("llama"), tmp_path / "adapter"
    if exists:
        export_peft(bank, "task-lora", folder, base=BaseModel("base"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()} if exists else {}

    def fail_halfway(tensors: Any, path: Path, *args: Any) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(peft_format, "save_file", fail_halfway)
    with pytest.raises(UserError, match=r"adapter: the disk is full .* free"):
        export_peft(bank, "task-pure", folder, base=BaseModel("base"))
    assert [path.name for path in tmp_path.iterdir()] == (["adapter"] if exists else [])
    assert not exists or {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("size", [0, 1000, 12_000])
def test_write_that_the_system_refuses_is_one_clear_error(tmp_path: Path, size: int) -> None:
    bank, folder = perturbed_bank("llama"), tmp_path / "adapter"
    with file_size_limit(size), pytest.raises(UserError, match="adapter: the disk is full"):
        export_peft(bank, "task-pure", folder, base=BaseModel("base"))
    assert list(tmp_path.iterdir()) == []
    export_peft(bank, "task-pure", folder, base=BaseModel("base"))
    assert (folder / "adapter_model.safetensors").stat().st_size > size


def test_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(peft_format, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_peft(perturbed_bank("llama"), "task-pure", tmp_path / "adapter", base=BaseModel("base"))
    assert list(tmp_path.iterdir()) == []


def test_a_new_adapter_is_not_written_into_a_folder_that_was_filled_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, folder = AdapterBank.attach(tiny_model(), [spec("lora", family="lora", rank=2)]), tmp_path / "out"

    def fill(tensors: Any, path: Path, header: Any) -> None:
        save_file(tensors, path, header)
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_text("of another")

    monkeypatch.setattr(peft_format, "save_file", fill)
    with pytest.raises(UserError, match="may not be written"):
        export_peft(bank, bank.specs[0].name, folder, base=BaseModel("base"), replace=False)
    assert (folder / "adapter_model.safetensors").read_text() == "of another"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_base_s_hash_is_written_beside_the_adapter_and_replaced(tmp_path: Path) -> None:
    bank, folder = perturbed_bank("llama"), tmp_path / "adapter"
    hashes = {"weights": "a1", "config": "b2"}
    export_peft(bank, "task-pure", folder, base=BaseModel("base", identity=hashes))
    assert json.loads((folder / "flora_train_base.json").read_text()) == {"base": hashes}
    PeftModel.from_pretrained(tiny_model(), folder)
    export_peft(bank, "task-pure", folder, base=BaseModel("base"))
    assert not (folder / "flora_train_base.json").exists()
