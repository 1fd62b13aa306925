"""What a recipe leaves out is read from the PEFT adapter of init_from, and what does not fit is refused under
the key to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import HiraConfig, IA3Config, LoraConfig, get_peft_model

from flora_train.adapters.init_from import resolve_init_from
from flora_train.adapters.spec import expand
from flora_train.adapters.targets import find_targets
from flora_train.config.load import load_config, save_config, validate
from flora_train.config.schema import RunConfig
from flora_train.export.peft_format import BaseModel, export_peft
from flora_train.models.loading import empty_model
from tests.architectures import tiny_model
from tests.conftest import spec
from tests.unit.config.helpers import refusal
from tests.unit.export.test_peft_format import perturbed_bank

TARGETS = ["q_proj", "down_proj"]
Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration of a model, which is all that is looked at."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model().config.save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path) -> Make:
    def make(*, tasks: tuple[str, ...] = ("lua",), **adapter: Any) -> RunConfig:
        return validate(
            {
                "name": "small",
                "model": {"path": str(base)},
                "tasks": {task: {"train": "a.jsonl"} for task in tasks},
                "adapters": {"x": {"lr": 1e-3, **adapter}},
                "training": {"steps": 10},
            }
        )

    return make


def made_by_peft(options: Any, folder: Path) -> str:
    get_peft_model(tiny_model(), options).save_pretrained(folder)
    return str(folder)


def lora(folder: Path, **options: Any) -> str:
    return made_by_peft(
        LoraConfig(
            **{"r": 3, "lora_alpha": 7, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
        ),
        folder,
    )


@pytest.mark.parametrize("targets", [TARGETS, r".*\.(q_proj|down_proj)", "all-linear"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_reads_rank_alpha_rslora_and_targets(
    targets: Any, rslora: bool, config: Make, tmp_path: Path
) -> None:
    source = lora(tmp_path / "a", target_modules=targets, use_rslora=rslora)
    resolved = resolve_init_from(config(method="lora", init_from=source))
    adapter = resolved.adapters["x"]
    assert (adapter.rank, adapter.alpha, adapter.rslora) == (3, 7.0, rslora)
    (ours,) = expand(resolved)
    assert ours.scaling == pytest.approx(7 / (3**0.5 if rslora else 3))
    chosen = find_targets(empty_model(resolved.model), ours)
    wanted = find_targets(
        empty_model(resolved.model),
        spec("lora", target_modules=TARGETS if targets != "all-linear" else targets),
    )
    assert chosen.keys() == wanted.keys()


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_patterns_and_magnitudes_are_read(method: str, config: Make, tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {r"1\..*q_proj": 2}}
    source = lora(tmp_path / "a", use_dora=method == "dora", **patterns)
    resolved = resolve_init_from(config(method=method, init_from=source))
    adapter = resolved.adapters["x"]
    assert (adapter.rank, adapter.rank_pattern) == (3, {"down_proj": 5})
    assert (adapter.alpha, adapter.alpha_pattern) == (7.0, {r"1\..*q_proj": 2.0})
    save_config(resolved, tmp_path / "config.yaml")
    assert load_config([f"recipe={tmp_path / 'config.yaml'}"]) == resolved
    assert resolve_init_from(config(method=method, init_from=source, rank=3)) == resolved
    flora = config(method="flora", init_from=source)
    if method == "dora":
        (problem,) = refusal(lambda: resolve_init_from(flora))
        assert "is a DoRA, and an adapter of method flora" in problem.hint
        return
    assert resolve_init_from(flora).adapters["x"].rank_pattern == {"down_proj": 5}
    wide = resolve_init_from(config(method="flora", init_from=source, rank=9)).adapters["x"]
    assert (wide.rank, wide.rank_pattern) == (9, None)
    for key, value in (("rank_pattern", {"down_proj": 4}), ("alpha_pattern", {"q_proj": 2})):
        other = config(method="lora", init_from=source, **{key: value})
        (problem,) = refusal(lambda other=other: resolve_init_from(other))
        assert problem.key == f"adapters.x.{key}"
        assert "is not that of" in problem.hint


@pytest.mark.parametrize("rslora", [False, True])
def test_a_pissa_is_read_as_a_lora_of_twice_the_rank(rslora: bool, config: Make, tmp_path: Path) -> None:
    source = lora(tmp_path / "a", init_lora_weights="pissa", use_rslora=rslora, rank_pattern={"down_proj": 5})
    (ours,) = expand(resolve_init_from(config(method="lora", init_from=source)))
    assert (ours.rank, ours.rank_pattern) == (6, (("down_proj", 10),))
    assert ours.scaling == pytest.approx(7 / (3**0.5 if rslora else 3))
    assert ours.at("x.down_proj").scaling == pytest.approx(7 / (5**0.5 if rslora else 5))


def test_layers_of_some_blocks_only_are_read(config: Make, tmp_path: Path) -> None:
    source = lora(tmp_path / "a", layers_to_transform=[1], layers_pattern="layers")
    resolved = resolve_init_from(config(method="lora", init_from=source))
    chosen = find_targets(empty_model(resolved.model), expand(resolved)[0])
    assert sorted(chosen) == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]


def test_ia3_reads_targets_and_feedforward_modules(config: Make, tmp_path: Path) -> None:
    options = IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    adapter = resolve_init_from(
        config(method="ia3", init_from=made_by_peft(options, tmp_path / "a"))
    ).adapters["x"]
    assert sorted(adapter.target_modules) == sorted(TARGETS)
    assert adapter.feedforward_modules == ["down_proj"]


def test_flora_reads_the_rank_of_a_hira_and_of_a_lora(config: Make, tmp_path: Path) -> None:
    hira = made_by_peft(HiraConfig(r=5, target_modules=TARGETS, task_type="CAUSAL_LM"), tmp_path / "hira")
    assert resolve_init_from(config(method="flora", init_from=hira)).adapters["x"].rank == 5
    assert resolve_init_from(config(method="flora", variant="pure", init_from=hira)).adapters["x"].rank == 4
    assert (
        resolve_init_from(config(method="flora", init_from=lora(tmp_path / "lora"))).adapters["x"].rank == 3
    )
    assert (
        resolve_init_from(config(method="flora", rank=16, init_from=str(tmp_path / "lora")))
        .adapters["x"]
        .rank
        == 16
    )


@pytest.mark.parametrize("own_type", [False, True])
def test_every_adapter_that_is_exported_here_is_read_back(
    own_type: bool, config: Make, tmp_path: Path
) -> None:
    bank = perturbed_bank("llama")
    for ours in bank.specs:
        export_peft(
            bank,
            ours.name,
            tmp_path / ours.name,
            base=BaseModel("base"),
            own_type=own_type and ours.method == "flora",
        )
        variant = (
            {} if ours.method != "flora" or own_type else {"variant": "residual" if ours.offset else "pure"}
        )
        source = str(tmp_path / "{task}-").replace("{task}-", ours.name)
        resolved = resolve_init_from(config(method=ours.method, init_from=source, **variant))
        (read,) = expand(resolved)
        assert (read.rank, read.offset, read.scaling) == (ours.rank, ours.offset, ours.scaling)
        model = empty_model(resolved.model)
        assert find_targets(model, read) == find_targets(model, ours)


def test_resolved_configuration_is_saved_and_is_the_same_when_it_is_resolved_again(
    config: Make, tmp_path: Path
) -> None:
    resolved = resolve_init_from(config(method="lora", init_from=lora(tmp_path / "a")))
    save_config(resolved, tmp_path / "config.yaml")
    read = load_config([f"recipe={tmp_path / 'config.yaml'}"])
    assert read == resolved
    assert resolve_init_from(read) == resolved


def test_resumed_run_needs_the_adapter_no_more(config: Make, tmp_path: Path) -> None:
    written = config(method="lora", init_from=lora(tmp_path / "a"))
    begun = resolve_init_from(written)
    (tmp_path / "a").rename(tmp_path / "b")
    assert resolve_init_from(written, begun) == begun


def test_task_in_the_name_stands_for_every_task(config: Make, tmp_path: Path) -> None:
    lora(tmp_path / "of-lua")
    lora(tmp_path / "of-perl")
    tasks = {"tasks": ("lua", "perl"), "method": "lora", "init_from": f"{tmp_path}/of-{{task}}"}
    assert resolve_init_from(config(**tasks)).adapters["x"].rank == 3
    lora(tmp_path / "of-perl", r=4)
    (problem,) = refusal(lambda: resolve_init_from(config(**tasks)))
    assert (problem.key, problem.value) == ("adapters.x.init_from", f"{tmp_path}/of-perl")
    assert problem.hint.startswith(f"has rank 4, and {tmp_path}/of-lua has 3: ")
    (tmp_path / "of-lua" / "adapter_config.json").unlink()
    (tmp_path / "of-perl" / "adapter_config.json").unlink()
    assert len(refusal(lambda: resolve_init_from(config(**tasks)))) == 2


@pytest.mark.parametrize(
    ("adapter", "key", "hint"),
    [
        (
            {"method": "ia3"},
            "init_from",
            "has the PEFT type LORA, and an adapter of method ia3 starts from IA3",
        ),
        ({"method": "lora", "rank": 8}, "rank", "set it to 3"),
        ({"method": "lora", "alpha": 8}, "alpha", "set alpha to 7 and rslora to false"),
        ({"method": "lora", "rslora": True}, "rslora", "set alpha to 7 and rslora to false"),
        ({"method": "lora", "target_modules": ["q_proj"]}, "target_modules", "leaves out 2 layers"),
        ({"method": "lora", "target_modules": "all-linear"}, "target_modules", "selects"),
        ({"method": "lora", "parent_module": "mlp"}, "parent_module", "leaves out 2 layers"),
        ({"method": "flora", "variant": "pure"}, "variant", "set it to residual"),
    ],
)
def test_init_from_that_does_not_fit_is_refused_under_the_key_to_change(
    adapter: dict[str, Any], key: str, hint: str, config: Make, tmp_path: Path
) -> None:
    source = lora(tmp_path / "a")
    (problem,) = refusal(lambda: resolve_init_from(config(init_from=source, **adapter)))
    assert problem.key == f"adapters.x.{key}"
    assert hint in problem.hint


def test_missing_adapter_is_refused_under_init_from(config: Make, tmp_path: Path) -> None:
    (problem,) = refusal(lambda: resolve_init_from(config(method="lora", init_from=str(tmp_path / "none"))))
    assert problem.key == "adapters.x.init_from"
    assert "there is no such folder" in problem.hint


@pytest.mark.parametrize("change", ["other sizes", "fewer layers"])
def test_adapter_of_another_base_model_is_refused_under_init_from(
    change: str, config: Make, base: Path, tmp_path: Path
) -> None:
    source = lora(tmp_path / "a")
    written = config(method="lora", init_from=source)
    published = json.loads((base / "config.json").read_text())
    published |= (
        {"intermediate_size": 2 * published["intermediate_size"]}
        if change == "other sizes"
        else {"num_hidden_layers": 1}
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(published))
    written = written.model_copy(update={"model": written.model.model_copy(update={"path": str(other)})})
    (problem,) = refusal(lambda: resolve_init_from(written))
    assert problem.key == "adapters.x.init_from"
    assert "its base model differs" in problem.hint
