"""The folder of a routed adapter: its parts are adapters of plain PEFT, and its loader computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from flora_train.adapters.routed.init_from import read_source
from flora_train.adapters.routed.parts import parts_of
from flora_train.config.errors import UserError
from flora_train.export import routed_format
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from flora_train.export.routed_format import export_adapter, export_routed
from flora_train.export.routed_snippet import LOADER
from flora_train.runtime.manifest import Manifest
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.adapters.helpers import tokens
from tests.unit.export.routed_banks import logits_of, routed_bank, routed_specs, save_base

ROUTED = ["a-mix", "a-fmix", "a-imix"]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ROUTED)
def test_every_part_is_an_adapter_of_plain_peft(tmp_path: Path, architecture: str, name: str) -> None:
    bank = routed_bank(architecture)
    folder = export_adapter(bank, name, tmp_path / name, base=BaseModel("tiny"))
    pool, member = bank.location[bank.id_of(name)]
    parts = parts_of(pool, pool.specs[member])
    assert {part.name for part in parts} == {path.name for path in folder.iterdir() if path.is_dir()}
    for part in parts:
        model = PeftModel.from_pretrained(tiny_model(architecture), str(folder / part.name))
        written = load_file(folder / part.name / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model)
        assert written.keys() == loaded.keys()
        assert all(torch.equal(written[key], loaded[key]) for key in written)
        assert _number_of_modules(written) == len(part.targets) > 0
    routers = load_file(folder / "router.safetensors")
    for module, router in routers.items():
        assert torch.equal(router, bank.parameters_of(name)[module]["router"])
    assert len(routers) == 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ROUTED)
def test_the_loader_computes_the_logits_without_this_package(
    tmp_path: Path, architecture: str, name: str
) -> None:
    bank = routed_bank(architecture)
    base = save_base(architecture, tmp_path / "base")
    folder = export_adapter(bank, name, tmp_path / name, base=BaseModel(str(base)))
    theirs = run_loader(folder, base)
    ours = logits_of(bank, name)
    assert (theirs - ours).abs().max() <= 1e-5
    assert (theirs - logits_of(bank, "__base__")).abs().max() > 1e-3


@torch.no_grad()
def run_loader(folder: Path, base: Path) -> Tensor:
    """Logits of the model that the card's lines load, in which nothing of this package is imported."""
    model = AutoModelForCausalLM.from_pretrained(base)
    names: dict[str, Any] = {"folder": str(folder), "base": model}
    exec("import json\nfrom peft import PeftModel\nfrom safetensors.torch import load_file\n" + LOADER, names)
    return names["model"](input_ids=tokens(3)).logits


@pytest.mark.parametrize("name", ROUTED)
def test_a_routed_adapter_starts_from_its_folder(tmp_path: Path, name: str) -> None:
    bank = routed_bank()
    folder = export_adapter(bank, name, tmp_path / name, base=BaseModel("tiny"))
    specs = routed_specs(init_from=str(folder))
    chosen = next(each for each in specs if each.name == name)
    other = routed_bank(specs=[chosen])
    init_from_peft(other, [0])
    assert torch.equal(other.row(0), bank.row(bank.id_of(name)))


def test_the_folder_of_another_shape_is_refused(tmp_path: Path) -> None:
    bank = routed_bank()
    folder = export_adapter(bank, "a-mix", tmp_path / "mix", base=BaseModel("tiny"))
    other = spec("mixlora", "a", "mix", experts=2, rank=2, alpha=3.0, rslora=True, init_from=str(folder))
    with pytest.raises(UserError, match=r"expert_2 is on one side only"):
        init_from_peft(routed_bank(specs=[other]), [0])
    narrow = spec("mixlora", "a", "mix", experts=3, rank=3, alpha=3.0, rslora=True, init_from=str(folder))
    with pytest.raises(UserError, match=r"shape \(2, 32\) instead of \(3, 32\)"):
        init_from_peft(routed_bank(specs=[narrow]), [0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("router", "the router of model.layers.0.mlp has shape"),
        ("routing", r"routing.json: top_k: "),
        ("expert", r"is not a PEFT adapter"),
        ("other", "expert_1 has other tensors than expert_0"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: str, message: str) -> None:
    folder = export_routed(routed_bank(), "a-mix", tmp_path / "mix", base=BaseModel("tiny"))
    if damage == "router":
        routers = load_file(folder / "router.safetensors")
        save_file(
            {name: router[:2].clone() for name, router in routers.items()}, folder / "router.safetensors"
        )
    elif damage == "routing":
        content = json.loads((folder / "routing.json").read_text())
        (folder / "routing.json").write_text(json.dumps({**content, "top_k": "two"}))
    elif damage == "expert":
        (folder / "expert_1" / "adapter_config.json").unlink()
    else:
        file = folder / "expert_1" / "adapter_model.safetensors"
        tensors = load_file(file)
        gone = "base_model.model.model.layers.0.mlp.up_proj"
        save_file({name: tensor for name, tensor in tensors.items() if not name.startswith(gone)}, file)
    with pytest.raises(UserError, match=message):
        read_source(str(folder), "adapters.mix.init_from")


def test_a_new_export_replaces_the_old_one_with_more_experts(tmp_path: Path) -> None:
    bank = routed_bank()
    folder = export_routed(bank, "a-imix", tmp_path / "adapter", base=BaseModel("tiny"))
    (folder / "notes.txt").write_text("mine")
    export_routed(bank, "a-fmix", folder, base=BaseModel("tiny"))
    assert sorted(path.name for path in folder.glob("expert_*")) == ["expert_0", "expert_1"]
    assert (folder / "notes.txt").read_text() == "mine"
    assert read_source(str(folder), "init_from").routing.expert == "flora"
    with pytest.raises(UserError, match="exists already"):
        export_routed(bank, "a-fmix", folder, base=BaseModel("tiny"), replace=False)


def test_a_failed_export_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = routed_bank()
    folder = export_routed(bank, "a-mix", tmp_path / "adapters" / "mix", base=BaseModel("tiny"))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    calls = []

    def fail(tensors: Any, path: Path, metadata: Any = None) -> None:
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(routed_format, "save_file", fail)
    with pytest.raises(UserError, match="disk is full"):
        export_routed(bank, "a-mix", folder, base=BaseModel("other"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["mix"]


def test_the_manifest_of_a_run_names_every_file(tmp_path: Path) -> None:
    bank, name = routed_bank(), "a-mix"
    folder = export_routed(bank, name, tmp_path / "adapters" / name, base=BaseModel("tiny"))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    assert Manifest.of([name]).files(tmp_path) == files


def _number_of_modules(tensors: dict[str, Tensor]) -> int:
    ends = ("lora_A.weight", "hira_A", "ia3_l")
    return sum(name.endswith(ends) for name in tensors)
