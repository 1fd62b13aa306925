"""flora-train plan: a run with the slots that it states ends with the bytes of a run without paging; plans
from published sizes need no network."""

from __future__ import annotations

import json
import re
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import expand
from flora_train.cli import main
from flora_train.commands.plan import measure_capacity, plan_lines
from flora_train.commands.plan_text import tokens_line
from flora_train.config.errors import UserError
from flora_train.config.load import load_config
from flora_train.models.loading import load_base_model
from flora_train.run_context import load_data
from flora_train.training.capacity import Capacity, check_fits, format_size
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
    assert re.search(r"tokens +[\d.]+ kB on disk for [\d,]+ rows in .*tokens; 100,000,000 rows of", said)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_of_many_rows_follows_from_those_that_are_here(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config([f"recipe={recipe}", f"output_dir={tmp_path / 'run'}"])
    _, tasks, _ = load_data(config)
    splits = [split for task in tasks.values() for split in (task.train, task.validation)]
    rows = sum(split.counts.rows - split.counts.unsampled for split in splits)
    size = sum(split.nbytes for split in splits)
    assert size > 4 * sum(split.counts.tokens for split in splits)
    ((heading, line),) = tokens_line(config, tasks)
    assert heading == "tokens"
    assert f"for {rows:,} rows" in line
    assert f"need {format_size(size * 10**8 / rows)};" in line


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


class NoNetwork:
    """Counts attempts to reach any address, and refuses them."""

    def __init__(self) -> None:
        self.attempts: list[object] = []

    def refuse(self, *address: object, **options: object) -> None:
        self.attempts.append(address)
        raise OSError("no network in this test")


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> NoNetwork:
    network = NoNetwork()
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, network.refuse)
    monkeypatch.setattr(socket, "getaddrinfo", network.refuse)
    return network


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", *words]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_multipl_e_is_planned_without_weights_rows_or_network(
    network: NoNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    text = planned(capsys, "recipe=multipl_e", f"output_dir={tmp_path / 'run'}")
    assert network.attempts == []
    for part in (
        "bigcode/starcoder (15,517,456,384 parameters) is not on this machine",
        "the rows of d, julia, lua, perl, r, racket, ruby, rust, swift are on the hub",
        "7 x flora, rank 1: 501,760 numbers each",
        "at most 27 adapters",
        "GPUs, estimated",
        "1 x 80 GB 31.0",
        "1 x 24 GB, 8bit 15.9",
        "2 x 80 GB, fsdp",
        "8 x 80 GB, fsdp",
        "model.quantization=8bit model.gradient_checkpointing=non_reentrant",
        "Hours, estimated",
        "benchmarks/results/large_step_cuda.md",
        "579,600 texts are generated",
    ):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_common_voice_is_planned_without_weights_release_or_network(
    network: NoNetwork, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    text = planned(capsys, "recipe=common_voice", f"output_dir={tmp_path / 'run'}")
    assert network.attempts == []
    for part in (
        "openai/whisper-large (1,543,304,960 parameters) is not on this machine",
        "there is no release with the clips of ar, cs, hi, lt, mn, mr",
        "each clip is counted as 1500 encoder positions and 40 tokens",
        "at most 30 adapters",
        "1000 test clips a language",
    ):
        assert part in text
    assert "fsdp" not in text  # a speech model is whole on every GPU
    assert list(tmp_path.iterdir()) == []


def hub_cache_of(checkpoint: Path, cache: Path, name: str) -> Path:
    """The hub's cache with a checkpoint under a hub name; the snapshot's folder."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123456789012345678901234567890123456789"
    shutil.copytree(checkpoint, snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(snapshot.name)
    return snapshot


def test_the_table_overrides_neither_a_folder_nor_the_cache_nor_a_revision(
    recipe: Path,
    checkpoint: Path,
    network: NoNetwork,
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = f"output_dir={tmp_path / 'run'}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.file_download.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    named = ("model.path=huggingfacetb/SmolLM2-360M", "model.dtype=float32")
    text = planned(capsys, f"recipe={recipe}", run, *named)
    assert "HuggingFaceTB/SmolLM2-360M (361,821,120 parameters) is not on this machine" in text
    # A revision is not in the table.
    assert main(["plan", f"recipe={recipe}", run, *named, "model.revision=v2"]) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1
    assert "has no revision 'v2' in the hub's cache" in error
    # A folder of this name in the working directory, and the cache, come first.
    snapshot = hub_cache_of(checkpoint, tmp_path / "cache", "HuggingFaceTB/SmolLM2-360M")
    text = planned(capsys, f"recipe={recipe}", run, "model.path=HuggingFaceTB/SmolLM2-360M")
    assert "is not on this machine" not in text
    assert "12 steps" in text
    (snapshot / "model.safetensors").unlink()
    text = planned(capsys, f"recipe={recipe}", run, "model.path=HuggingFaceTB/SmolLM2-360M")
    assert "HuggingFaceTB/SmolLM2-360M is in the hub's cache without tokenizer or weights" in text
    monkeypatch.chdir(tmp_path)
    shutil.copytree(checkpoint, tmp_path / "HuggingFaceTB" / "SmolLM2-360M")
    text = planned(capsys, f"recipe={recipe}", run, "model.path=HuggingFaceTB/SmolLM2-360M")
    assert "hub's cache" not in text
    assert "12 steps" in text


def test_a_model_that_nothing_knows_is_one_error_after_one_attempt(
    recipe: Path,
    network: NoNetwork,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    words = [f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", "model.path=nobody/nothing-7b"]
    assert main(["plan", *words]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "model.path = 'nobody/nothing-7b': is neither a folder, nor in the hub's cache" in error
    assert "cannot be reached" in error
    assert len(network.attempts) <= 2  # one, and the resolution of the name


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_of_the_tables_is_longer_than_the_terminal(
    columns: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["plan", "recipe=multipl_e", f"output_dir={tmp_path / 'run'}"]) == 0
    _, tables = capsys.readouterr().out.split("GPUs, estimated")
    assert max(len(line.rstrip()) for line in tables.splitlines()) <= columns


def test_other_gpus_are_planned_for_a_run_that_is_long_or_does_not_fit_here(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"recipe={recipe}", f"output_dir={tmp_path / 'run'}"]
    assert "GPUs" not in planned(capsys, *words)
    assert "1 x 80 GB" in planned(capsys, *words, "training.steps=10000000")
    monkeypatch.setattr("flora_train.commands.plan.free_memory", lambda: 10_000)
    assert main(["plan", *words]) == 2
    printed = capsys.readouterr()
    assert "1 x 80 GB" in printed.out
    assert "has no room" in printed.err
