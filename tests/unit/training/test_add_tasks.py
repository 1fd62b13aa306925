"""Tasks join an interrupted or a finished run; the adapters that it had stay unchanged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.add_tasks import read_finished_run
from flora_train.training.guard import Quarantine
from flora_train.training.trainer import Trainer
from tests.conftest import mixed_specs
from tests.unit.training.harness import make_trainer, snapshot
from tests.unit.training.test_checkpoint import stop_before


def config_of(names: str, **more: Any) -> RunConfig:
    raw = {
        "name": "run",
        "model": {"path": "unused"},
        "tasks": {name: {"train": "unused.jsonl"} for name in names},
        "adapters": {
            "lora": {"method": "lora", "lr": 1e-3},
            "first": {"method": "ia3", "lr": 1e-3, "tasks": ["a"]},
        },
        "training": {"steps": 8, "tokens_per_step": 90, "max_length": 16},
        "resume": True,
        **more,
    }
    return validate(raw)


def trainer_of(folder: Path, tasks: str) -> Trainer:
    """The adapters of these tasks among six, all methods: ids of the old ones are others where more are
    there."""
    folder.mkdir(exist_ok=True)
    specs = [spec for spec in mixed_specs(lr=5e-3) if spec.task in tasks]
    trainer = make_trainer(specs, folder, interval=4, steps=8, save_every=2, optimizer="adamw")
    trainer.tasks = {name: task for name, task in trainer.tasks.items() if name in tasks}
    trainer.config = trainer.config.model_copy(
        update={"tasks": {name: task for name, task in trainer.config.tasks.items() if name in tasks}}
    )
    trainer.joined = dict.fromkeys(trainer.tasks, 0)
    trainer.replan()
    return trainer


def extend(trainer: Trainer, init_adapters: Callable[[list[int]], None] = lambda adapters: None) -> None:
    """Add the trainer's new tasks to the finished run in its folder."""
    trainer.extend(
        read_finished_run(replace(trainer.context, tasks=trainer.tasks), trainer.identity), init_adapters
    )


def finish(trainer: Trainer) -> None:
    """What a run leaves in its folder."""
    trainer.folder.claim(trainer.config)
    trainer.train()
    seconds = {"evaluate during training": trainer.state.evaluation_seconds}
    ended = {"joined": trainer.joined, "identity": trainer.identity()}
    trainer.folder.update_run_json(finished=True, training={"seconds": seconds}, ended=ended)
    trainer.checkpoints.clear()


def test_tasks_join_a_finished_run_and_its_adapters_keep_their_bits(tmp_path: Path) -> None:
    before = trainer_of(tmp_path, "ab")
    finish(before)
    kept = snapshot(before)
    files = {path.name: path.read_bytes() for path in before.best_adapters.folder.iterdir()}
    after = trainer_of(tmp_path, "abc")
    extend(after)
    assert (after.state.step, after.end) == (8, 16)
    assert after.joined == {"a": 0, "b": 0, "c": 8}
    assert len(after.checkpoints.files()) == 1
    start = snapshot(after)["c-pure"]
    after.train()
    assert after.state.step == 16
    now = snapshot(after)
    for name, state in kept.items():
        assert torch.equal(now[name][0], state[0]), name
        assert (after.best_adapters.folder / f"{name}.safetensors").read_bytes() == files[
            f"{name}.safetensors"
        ]
    assert (now["c-pure"][0] - start[0]).abs().max() > 1e-4
    assert after.optimizer.steps[after.bank.ids["c-pure"]] == 8
    assert after.metrics.task_tokens["a"] == before.metrics.task_tokens["a"] > 0
    assert (
        after.metrics.tokens[after.bank.ids["a-lora"]] == before.metrics.tokens[before.bank.ids["a-lora"]] > 0
    )
    assert after.early_stopping.record() == {}


def test_another_base_or_other_data_is_refused_and_a_quarantined_adapter_stays_so(tmp_path: Path) -> None:
    before = trainer_of(tmp_path, "ab")
    before.guard.quarantined[before.bank.ids["a-lora"]] = Quarantine(3, "its loss is not finite")
    finish(before)
    for change, words in (("base", "weights of the base model"), ("data", "examples of tasks.b")):
        after = trainer_of(tmp_path, "abc")
        if change == "base":
            next(after.model.parameters()).data[0, 0] += 1
        else:
            after.tasks = {**after.tasks, "b": replace(after.tasks["b"], data_hash="other")}
        with pytest.raises(UserError, match=words):
            extend(after)
        assert not after.checkpoints.files()
    after, asked = trainer_of(tmp_path, "abc"), list[int]()
    extend(after, asked.extend)
    assert asked == [after.bank.ids["c-pure"], after.bank.ids["c-dora"]]
    assert after.guard.quarantined == {after.bank.ids["a-lora"]: (3, "its loss is not finite")}


def test_the_newcomer_learns_as_if_it_had_been_alone(tmp_path: Path) -> None:
    finish(trainer_of(tmp_path / "extended", "ab"))
    grown = trainer_of(tmp_path / "extended", "abc")
    extend(grown)
    grown.train()
    alone = trainer_of(tmp_path / "alone", "c")
    alone.train()
    ours, theirs = (t.bank.row(t.bank.ids["c-pure"]) for t in (grown, alone))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_extended_run_that_is_interrupted_resumes_with_the_same_bits(tmp_path: Path) -> None:
    results = []
    for name, stop in (("whole", None), ("parts", 13)):
        finish(trainer_of(tmp_path / name, "ab"))
        trainer = trainer_of(tmp_path / name, "abc")
        extend(trainer)
        if stop is not None:
            stop_before(trainer, stop)
            trainer = trainer_of(tmp_path / name, "abc")
            trainer.resume()
            assert trainer.state.step == 12
        trainer.train()
        results.append(snapshot(trainer))
    for name, state in results[0].items():
        assert all(torch.equal(a, b) for a, b in zip(state, results[1][name], strict=True)), name


def test_tasks_join_an_interrupted_run_whose_adapters_train_on(tmp_path: Path) -> None:
    first = trainer_of(tmp_path, "ac")
    stop_before(first, 5)
    saved = trainer_of(tmp_path, "ac")
    saved.resume()
    then = snapshot(saved)
    after = trainer_of(tmp_path, "abc")
    after.resume()
    assert after.state.step == 4
    assert after.joined == {"a": 0, "b": 4, "c": 0}
    now = snapshot(after)
    for name, state in then.items():
        assert all(torch.equal(a, b) for a, b in zip(state, now[name], strict=True)), name
    after.train()
    assert after.state.step == after.end == 12
    steps = {name: after.optimizer.steps[i] for name, i in after.bank.ids.items()}
    assert steps["a-lora"] <= 8
    assert steps["b-lora_some"] > 4
    drawn = [{draw.task for draw in after.mixture.step(n)} for n in range(12)]
    assert set().union(*drawn[8:]) == {"b"}  # the others have had their eight steps
    assert "b" not in set().union(*drawn[:4])


def test_only_tasks_may_join(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    begun = config_of("ab")
    folder.claim(begun)
    folder.update_run_json(finished=True)
    assert folder.status(begun) == "finished"
    assert folder.status(config_of("abc")) == "extended"
    folder.update_run_json(finished=False)
    assert folder.status(config_of("abc")) == "interrupted"
    for change, key in (
        ({"seed": 1}, "seed"),
        ({"tasks": {"a": {"train": "unused.jsonl"}, "c": {"train": "c.jsonl"}}}, "tasks.b"),
    ):
        with pytest.raises(UserError, match=key):
            folder.status(config_of("abc", **change))
    adapters = {
        "lora": {"method": "lora", "lr": 1e-3},
        "first": {"method": "ia3", "lr": 1e-3, "tasks": ["a", "c"]},
    }
    assert folder.status(config_of("abc", adapters=adapters)) == "interrupted"
    adapters["second"] = {"method": "flora", "lr": 1e-3, "tasks": ["c"]}
    assert folder.status(config_of("abc", adapters=adapters)) == "interrupted"
    adapters["second"]["tasks"] = ["b", "c"]
    with pytest.raises(UserError, match=r"adapters\.second"):
        folder.status(config_of("abc", adapters=adapters))
