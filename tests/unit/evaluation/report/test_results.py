"""The report holds what was measured, also where an adapter failed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from flora_train.adapters.bank import AdapterBank
from flora_train.config.load import validate
from flora_train.data.task import Task
from flora_train.evaluation.report.files import read_report, write_report
from flora_train.evaluation.report.heldout_results import sweep_results
from flora_train.evaluation.report.results import Evaluation, build_results, examples_hash
from flora_train.evaluation.report.terminal import print_completions, print_results, print_sweeps, show
from flora_train.evaluation.report.types import Report, Retirement, RunFacts, SampleCompletion, SweepMember
from flora_train.final_evaluation import run_final_evaluation
from flora_train.run_context import RunContext
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import BestCheckpoint
from flora_train.training.heldout import HeldOut, evaluate_heldout
from flora_train.training.loss import RowLosses
from flora_train.training.train_state import TrainState
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.unit.training.harness import PAD, make_trainer, plans_of, random_split

NAN, INF = math.nan, math.inf


def results_of(
    folder: Path,
    losses: Mapping[str, float],
    base: float = 3.0,
    max_examples: int | None = None,
    **facts: Any,
) -> Report:
    """The report of a run on task a. losses: method -> nats of every held-out example."""
    config = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": {"a": {"train": "unused.jsonl"}},
            "adapters": {name: {"method": name, "lr": 1e-3} for name in losses},
            "training": {"steps": 20},
            "evaluation": {"interval": 10, "max_examples": max_examples, "bootstrap_samples": 100},
        }
    )
    bank = AdapterBank.attach(tiny_model(), [spec(method, "a") for method in losses])
    n = 6
    noise = np.linspace(0.9, 1.1, n)
    nats = {bank.ids[f"a-{name}"]: loss * noise for name, loss in losses.items()}
    tokens, sizes = np.full(n, 5), np.full(n, 15)
    heldout = {"a": HeldOut("a", {**nats, -1: base * noise}, tokens, sizes)}
    run_folder = RunFolder(folder)
    adapters = {
        f"a-{name}": {"loss": loss, "tokens": 70, "skipped_steps": 2} for name, loss in losses.items()
    }
    run_folder.append_metrics({"kind": "step", "step": 10, "task_tokens": {"a": 300}, "adapters": adapters})
    run_folder.append_metrics({"kind": "evaluation", "step": 10, "adapters": adapters})
    tasks = {"a": Task("a", 1.0, random_split(0, 20), random_split(1, n), "hash")}
    kept = {i: BestCheckpoint(10, 1.0) for i in nats}
    texts = {"base": "base text", **{name: f"{name} text" for name in losses}}
    completions = [SampleCompletion(task="a", prompt="p", completions=texts)]
    facts = {
        "seconds": {"train": 3.0},
        "model": "unused",
        "dtype": "float32",
        "config": "name: test\n",
        **facts,
    }
    evaluation = Evaluation(heldout, kept, completions)
    return build_results(config, run_folder, tasks, bank, evaluation=evaluation, facts=RunFacts(**facts))


def best_of(report: Report) -> list[str]:
    return [contender.family for contender in report.results[0].contenders if contender.best]


def test_lowest_bits_per_byte_are_best(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"flora": 2.0, "lora": 1.5, "ia3": 2.5})
    assert best_of(results) == ["lora"]
    contenders = results.results[0].by_family
    assert contenders["lora"].bits_per_byte.value == pytest.approx(1.5 / 15 / math.log(2))
    assert contenders["lora"].loss == pytest.approx(0.3)
    assert contenders["lora"].perplexity == pytest.approx(math.exp(0.3))
    assert contenders["flora"].difference_to_base.value == pytest.approx(-1.0 / 15 / math.log(2))


@pytest.mark.parametrize("wrong", [NAN, INF])
@pytest.mark.parametrize("victim", ["flora", "lora", "ia3"])
def test_adapter_whose_loss_is_not_finite_is_never_best(tmp_path: Path, victim: str, wrong: float) -> None:
    losses = {"flora": 2.0, "lora": 1.5, "ia3": 2.5}
    expected = min((name for name in losses if name != victim), key=lambda name: losses[name])
    assert best_of(results_of(tmp_path, {**losses, victim: wrong})) == [expected]


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_report_without_finite_losses_has_no_best_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: float
) -> None:
    results = results_of(tmp_path, {"flora": wrong, "lora": wrong})
    assert best_of(results) == []
    folder = RunFolder(tmp_path)
    write_report(results, folder.evaluation)
    show(folder)
    shown = capsys.readouterr().out
    assert "a (before)" in shown
    assert "after" not in shown
    assert "--as merged" in shown


def test_a_sweep_names_the_winner_of_each_task(tmp_path: Path) -> None:
    specs = [spec("lora", task, f"x_lr{i}", sweep="x") for task in "ab" for i in range(3)] + [
        spec("ia3", "a")
    ]
    bank = AdapterBank.attach(tiny_model(), specs)
    bits = {"a": [2.0, 1.0, NAN], "b": [NAN, NAN, NAN]}
    heldout = {}
    for task, values in bits.items():
        nats = {
            bank.ids[f"{task}-x_lr{i}"]: np.array([value * math.log(2)]) for i, value in enumerate(values)
        }
        heldout[task] = HeldOut(
            task, {**nats, bank.ids["a-ia3"]: np.array([0.1])}, np.array([1]), np.array([1])
        )
    halved = Retirement(step=5, reason="halving")
    settings = {f"x_lr{i}": {"lr": i / 10} for i in range(3)}
    found = sweep_results(bank, heldout, {"a-x_lr0": halved}, settings=settings)
    assert [(part.sweep, part.task, part.winner) for part in found] == [("x", "a", "x_lr1"), ("x", "b", None)]
    assert found[0].members == (
        SweepMember(family="x_lr0", settings={"lr": 0.0}, bits_per_byte=2.0, retired=halved),
        SweepMember(family="x_lr1", settings={"lr": 0.1}, bits_per_byte=1.0),
        SweepMember(family="x_lr2", settings={"lr": 0.2}, bits_per_byte=None),
    )
    console = Console(record=True, width=80, soft_wrap=True)
    print_sweeps(results_of(tmp_path, {"lora": 1.0}).replace(sweeps=found), console)
    assert "sweep x: lowest bits per byte for x_lr1 on a, none on b" in console.export_text()


@pytest.mark.parametrize("losses", [{"flora": NAN, "lora": 2.0}, {"flora": INF, "lora": NAN}, {"lora": 1e6}])
def test_report_is_valid_json_whatever_the_losses(tmp_path: Path, losses: dict[str, float]) -> None:
    results = results_of(tmp_path, losses)
    content = json.loads(json.dumps(results.model_dump(mode="json"), allow_nan=False))
    assert Report.model_validate(content) == results
    for contender in results.results[0].contenders:
        finite = math.isfinite(losses[contender.family])
        assert (contender.loss is not None) == finite
        assert (contender.difference_to_base.finite is not None) == finite


def test_base_that_is_not_finite_is_reported_and_adapters_are_still_ranked(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"flora": 2.0, "lora": 1.5}, base=NAN)
    assert results.results[0].base.loss is None
    assert results.curves.base == {"a": None}
    assert best_of(results) == ["lora"]


@pytest.mark.parametrize("first", [None, 2])
def test_base_of_the_curves_is_evaluated_on_the_same_examples(tmp_path: Path, first: int | None) -> None:
    results = results_of(tmp_path, {"lora": 2.0}, max_examples=first)
    share = np.linspace(0.9, 1.1, 6)[:first]
    assert results.curves.base == {"a": pytest.approx(3.0 * share.mean() / 5)}
    assert results.curves.heldout_examples == first


def test_base_of_the_curves_equals_an_evaluation_of_the_base_during_training(tmp_path: Path) -> None:
    """The real figures: what `evaluate_heldout` gives on the first examples, and the report from all of
    them."""
    model = tiny_model()
    bank = AdapterBank.attach(model, [spec("lora", "a")])
    perturb(bank)
    task = Task("a", 1.0, random_split(0, 20), random_split(1, 6), "")
    judged = {
        n: evaluate_heldout(
            RowLosses(model), bank, [task], max_tokens=256, pad_token=PAD, max_examples=n, with_base=True
        )["a"]
        for n in (None, 3)
    }
    assert judged[None].loss(-1, first=3) == pytest.approx(judged[3].loss(-1), rel=1e-6)
    assert judged[None].loss(-1) != pytest.approx(judged[3].loss(-1), rel=1e-6)


def test_curves_and_counts_come_from_the_metrics(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"lora": 2.0, "flora": NAN})
    assert results.curves.training == {"a-lora": ((10, 2.0),), "a-flora": ((10, None),)}
    assert results.curves.heldout["a-lora"] == ((10, 2.0),)
    assert results.tasks[0].tokens_drawn == 300
    assert results.curves.drawn == {"a": ((10, 300),)}
    adapter = next(adapter for adapter in results.adapters if adapter.family == "lora")
    assert (adapter.tokens, adapter.skipped_steps, adapter.selected_step) == (70, 2, 10)
    assert (adapter.rollbacks, adapter.quarantined, adapter.retired) == (0, None, None)


def test_results_of_a_trained_bank_name_every_adapter_once(tmp_path: Path) -> None:
    """The same through the trainer: three tasks, one of them with two adapters that share no pool."""
    specs = [spec("lora", "a"), spec("ia3", "b"), spec("flora", "a"), spec("lora", "c", "other", rank=2)]
    trainer = make_trainer(specs, tmp_path)
    for number, plan in enumerate(plans_of(trainer, 2)):
        trainer.step(number, plan)
    trainer.state = TrainState(step=2, seconds=1.0)
    trainer.log()
    heldout = evaluate_heldout(
        trainer.row_losses,
        trainer.bank,
        trainer.tasks.values(),
        max_tokens=4096,
        pad_token=PAD,
        with_base=True,
    )
    results = build_results(
        trainer.config,
        trainer.folder,
        trainer.tasks,
        trainer.bank,
        evaluation=Evaluation(heldout, {}),
        facts=RunFacts(),
    )
    named = {(r.task, c.name, c.family) for r in results.results for c in r.contenders}
    assert named == {(s.task, s.name, s.family) for s in specs}
    assert [len(result.differences) for result in results.results] == [1, 0, 0]
    assert all(sum(c.best for c in result.contenders) == 1 for result in results.results)


def test_final_evaluation_writes_report_and_adapters_with_time_and_device(tmp_path: Path) -> None:
    trainer = make_trainer([spec("lora", "a"), spec("ia3", "b")], tmp_path / "run")
    trainer.folder.claim(trainer.config)
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    session = RunContext(**vars(trainer.context), tokenizer=tokenizer)
    run_final_evaluation(session, {0: BestCheckpoint(7, 1.0)})
    facts = read_report(trainer.folder).facts
    assert facts.device == "cpu"
    assert facts.finished is not None
    assert datetime.fromisoformat(facts.finished).tzinfo is not None
    assert not trainer.folder.finished  # that is for the end of training to say
    assert sorted(path.name for path in trainer.folder.adapters.iterdir()) == ["a-lora", "b-ia3"]


def test_terminal_shows_the_best_in_bold_and_its_completion(tmp_path: Path) -> None:
    results = results_of(tmp_path, {"flora": 2.0, "lora": 1.5, "ia3": NAN})
    console = Console(record=True, width=200, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    print_results(results, console)
    print_completions(results, console)
    styled, plain = console.export_text(styles=True, clear=False), console.export_text()
    assert re.search(r"\x1b\[1m *0\.144", styled)  # 1.5 / 15 / ln 2
    assert "not finite" in plain
    assert "a (after, lora)" in plain
    assert "lora text" in plain
    assert "flora text" not in plain


def test_examples_hash_is_of_the_held_out_examples_alone() -> None:
    same, other = random_split(3, 20), random_split(4, 20)
    assert examples_hash(same) == examples_hash(random_split(3, 20))
    assert examples_hash(same) != examples_hash(other)
    changed = replace(same, label_bytes=same.label_bytes + 1)
    assert examples_hash(same) != examples_hash(changed)
    assert examples_hash(same) != examples_hash(replace(same, pack_offsets=same.pack_offsets[:-1]))
