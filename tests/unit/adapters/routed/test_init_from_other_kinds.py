"""Folders of another kind of adapter are refused by init_from, over, convert and contenders, with what to do
instead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.gate_members import resolve_members
from flora_train.adapters.init_from import resolve_init_from
from flora_train.adapters.spec import expand
from flora_train.commands.convert import convert_adapter
from flora_train.config.errors import Problem
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.evaluation.code.contenders import check_peft_contenders
from flora_train.export.mixlora_format import export_mixlora
from flora_train.export.peft_forms import BaseModel
from flora_train.export.peft_import import init_from_peft
from flora_train.export.routed_format import export_adapter
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.adapters.gate_reference import MIXED, gate_spec
from tests.unit.config.helpers import refusal
from tests.unit.export.routed_banks import routed_bank

MADE = [
    spec("mixlora", "a", "mix", experts=2, rank=2, alpha=3.0),
    spec("switch", "a", "switch", experts=2, rank=2),
    gate_spec(MIXED, "a", "gate"),
    spec("lora", "a", "lora", rank=2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, and below `adapters` an exported adapter of each kind, one also in MixLoRA's layout."""
    root = tmp_path_factory.mktemp("kinds")
    tiny_model().save_pretrained(root / "base")  # type: ignore[operator]
    base, bank = BaseModel(str(root / "base")), routed_bank(specs=MADE)
    for one in MADE:
        export_adapter(bank, one.name, root / "adapters" / one.family, base=base)
    export_mixlora(bank, "a-mix", root / "adapters" / "published", base=base)
    return root


def recipe(folder: Path, **adapter: Any) -> RunConfig:
    task = {"train": "a.jsonl"}
    if adapter["method"] == "head":
        task["label"] = "kind"
    return validate(
        {
            "name": "small",
            "model": {"path": str(folder / "base")},
            "tasks": {"a": task},
            "adapters": {"x": {"lr": 1e-3, **adapter}},
            "training": {"steps": 10},
        }
    )


WRONG = [
    ("mixlora", "gate", "is a gate over adapters (meteora), and no adapter starts from one: set method to"),
    ("switch", "gate", "is a gate over adapters (meteora), and no adapter starts from one: set method to"),
    (
        "lora",
        "gate",
        "it is a routed adapter (routing.json), whose parts are PEFT adapters: name one of them",
    ),
    ("mixlora", "switch", "is of method switch, and an adapter of method mixlora starts from one of its own"),
    ("switch", "mix", "is of method mixlora, and an adapter of method switch starts from one of its own"),
    ("switch", "published", "is of method mixlora, and an adapter of method switch starts from one of its"),
    ("mixlora", "lora", "is not a routed adapter: *: set method to that of the adapter, such as lora"),
    ("switch", "lora", "is not a routed adapter: *: set method to that of the adapter, such as lora"),
    (
        "flora",
        "mix",
        "it is a routed adapter (routing.json), whose parts are PEFT adapters: name one of them",
    ),
    ("lora", "switch", "it is a routed adapter (routing.json), whose parts are PEFT adapters: name one of"),
    ("head", "mix", "it is a routed adapter (routing.json), whose parts are PEFT adapters: name"),
    ("lora", "published", "has the PEFT type MIXLORA: supported are"),
]


def check(problem: Problem, key: str, value: Path, words: str) -> None:
    assert (problem.key, problem.value) == (key, str(value))
    for part in words.split("*"):
        assert part in problem.hint
    assert "damaged" not in problem.hint


@pytest.mark.parametrize(("method", "source", "words"), WRONG)
def test_init_from_says_what_kind_a_folder_is(method: str, source: str, words: str, folder: Path) -> None:
    path = folder / "adapters" / source
    config = recipe(folder, method=method, init_from=str(path))
    (problem,) = refusal(lambda: resolve_init_from(config))
    check(problem, "adapters.x.init_from", path, words)


@pytest.mark.parametrize("source", ["mix", "switch", "gate"])
def test_a_routed_adapter_is_no_member_and_its_parts_are(
    source: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the folder is named without a slash."""
    path, words = folder / "adapters" / source, "it is a routed adapter (routing.json)"
    config = recipe(folder, method="meteora", over=[str(path)])
    (problem,) = refusal(lambda: resolve_members(config))
    check(problem, "adapters.x.over", path, words)
    monkeypatch.chdir(path.parent)
    (problem,) = refusal(lambda: resolve_members(recipe(folder, method="meteora", over=[source])))
    check(problem, "adapters.x.over", Path(source), f"{words}*such as {source}/expert_0")
    parts = [str(path / "expert_0"), str(path / "expert_1")]
    resolved = resolve_members(recipe(folder, method="meteora", over=parts))
    bank = AdapterBank.attach(tiny_model(), expand(resolved))
    init_from_peft(bank, [0])
    assert [member.name for member in (resolved.adapters["x"].members or ())] == ["expert_0", "expert_1"]


def test_a_routed_adapter_of_the_run_is_no_member_before_anything_is_trained(folder: Path) -> None:
    config = recipe(folder, method="meteora", over=["a-mix"])
    mix = validate({**recipe(folder, method="mixlora").model_dump(), "name": "other"}).adapters["x"]
    config = config.model_copy(update={"adapters": {**config.adapters, "mix": mix}})
    (problem,) = refusal(lambda: resolve_members(config))
    check(problem, "adapters.x.over", Path("a-mix"), "is of method mixlora, and a gate chooses among lora")


def test_convert_and_contenders_name_the_parts(folder: Path, tmp_path: Path) -> None:
    path, words = folder / "adapters" / "mix", "it is a routed adapter (routing.json)*name one of them"
    (problem,) = refusal(lambda: convert_adapter(str(path), out=str(tmp_path / "out")))
    check(problem, "adapter", path, words)
    (problem,) = refusal(lambda: check_peft_contenders([str(path)], []))
    check(problem, "contenders", path, words)


def test_a_resumed_run_keeps_the_head_that_its_adapters_began_with(folder: Path) -> None:
    """Nothing is read from the folder again, which may be gone."""
    config = recipe(folder, method="head", init_from="gone/with-head")
    assert resolve_init_from(config, config) == config
