"""flora-train plan: a run with the slots that it states ends with the bytes of a run without paging."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import expand
from flora_train.cli import main
from flora_train.commands.plan import measure_capacity, plan_lines
from flora_train.config.errors import UserError
from flora_train.config.load import load_config
from flora_train.models.loading import load_base_model
from flora_train.run_context import load_data
from flora_train.training.capacity import Capacity, check_fits
from flora_train.training.optimizer import BankOptimizer
from flora_train.training.step_cost import measure
from tests.e2e.conftest import Launch

TURNS = ("mixture.strategy=fair", "mixture.active_tasks=1", "mixture.turn_steps=3")
"""One task at a time: a step has three of the six adapters."""


@pytest.fixture(scope="module")
def found(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Capacity:
    return measure_capacity(
        load_config([f"recipe={recipe}", *TURNS, f"output_dir={tmp_path_factory.mktemp('runs') / 'run'}"])
    )


def test_plan_is_printed_and_writes_no_file(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            ["plan", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", "adapters.device_slots=4", *TURNS]
        )
        == 0
    )
    said = capsys.readouterr().out
    for words in (
        "2 x flora, rank 2",
        "2 x ia3",
        "at most 3 adapters (in any step), which fill 3 slots",
        "room for 4 adapters of the largest kind",
        "12 steps",
    ):
        assert words in said
    assert list(tmp_path.iterdir()) == []


def test_the_plan_counts_special_tokens_that_rows_hold(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"abc {i} <end> cab"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = load_config([f"recipe={recipe}"])
    words = [f"tasks.{name}={{train: {tmp_path / 'rows.jsonl'}, text: text}}" for name in config.tasks]
    assert main(["plan", f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", *words]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "(80: <end> 80) are text; task_defaults." in said


def test_plan_of_many_hours_says_how_to_shorten_the_run(found: Capacity, recipe: Path) -> None:
    config = load_config([f"recipe={recipe}"])
    said = [
        dict(plan_lines(config, replace(found, step_seconds=seconds)))["time"] for seconds in (1.0, 1000.0)
    ]
    assert said[0] == "about 1.0s a step on one process, 12 steps 12s, and evaluations"
    assert (
        "12 steps 3h20m, and evaluations; training.steps and training.tokens_per_step make it shorter"
        in said[1]
    )


def test_memory_of_adapters_is_what_the_bank_takes(found: Capacity, recipe: Path) -> None:
    config = load_config([f"recipe={recipe}"])
    model = load_base_model(config.model, torch.device("cpu"))
    assert found.base == sum(p.numel() * p.element_size() for p in model.parameters())
    bank = AdapterBank.attach(model, expand(config))
    BankOptimizer(bank, config.training)
    assert found.on_device == sum(
        4 * t.numel() for pool in bank.pools for t in (*pool.planes.values(), pool.gradients)
    )
    assert found.checkpoint == sum(4 * tensor.numel() for tensor in bank.tensors().values())


def test_files_take_what_memory_would(recipe: Path, tmp_path: Path) -> None:
    words = [
        f"recipe={recipe}",
        *TURNS,
        f"output_dir={tmp_path / 'run'}",
        "adapters.device_slots=4",
        "guard.policy=rollback",
    ]
    memory, files = (
        measure_capacity(load_config([*words, f"paging.host={host}"])) for host in ("memory", "disk")
    )
    assert memory.host == 3 * memory.checkpoint  # adapters, a checkpoint's copy, and the guard's
    assert files.host == 0
    assert files.on_disk - memory.on_disk == memory.host
    apart = measure_capacity(
        load_config([*words, "paging.host=disk", "paging.folder=/dev/shm", "num_processes=2"])
    )
    assert apart.on_disk == memory.on_disk
    assert apart.pages == 2 * memory.host - memory.checkpoint  # one of them writes checkpoints
    said = [dict(plan_lines(load_config(words), found))["host"] for found in (memory, files)]
    assert "of adapters that are not on the device" in said[0]
    assert said[1].startswith("nothing: adapters that are not on the device are in files, with a copy while")


def test_activations_of_many_layers_follow_from_one_and_two(
    recipe: Path, checkpoint: Path, tmp_path: Path
) -> None:
    deep = tmp_path / "deep"
    shutil.copytree(checkpoint, deep)
    (deep / "model.safetensors").unlink()  # no weights are read
    settings = json.loads((deep / "config.json").read_text())
    (deep / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 7}))
    config = load_config([f"recipe={recipe}", f"model.path={deep}", f"output_dir={tmp_path / 'run'}"])
    _, tasks, _ = load_data(config)
    whole = measure(config, torch.device("cpu"), tasks, layers=7, pad_token=0, speech_processor=None)
    planned = measure_capacity(config)
    shallow = measure(config, torch.device("cpu"), tasks, layers=1, pad_token=0, speech_processor=None)
    assert whole.activations > 3 * shallow.activations
    assert planned.activations == pytest.approx(whole.activations, rel=0.02)
    assert planned.step_seconds > 0


def test_a_run_with_the_least_slots_ends_with_the_same_bytes(
    found: Capacity, recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    """Two processes, one of them stopped by a full run's folder of its own: adapters, held-out losses,
    texts."""
    assert found.step_slots == 3
    runs = []
    for name, words in {
        "all": (),
        "few": (f"adapters.device_slots={found.step_slots}", "paging.host=disk"),
    }.items():
        done = launch(f"recipe={recipe}", f"output_dir={tmp_path / name}", *TURNS, *words, processes=2)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / name / "eval" / "report.json").read_text())
        files = sorted((tmp_path / name / "adapters").rglob("*.safetensors"))
        runs.append(([file.read_bytes() for file in files], report["results"], report["completions"]))
    assert len(runs[0][0]) == 6
    assert runs[0] == runs[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "few"]  # no page file is left
    refused = launch(f"recipe={recipe}", f"output_dir={tmp_path / 'less'}", *TURNS, "adapters.device_slots=2")
    assert refused.returncode != 0
    assert (
        "adapters.device_slots = 2: is too small for the 3 adapters of step 1: set it to 3 or more"
        in refused.stderr
    )
    assert not (tmp_path / "less").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"slots": 2},
            r"adapters\.device_slots = 2: hold less than the 3 adapters of a step need: give 3 or more",
        ),
        (
            {"free_device": 0},
            r"adapters\.device_slots = 'auto': has no room: a step needs 3 slots, and there is room for 0",
        ),
        (
            {"on_device": 10**12},
            (
                r"adapters\.device_slots = 'auto': needs 1000\.0 GB in addition to the base, where .* are "
                r"free: give \d+"
            ),
        ),
        (
            {"activations": 10**12},
            (
                r"training\.tokens_per_microbatch = 60: keeps 1000\.0 GB .*: give \d+, or "
                r"model\.gradient_checkpointing"
            ),
        ),
        ({"processes": 10**6}, r"adapters\.device_slots = 'auto': has no room"),
        (
            {"shared": False, "on_host": 10**12},
            r"paging\.host = 'memory': needs 1000\.0 GB a process.*disk keeps all that in files$",
        ),
        (
            {"shared": False, "copies": 10**12},
            r"paging\.host = 'memory': .*disk keeps all that in files, with adapters\.device_slots=3",
        ),
        ({"copies": 10**12}, r"adapters\.device_slots = 'auto': needs .*give \d+ and paging\.host=disk"),
        ({"pages": 10**15}, r"paging\.folder: needs 1000000\.0 GB for adapters"),
        ({"on_disk": 10**15}, r"output_dir = .*: needs 1000000\.0 GB"),
    ],
)
def test_plan_that_does_not_fit_names_the_setting(
    change: dict[str, int], words: str, found: Capacity, recipe: Path
) -> None:
    config = load_config([f"recipe={recipe}"])
    check_fits(config, found)
    with pytest.raises(UserError, match=words):
        check_fits(config, replace(found, **change))  # type: ignore[arg-type]
