"""What gates choose from is read from PEFT folders or a finished run, and refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.gate_members import resolve_members
from flora_train.adapters.spec import expand
from flora_train.config.load import load_config, save_config, validate
from flora_train.config.schema import RunConfig
from flora_train.export.gate_members import members_of
from flora_train.export.peft_format import export_peft
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.unit.adapters.gate_reference import FLORAS, IA3S, LORAS
from tests.unit.adapters.helpers import tokens
from tests.unit.config.helpers import refusal

PLAIN = {
    "lora_one": LORAS["one"],
    "lora_two": LORAS["two"],
    "residual": FLORAS["one"],
    "pure": FLORAS["two"],
    "ia3": IA3S["one"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    tiny_model().save_pretrained(folder)
    return folder


def plain_bank() -> AdapterBank:
    """An adapter of each kind, trained."""
    bank = AdapterBank.attach(tiny_model().eval(), [spec(**one, family=name) for name, one in PLAIN.items()])
    perturb(bank, 0.5)
    return bank


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their exported folders; of a pure fLoRA also under its own PEFT type."""
    bank, parent = plain_bank(), tmp_path_factory.mktemp("adapters")
    written = {}
    for name in PLAIN:
        written[name] = export_peft(bank, f"task-{name}", parent / name, base=BaseModel(str(base)))
    written["own"] = export_peft(bank, "task-pure", parent / "own", base=BaseModel(str(base)), own_type=True)
    return written


def gate_config(base: Path, over: list[Any], **options: Any) -> RunConfig:
    gate = {"method": "meteora", "lr": 1e-3, "over": [str(one) for one in over], **options}
    return validate(
        {
            "name": "small",
            "model": {"path": str(base)},
            "tasks": {"mixed": {"train": "a.jsonl"}},
            "adapters": {"gate": gate},
            "training": {"steps": 10},
        }
    )


def test_the_description_of_members_is_saved_with_the_run(
    base: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    resolved = resolve_members(gate_config(base, [*folders.values()]))
    save_config(resolved, tmp_path / "config.yaml")
    assert load_config([f"recipe={tmp_path / 'config.yaml'}"]) == resolved
    without = gate_config(base, [*folders.values()])
    moved = without.model_copy(update={"model": without.model.model_copy(update={"path": "gone"})})
    assert resolve_members(moved, resolved).adapters == resolved.adapters


@pytest.mark.parametrize("name", [*PLAIN, "own"])
def test_members_of_all_kinds_compute_what_they_did(name: str, base: Path, folders: dict[str, Path]) -> None:
    """With gates of 0, every token goes to the first member, whose outputs are those of the adapter."""
    order = sorted(folders, key=lambda other: other != name)
    config = gate_config(base, [folders[other] for other in order], top_k=1)
    (one,) = expand(resolve_members(config))
    assert one.gate is not None
    assert [member.name for member in one.gate.members] == order
    bank = AdapterBank.attach(tiny_model().eval(), [one])
    init_from_peft(bank, [0])
    for params in bank.parameters_of(one.name).values():
        params["gate"].zero_()
    plain, x = plain_bank(), tokens(2, 6)
    with torch.no_grad():
        with bank.routed([0, 0]):
            found = bank.model(input_ids=x).logits
        with plain.routed([f"task-{'pure' if name == 'own' else name}"] * 2):
            expected = plain.model(input_ids=x).logits
        with plain.routed(["__base__"] * 2):
            unadapted = plain.model(input_ids=x).logits
    assert float((found - expected).abs().max()) < 1e-4
    assert float((found - unadapted).abs().max()) > 1e-3


def test_plain_peft_adapters_are_members(base: Path, tmp_path: Path) -> None:
    """A LORA with patterns and a PiSSA, which is relative to a changed base, as peft writes them."""
    targets = ["q_proj", "down_proj"]
    options: dict[str, Any] = {"r": 3, "lora_alpha": 7, "target_modules": targets, "task_type": "CAUSAL_LM"}
    kinds = {"patterns": {"rank_pattern": {"down_proj": 5}}, "pissa": {"init_lora_weights": "pissa"}}
    generator = torch.Generator().manual_seed(3)
    for name, more in kinds.items():
        model = get_peft_model(tiny_model(), LoraConfig(**options, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(tmp_path / name)
    x = tokens(2, 6)
    for name in kinds:
        with torch.no_grad():
            expected = PeftModel.from_pretrained(tiny_model().eval(), tmp_path / name)(input_ids=x).logits
        config = resolve_members(gate_config(base, [tmp_path / name]))
        bank = AdapterBank.attach(tiny_model().eval(), expand(config))
        init_from_peft(bank, [0])
        with bank.routed([0, 0]), torch.no_grad():
            found = bank.model(input_ids=x).logits
        assert float((found - expected).abs().max()) < 1e-4, name


def problem_of(config: RunConfig, **more: Any) -> str:
    (problem,) = refusal(lambda: resolve_members(config, **more))
    assert problem.key == "adapters.gate.over"
    return f"{problem.value}: {problem.hint}"


def test_members_of_other_bases_are_refused(base: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    bank = plain_bank()
    by_name = export_peft(bank, "task-lora_one", tmp_path / "named", base=BaseModel("org/other"))
    assert f"{by_name}: was trained on the base model org/other" in problem_of(gate_config(base, [by_name]))
    identity = {"weights": "0" * 64, "config": "0" * 64}
    recorded = export_peft(
        bank, "task-lora_one", tmp_path / "recorded", base=BaseModel(str(base), identity=identity)
    )
    over = [folders["ia3"], recorded]
    assert f"{recorded}: was trained on other weights (SHA-256 000000000000)" in problem_of(
        gate_config(base, over)
    )
    wide = tmp_path / "wide" / "base"
    model: Any = tiny_model()
    model.config.update({"intermediate_size": 64})
    model.config.save_pretrained(wide)
    refused = problem_of(gate_config(wide, [folders["lora_one"]]))
    assert f"{folders['lora_one']}: adapts model.layers.0.mlp.down_proj as a layer of size 32 x 48" in refused
    assert "its base model differs" in refused
    gpt2 = tmp_path / "gpt2" / "base"
    tiny_model("gpt2").config.save_pretrained(gpt2)  # type: ignore[operator, union-attr]
    assert "lacks: its base model differs" in problem_of(gate_config(gpt2, [folders["lora_one"]]))


def test_what_is_no_member_is_refused(base: Path, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert f"{missing}: is not a PEFT adapter" in problem_of(gate_config(base, [missing]))
    assert "is neither the folder of a PEFT adapter nor an adapter of this run" in problem_of(
        gate_config(base, ["nothing"])
    )
    dora = tmp_path / "dora"
    options = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), options).save_pretrained(dora)
    assert "is a DoRA, and a gate chooses among" in problem_of(gate_config(base, [dora]))
    damaged = tmp_path / "damaged"
    options_of_ia3 = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), options_of_ia3).save_pretrained(damaged)
    content = json.loads((damaged / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps({**content, "target_modules": ["v_proj"]}))
    assert f"{damaged}: has tensors for" in problem_of(gate_config(base, [damaged]))


def run_config(base: Path, tasks: tuple[str, ...], **gate: Any) -> RunConfig:
    """Plain adapters of two tasks and, on a third one, a gate over them."""
    adapters: dict[str, Any] = {
        "lora": {"method": "lora", "rank": 3, "lr": 1e-3, "tasks": ["lua", "perl"]},
        "dora": {"method": "dora", "lr": 1e-3, "tasks": ["lua"]},
        "ia3": {"method": "ia3", "lr": 1e-3, "tasks": ["perl"]},
    }
    if gate:
        adapters["gate"] = {"method": "meteora", "lr": 1e-3, "tasks": ["mixed"], **gate}
    return validate(
        {
            "name": "small",
            "model": {"path": str(base)},
            "tasks": {task: {"train": "a.jsonl"} for task in tasks},
            "adapters": adapters,
            "training": {"steps": 10},
        }
    )


def test_adapters_of_a_finished_run_are_members_and_others_are_refused(base: Path) -> None:
    before = run_config(base, ("lua", "perl"))
    over = ["lua-lora", "perl-lora", "perl-ia3"]
    config = run_config(base, ("lua", "perl", "mixed"), over=over)
    untrained = "is an adapter of this run, which is not trained yet: train it first"
    problems = refusal(lambda: resolve_members(config))
    assert [problem.value for problem in problems] == over
    assert all(untrained in problem.hint for problem in problems)
    assert all(untrained in p.hint for p in refusal(lambda: resolve_members(config, before)))
    specs = expand(resolve_members(config, before, is_finished=True))
    bank = AdapterBank.attach(tiny_model().eval(), specs)
    perturb(bank)
    gate = bank.ids["mixed-gate"]
    init_from_peft(bank, [gate])
    for name, modules in members_of(bank, gate).items():
        parameters = bank.parameters_of(name)
        assert modules.keys() == parameters.keys()
        for module, views in modules.items():
            assert all(torch.equal(view, parameters[module][param]) for param, view in views.items())
    dora = run_config(base, ("lua", "perl", "mixed"), over=["lua-dora"])
    assert "is of method dora" in problem_of(dora, begun=before, is_finished=True)
