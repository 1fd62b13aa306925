"""What `flwr run` is told is checked before any round; one package imports Flower."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from flora_train.config.errors import UserError
from flora_train.config.schema import RunConfig
from flora_train.federated.flower.recipe_digest import DATA, RECIPE, check_same, digests_of, shared_keys
from flora_train.federated.flower.settings import read_settings
from tests.e2e.conftest import ROOT
from tests.unit.federated.runs import load_small

APP = ROOT / "launch" / "flower" / "pyproject.toml"
OPTIONS = {"lr": 0.01, "head_lr": 0.01, "lr_schedule": "constant"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe with three strategies and two seeds."""
    rows = tmp_path / "train.jsonl"
    rows.write_text('{"text": "a", "label": "x"}\n')
    content = {
        "name": "deployed",
        "tasks": {"texts": {"train": str(rows), "text": "text", "label": "label", "license": "other"}},
        "model": {"path": str(tmp_path / "model")},
        "adapters": {
            "lora": {"method": "lora", "rank": 4, **OPTIONS},
            "full": {"method": "head", **OPTIONS},
        },
        "federated": {
            "rounds": 3,
            "num_clients": 4,
            "dirichlet_alpha": 1.0,
            "seeds": [3, 5],
            "strategies": {
                "lora": {"adapter": "lora"},
                "full": {"adapter": "full", "algorithm": "full"},
                "central": {"adapter": "lora", "central": True},
            },
        },
        "training": {"steps": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def config(path: Path, **changed: Any) -> dict[str, Any]:
    """The keys of the app, with their defaults. changed: with `_` for `-`."""
    keys = tomllib.loads(APP.read_text())["tool"]["flwr"]["app"]["config"]
    named = {name.replace("_", "-"): value for name, value in changed.items()}
    assert named.keys() <= keys.keys()
    return {**keys, "recipe": str(path), "strategy": "lora", **named}


def test_a_deployment_has_one_strategy_and_one_seed(recipe: Path) -> None:
    settings = read_settings(config(recipe, seed=5, overrides="federated.rounds=7 output_dir='a b'"))
    assert list(settings.federated.strategies) == ["lora"]
    assert list(settings.federated.runs) == ["lora"]
    assert settings.federated.seeds == [5]
    assert settings.federated.rounds == 7
    assert settings.config.output_dir == "a b"
    assert (settings.round_timeout, settings.start_timeout, settings.server_data) == (600.0, 300.0, True)
    assert read_settings(config(recipe)).seed == 3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": ""}, "recipe: is required"),
        ({"strategy": ""}, "strategy: is required, since the recipe has several"),
        ({"strategy": "lor"}, r"strategy = 'lor': is no strategy .*lora"),
        ({"strategy": "full"}, "trains all weights of the base, which Flower does not carry here"),
        ({"strategy": "central"}, "trains one adapter on all examples"),
        ({"strategy": 3}, "strategy = 3: is the name of a strategy"),
        ({"seed": 4}, r"seed = 4: is none of federated.seeds = \[3, 5\]"),
        ({"seed": 5.0}, "seed = 5.0: is one of federated.seeds"),
        ({"round_timeout": 0}, "round-timeout = 0: is a number of seconds above 0"),
        ({"start_timeout": "soon"}, "start-timeout = 'soon': is a number"),
        ({"round_timeout": True}, "round-timeout = True: is a number"),
        ({"server_data": "yes"}, "server-data = 'yes': is true or false"),
        ({"overrides": "federated.rounds=0"}, "federated.rounds"),
    ],
)
def test_bad_settings_are_named(recipe: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_settings(config(recipe, **changed))


def test_a_recipe_without_rounds_is_refused() -> None:
    with pytest.raises(UserError, match="has no section federated"):
        read_settings(config(Path("quickstart")))


def test_tasks_of_a_column_need_the_data_that_makes_them(recipe: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    content["tasks"]["texts"] |= {"split_by": "user", "labels": ["x", "y"]}
    content["federated"] |= {"split": "tasks", "num_clients": None, "dirichlet_alpha": None}
    del content["federated"]["strategies"]["central"]
    recipe.write_text(yaml.safe_dump(content))
    with pytest.raises(
        UserError, match=r"server-data = False: reads no data, and tasks.texts.split_by makes"
    ):
        read_settings(config(recipe, server_data=False))
    assert read_settings(config(recipe, server_data=True)).config.tasks["texts"].split_by == "user"


def changed(recipe: Path, *overrides: str) -> RunConfig:
    """The configuration of a machine."""
    return read_settings(config(recipe, overrides=" ".join(overrides))).config


@pytest.mark.parametrize(
    "override",
    [
        "adapters.lora.lr=0.02",
        "adapters.lora.rank=8",
        "federated.batch_examples=3",
        "federated.dirichlet_alpha=0.5",
        "training.steps=3",
        "training.optimizer=sgd",
        "tasks.texts.text=label",
        "seed=9",
    ],
)
def test_another_recipe_has_another_digest(recipe: Path, override: str) -> None:
    server = digests_of(changed(recipe), {})
    node = digests_of(changed(recipe, override), {})
    with pytest.raises(UserError, match=r"recipe: the recipes differ in .*this node has [0-9a-f]{12}"):
        check_same(node, server, "this node")


def test_what_belongs_to_a_machine_is_not_compared(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text('{"text": "b", "label": "y"}\n')
    elsewhere = changed(
        recipe,
        f"output_dir={tmp_path / 'own'}",
        f"model.path={tmp_path / 'own_model'}",
        f"tasks.texts.train={tmp_path / 'own.jsonl'}",
        f"tasks.texts.validation={tmp_path / 'own.jsonl'}",
        "num_threads=3",
        "resume=true",
        "kernels.backend=torch",
        "training.tokens_per_microbatch=1024",
        "federated.clients_at_once=2",
        "evaluation.bootstrap_samples=100",
    )
    here = changed(recipe)
    assert elsewhere != here
    assert shared_keys(elsewhere) == shared_keys(here)
    assert {"adapters.lora.lr", "federated.rounds", "training.steps"} <= shared_keys(here).keys()
    check_same(digests_of(elsewhere, {}), digests_of(here, {}), "this node")


def test_other_examples_have_another_digest(tmp_path: Path) -> None:
    loaded = load_small(tmp_path, ["usual"])
    server = digests_of(loaded.config, loaded.tasks)
    assert server.keys() == {RECIPE, DATA}
    check_same(server, server, "this node")
    (task,) = loaded.tasks.values()
    node = digests_of(loaded.config, {task.name: replace(task, data_hash="0" * 64)})
    assert node[RECIPE] == server[RECIPE]
    with pytest.raises(UserError, match="data: the examples differ"):
        check_same(node, server, "this node")
    with pytest.raises(UserError, match="data: the examples differ"):
        check_same({RECIPE: server[RECIPE]}, server, "this node")
    check_same(node, {RECIPE: server[RECIPE]}, "this node")  # the server has no data


def test_the_document_names_the_app_of_an_installed_wheel() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]["launch"]
    assert APP.relative_to(ROOT / "launch").as_posix() == "flower/pyproject.toml"
    assert f"`{shipped}/flower`" in (ROOT / "docs" / "federated_flower.md").read_text()


def test_only_the_package_for_flower_imports_it() -> None:
    importing = set()
    for path in (ROOT / "flora_train").rglob("*.py"):
        if re.search(r"^\s*(import|from) flwr\b", path.read_text(), re.MULTILINE):
            importing.add(path.parent.relative_to(ROOT).as_posix())
    assert importing == {"flora_train/federated/flower"}
