"""A resumed run ends with the bytes of an uninterrupted one; every wrong checkpoint is recognised."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flora_train.config.errors import UserError
from flora_train.runtime.atomic import write_atomically
from flora_train.runtime.checksum import fingerprint, with_checksums
from flora_train.training import checkpoint
from flora_train.training.checkpoint import Checkpoints
from flora_train.training.trainer import Trainer
from tests.architectures import tiny_model
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer
from tests.unit.training.small_disk import file_size_limit


class Stopped(Exception):
    """The machine went away."""


def specs(**options: Any) -> list[Any]:
    """Adapters of all methods, one with dropout, one that leaves early."""
    ours = mixed_specs(lr=5e-3, lr_schedule="cosine", **options)
    return [
        replace(s, dropout=0.3)
        if s.name == "a-lora"
        else replace(s, max_steps=6)
        if s.name == "c-pure"
        else s
        for s in ours
    ]


def trainer_in(folder: Path, **options: Any) -> Trainer:
    folder.mkdir(exist_ok=True)
    settings: dict[str, Any] = {"steps": 12, "save_every": 3, "log_every": 2, "optimizer": "adamw", **options}
    return make_trainer(specs(), folder, interval=4, **settings)


def stop_before(trainer: Trainer, number: int) -> None:
    """Let `trainer.train` end in the middle, as a kill would."""
    step: Callable[..., None] = trainer.step

    def until(at: int, plan: Any) -> None:
        if at == number:
            raise Stopped
        step(at, plan)

    trainer.step = until  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer.train()
    trainer.checkpoints.wait()


def result(trainer: Trainer) -> dict[str, Any]:
    """What a run leaves: adapters (selected and last), optimizer, tallies, records of metrics.jsonl without
    their clocks."""
    records = [
        {key: value for key, value in record.items() if "second" not in key and key != "time_shares"}
        for kind in ("step", "evaluation")
        for record in trainer.folder.read_metrics(kind)
    ]
    states = {name: tensor.clone() for name, tensor in trainer.bank.tensors().items()}
    return {
        "states": states,
        "steps": trainer.optimizer.steps,
        "kept": trainer.best_adapters.best,
        "records": records,
    }


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, tensor in theirs.pop("states").items():
        assert torch.equal(ours["states"][name], tensor), name
    assert {key: value for key, value in ours.items() if key != "states"} == theirs


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stops", [[1], [3], [5], [8, 10], [11]], ids=str)
@pytest.mark.quick("[3]-adamw", "[8, 10]-sgd")
def test_interrupted_run_ends_with_the_same_bits(tmp_path: Path, optimizer: str, stops: list[int]) -> None:
    whole = trainer_in(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    for sitting, stop in enumerate(stops):
        trainer = trainer_in(tmp_path / "parts", optimizer=optimizer)
        if sitting:
            trainer.resume()
        stop_before(trainer, stop)
    last = trainer_in(tmp_path / "parts", optimizer=optimizer)
    last.resume()
    assert last.state.step == stops[-1] // 3 * 3
    last.train()
    assert_equal(result(last), result(whole))


def test_resuming_after_the_last_step_trains_and_evaluates_nothing_twice(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    trainer.train()
    before = result(trainer)
    again = trainer_in(tmp_path)
    again.resume()
    again.step = again.evaluate = None  # type: ignore[assignment, method-assign]
    again.train()
    assert_equal(result(again), before)


def test_two_checkpoints_are_kept_and_hold_no_weight_of_the_base(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    stop_before(trainer, 11)
    files = trainer.checkpoints.files()
    assert [path.name for path in files] == ["step-00000006.safetensors", "step-00000009.safetensors"]
    adapters = sum(pool.values.numel() for pool in trainer.bank.pools)
    assert files[0].stat().st_size < 3 * 4 * adapters + 20_000  # values and two moments, and the facts


def test_more_can_be_kept_and_what_a_kill_cut_off_is_removed(tmp_path: Path) -> None:
    stop_before(trainer_in(tmp_path, keep_checkpoints=3), 11)
    again = trainer_in(tmp_path)  # how many are kept may change
    assert [path.name for path in again.checkpoints.files()] == [
        f"step-0000000{n}.safetensors" for n in (3, 6, 9)
    ]
    cut_off = again.checkpoints.folder / ".step-00000012.safetensors.4711.tmp"
    cut_off.write_bytes(b"half of it")
    again.resume()
    assert again.state.step == 9
    assert not cut_off.exists()


def test_training_continues_while_a_checkpoint_of_its_step_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, may_write = (
        Checkpoints(tmp_path, keep=2, identity=lambda without: {}, rows={"pool0": ["a", "b", "c"]}),
        threading.Event(),
    )
    monkeypatch.setattr(
        checkpoint,
        "write_atomically",
        lambda path, write: (may_write.wait(10), write_atomically(path, write)),
    )
    state = {"pool0.x": torch.ones(3)}
    files.save(1, state, {"at": 1})
    state["pool0.x"] += 1.0  # the next step
    assert list(tmp_path.iterdir()) == []
    may_write.set()
    restored = {"pool0.x": torch.zeros(3)}
    assert files.restore(restored) == {"at": 1}
    assert torch.equal(restored["pool0.x"], torch.ones(3))


@pytest.mark.usefixtures("log_to_stderr")
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped", "other facts"])
@pytest.mark.quick("cut", "flipped")
def test_damaged_checkpoint_is_recognised_and_the_one_before_it_used(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    stop_before(trainer_in(tmp_path / "parts"), 11)
    trainer = trainer_in(tmp_path / "parts")
    last = trainer.checkpoints.files()[-1]
    content = last.read_bytes()
    flipped = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    damaged = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "text": b"step: 9\n" * 50,
        "flipped": flipped,
    }
    damaged["other facts"] = content.replace(b"early_stopping", b"early_stopping".upper())
    last.write_bytes(damaged[damage])
    capsys.readouterr()
    trainer.resume()
    told = capsys.readouterr().err
    assert f"checkpoint {last} is damaged" in told
    assert "resuming after step 6" in told
    assert trainer.state.step == 6
    trainer.train()
    assert_equal(result(trainer), result(whole))


@pytest.mark.usefixtures("log_to_stderr")
def test_without_a_good_checkpoint_the_run_begins_again_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trainer_in(tmp_path / "whole")
    whole.train()
    stop_before(trainer_in(tmp_path / "parts"), 5)
    trainer = trainer_in(tmp_path / "parts")
    for path in trainer.checkpoints.files():
        path.write_bytes(b"")
    trainer.resume()
    assert "beginning at step 1" in capsys.readouterr().err
    trainer.train()
    assert_equal(result(trainer), result(whole))


def test_another_configuration_is_refused_with_every_key_that_differs(tmp_path: Path) -> None:
    stop_before(trainer_in(tmp_path), 5)
    other = trainer_in(tmp_path, steps=14, optimizer="sgd")
    with pytest.raises(UserError) as caught:
        other.resume()
    told = [str(problem) for problem in caught.value.problems]
    assert [line.split(": ")[0] for line in told] == ["training.steps = 14", "training.optimizer = 'sgd'"]
    assert "was 12 in checkpoint" in told[0]
    assert "set it back, or choose another output_dir" in told[0]


def test_another_base_data_or_adapter_set_is_refused_by_name(tmp_path: Path) -> None:
    stop_before(trainer_in(tmp_path), 5)
    for change, told in (
        ("base", "weights of the base model"),
        ("data", "examples of tasks.b"),
        ("adapters", "adapters = "),
    ):
        other = trainer_in(tmp_path)
        if change == "base":
            next(other.model.parameters()).data[0, 0] += 1
        elif change == "data":
            other.tasks = {**other.tasks, "b": replace(other.tasks["b"], data_hash="other")}
        else:
            other = make_trainer(specs()[:-1], tmp_path, interval=4, steps=12, save_every=3, log_every=2)
        before = result(other)
        with pytest.raises(UserError, match=told) as caught:
            other.resume()
        assert len(caught.value.problems) == 1
        assert_equal(result(other), before)


def test_fingerprint_is_of_the_base_alone(tmp_path: Path) -> None:
    model = tiny_model()
    plain = fingerprint(model)
    trainer = trainer_in(tmp_path)
    trainer.train()
    assert fingerprint(trainer.model) == plain
    assert fingerprint(tiny_model(dtype=torch.bfloat16)) != plain


def test_full_disk_is_reported_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path)
    stop_before(trainer, 4)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer.state.step = 6
    with file_size_limit(10_000):
        trainer.save()
        with pytest.raises(UserError, match=r"step-00000006.safetensors: the disk is full"):
            trainer.checkpoints.wait()
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_checkpoint_of_an_older_version_is_refused_in_one_line(tmp_path: Path) -> None:
    stop_before(trainer_in(tmp_path), 5)
    file = tmp_path / "checkpoints" / "step-00000003.safetensors"
    with safe_open(file, framework="pt") as content:
        facts = json.loads(content.metadata()["facts"])
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
    facts["position"] = facts.pop("state")
    save_file(tensors, file, with_checksums(tensors, json.dumps(facts)))
    with pytest.raises(UserError, match="written by an older version of flora_train: train again") as caught:
        trainer_in(tmp_path).resume()
    assert len(caught.value.problems) == 1


def test_state_is_saved_by_adapter_name(tmp_path: Path) -> None:
    """So that a bank with other adapters beside them gives each its own."""
    trainer = trainer_in(tmp_path / "run")
    trainer.train()
    state = json.loads(json.dumps(trainer.state_dict()))
    names = {spec.name for spec in trainer.bank.specs}
    for part in (
        state["optimizer"]["steps"],
        state["best"],
        state["metrics"]["tokens"],
        state["metrics"]["last_steps"],
    ):
        assert part.keys() == names
    other = make_trainer(specs()[::-1], tmp_path / "run", interval=4, steps=12)
    other.load_state_dict(state)
    assert other.state_dict() == state
    assert {name: other.optimizer.steps[i] for name, i in other.bank.ids.items()} == state["optimizer"][
        "steps"
    ]


def test_checkpoint_of_other_shapes_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = Checkpoints(tmp_path, keep=2, identity=lambda without: {}, rows={"pool0": ["a", "b", "c"]})
    files.save(1, {"pool0.x": torch.zeros(3)}, {})
    with pytest.raises(UserError, match=r"holds .*\(3,\).* needs .*\(4,\)"):
        files.restore({"pool0.x": torch.zeros(4)})
    assert caplog.records == []
