"""The main job, as a user starts it: train, evaluate, report, export, and what the run folder holds."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import expand
from flora_train.commands.run_result import RunResult
from flora_train.config.load import load_config
from flora_train.data.batch import share_of_rank
from flora_train.data.task import load_tasks
from flora_train.models.loading import load_base_model, load_tokenizer
from flora_train.training.step_plan import StepPlan, make_mixture, plan_step
from tests.e2e.conftest import PLANTED, Launch, launch_environment
from tests.forked import Forked, python

ADAPTERS = sorted(f"{task}-{method}" for task in ("letters", "digits") for method in ("flora", "lora", "ia3"))


@pytest.fixture(scope="module")
def finished(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tiny"
    done = launch(
        f"recipe={recipe}", f"output_dir={folder}", "training.compare_separate=true", accelerate=True
    )
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    (folder / "stderr.txt").write_text(done.stderr)
    return folder


def test_no_secret_of_the_environment_is_in_any_file_of_a_run(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if PLANTED.encode() in path.read_bytes()] == []


def test_reference_to_a_secret_is_refused_before_anything_is_written(
    recipe: Path, launch: Launch, tmp_path: Path
) -> None:
    for key in ("tracking.group", "tasks.letters.license", "model.revision"):
        done = launch(
            f"recipe={recipe}", f"output_dir={tmp_path / 'run'}", f"{key}=${{oc.env:FLORA_TEST_SECRET}}"
        )
        assert done.returncode == 2
        assert f"error: {key} = '${{oc.env:FLORA_TEST_SECRET}}': 'oc.env' is a resolver" in done.stderr
        assert PLANTED not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / "adapters" / name / "adapter_model.safetensors").read_bytes() for name in ADAPTERS
    }


def largest_difference(a: Path, b: Path) -> float:
    differences = []
    for name in ADAPTERS:
        left, right = (
            load_file(folder / "adapters" / name / "adapter_model.safetensors") for folder in (a, b)
        )
        assert left.keys() == right.keys()
        differences += [float((left[key] - right[key]).abs().max()) for key in left]
    return max(differences)


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "eval" / "report.json").read_text())


def test_run_folder_holds_what_the_documentation_says(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "adapters").iterdir()) == ADAPTERS
    assert sorted(path.stem for path in (finished / "checkpoints").rglob("*.*")) == ADAPTERS
    for name in ("config.yaml", "metrics.jsonl", "run.json", "eval/report.html", "eval/report.json"):
        assert (finished / name).stat().st_size > 0, name
    facts = json.loads((finished / "run.json").read_text())
    assert facts["finished"]
    for name in ADAPTERS:
        record = json.loads((finished / "adapters" / name / "flora_train_base.json").read_text())
        assert record == {"base": facts["base"]}
    assert not list(finished.rglob("*.tmp"))


def test_every_adapter_beats_the_base_on_held_out_examples_of_its_task(finished: Path) -> None:
    report = read_report(finished)
    assert {result["task"] for result in report["results"]} == {"letters", "digits"}
    for result in report["results"]:
        assert len(result["contenders"]) == 3
        for contender in result["contenders"]:
            assert contender["difference_to_base"]["high"] < 0, contender["name"]


def test_the_report_says_what_separate_runs_would_cost(finished: Path) -> None:
    speedup = read_report(finished)["facts"]["joint_speedup"]
    assert speedup["adapters"] > 1
    assert speedup["joint_seconds"] > 0
    assert "adapter by adapter (a single measurement" in (finished / "eval" / "report.html").read_text()


def test_run_result_is_a_path_with_report_metrics_and_a_table_for_notebooks(finished: Path) -> None:
    run = RunResult(finished)
    assert Path(run) == Path(str(run)) == run.path == finished
    assert (run / "eval" / "report.html").exists()
    assert {result.task for result in run.report.results} == {"letters", "digits"}
    losses = run.metrics[run.metrics.metric == "heldout_loss"]
    assert set(losses.adapter) == set(ADAPTERS)
    assert set(losses.step) == {6, 12}
    assert set(losses.method) == {"flora", "lora", "ia3"}
    page = run._repr_html_()
    for cell in ("letters", "digits", "base", "flora", str(finished / "eval" / "report.html")):
        assert cell in page


def test_terminal_shows_progress_with_eta_results_completions_and_the_next_command(finished: Path) -> None:
    shown, progress = (finished / "stdout.txt").read_text(), (finished / "stderr.txt").read_text()
    assert "train: 100%" in progress
    assert "tok/s" in progress
    assert all(method in progress for method in ("flora", "lora", "ia3"))
    for words in (
        "held-out bits per byte",
        "letters (before)",
        "letters (after",
        "report.html",
        "flora-train export",
    ):
        assert words in shown


def test_resolved_configuration_runs_again_to_the_same_bytes(
    finished: Path, launch: Launch, tmp_path: Path
) -> None:
    done = launch(f"recipe={finished / 'config.yaml'}", f"output_dir={tmp_path / 'again'}")
    assert done.returncode == 0, done.stderr
    assert adapter_bytes(finished) == adapter_bytes(tmp_path / "again")


def test_two_processes_equal_one_to_1e_6(
    finished: Path, launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    done = launch(
        f"recipe={recipe}", f"output_dir={tmp_path / 'two'}", "num_processes=2", processes=2, accelerate=True
    )
    assert done.returncode == 0, done.stderr
    assert read_report(tmp_path / "two")["facts"]["processes"] == 2
    assert largest_difference(finished, tmp_path / "two") <= 1e-6
    plans, bank = plans_and_bank(recipe, tmp_path)
    lacking = [
        plan.label_tokens.keys()
        - {row.adapter for rows in share_of_rank(plan.microbatches, rank, 2) for row in rows}
        for plan in plans
        for rank in range(2)
    ]
    assert any(lacking)
    assert bytes_sent(finished) == 0
    assert bytes_sent(tmp_path / "two") == sum(
        bank.row(adapter).nbytes for plan in plans for adapter in plan.label_tokens
    )
    assert bytes_sent(tmp_path / "two") < sum(
        bank.row(adapter).nbytes for adapter in range(len(bank.specs))
    ) * len(plans)


def bytes_sent(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["gradient_bytes_sent"]


@pytest.mark.parametrize("policy", ["quarantine", "rollback"])
def test_two_processes_that_divide_the_base_page_and_guard_equal_one_that_does_not(
    policy: str, launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    going_wrong = ["adapters.ia3.lr=1e30", f"guard.policy={policy}"]  # its second loss is not finite
    apart = ["model.fsdp=true", "adapters.device_slots=6", "model.gradient_checkpointing=non_reentrant"]
    for name, settings, processes in (("one", [], 1), ("two", apart, 2)):
        folder = f"output_dir={tmp_path / name}"
        done = launch(f"recipe={recipe}", folder, *going_wrong, *settings, processes=processes)
        assert done.returncode == 0, done.stderr
    assert "every process holds 1/2 of the base" in done.stderr
    assert largest_difference(tmp_path / "one", tmp_path / "two") <= 1e-6
    whole, divided = read_report(tmp_path / "one"), read_report(tmp_path / "two")
    assert divided["completions"] == whole["completions"]
    wrong = [
        [
            (adapter["name"], adapter["rollbacks"])
            for adapter in report["adapters"]
            if adapter["rollbacks"] or adapter["quarantined"]
        ]
        for report in (whole, divided)
    ]
    times = 0 if policy == "quarantine" else 3
    assert wrong[0] == wrong[1] == [("letters-ia3", times), ("digits-ia3", times)]


def plans_and_bank(recipe: Path, cache: Path) -> tuple[list[StepPlan], AdapterBank]:
    """What the recipe's steps hold."""
    config = load_config([f"recipe={recipe}"])
    tasks = load_tasks(config, load_tokenizer(config.model), cache)
    bank = AdapterBank.attach(load_base_model(config.model, torch.device("cpu")), expand(config))
    mixture = make_mixture(tasks, bank.specs, config)
    numbers = range(config.training.steps)
    plans = [
        plan_step(mixture, number, tasks, bank, config.training.tokens_per_microbatch) for number in numbers
    ]
    return [plan for plan in plans if plan is not None], bank


def test_another_number_of_processes_than_asked_for_is_refused(
    launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    done = launch(f"recipe={recipe}", f"output_dir={tmp_path / 'x'}", "num_processes=2")
    assert done.returncode == 1 or done.returncode == 2
    assert "num_processes = 2: but 1 process(es) run" in done.stderr
    assert not (tmp_path / "x").exists()


def test_finished_run_is_kept_on_resume_and_refused_otherwise(
    finished: Path, launch: Launch, recipe: Path
) -> None:
    before = (finished / "run.json").read_text()
    again = launch(f"recipe={recipe}", f"output_dir={finished}", "resume=true")
    assert again.returncode == 0, again.stderr
    assert "is kept" in again.stderr
    assert "held-out bits per byte" in again.stdout
    refused = launch(f"recipe={recipe}", f"output_dir={finished}")
    assert "holds a finished run" in refused.stderr
    other = launch(f"recipe={recipe}", f"output_dir={finished}", "resume=true", "seed=5")
    assert "seed = 5: was 0 when the run in" in other.stderr
    assert (finished / "run.json").read_text() == before


def test_evaluate_export_and_report_commands_reproduce_the_run(finished: Path) -> None:
    before, report = adapter_bytes(finished), read_report(finished)
    for words in (
        ("evaluate", str(finished)),
        ("export", str(finished), "letters-flora"),
        ("report", str(finished)),
    ):
        done = python("-m", "flora_train", *words)
        assert done.returncode == 0, done.stderr
    assert adapter_bytes(finished) == before
    assert read_report(finished)["results"] == report["results"]


def test_tensorboard_gets_per_adapter_metrics(launch: Launch, recipe: Path, tmp_path: Path) -> None:
    done = launch(
        f"recipe={recipe}",
        f"output_dir={tmp_path / 'run'}",
        "tracking.trackers=[tensorboard]",
        "training.steps=4",
    )
    assert done.returncode == 0, done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = tmp_path / "run" / "tensorboard"
    assert f"tensorboard --logdir {logs}" in done.stderr
    events = next(logs.rglob("events.out.tfevents*"))
    assert list((tmp_path / "run").rglob("events.out.tfevents*")) == list(logs.rglob("events.out.tfevents*"))
    log = EventAccumulator(str(events.parent)).Reload()
    of = [name.replace("-", "/") for name in ADAPTERS]
    found = set(log.Tags()["scalars"])
    assert {f"{stage}/{name}/loss" for stage in ("train", "eval") for name in of} <= found
    assert {f"final/{name}/bits_per_byte" for name in (*of, "letters/base", "digits/base")} <= found
    (final,) = log.Scalars("final/letters/flora/bits_per_byte")
    contenders = {
        row["name"]: row
        for result in read_report(tmp_path / "run")["results"]
        for row in result["contenders"]
    }
    assert final.value == pytest.approx(contenders["letters-flora"]["bits_per_byte"]["value"], rel=1e-6)


def test_wandb_is_offline_by_default_and_continues_a_resumed_run(
    launch: Launch, recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = (
        f"recipe={recipe}",
        f"output_dir={run}",
        "tracking.trackers=[wandb]",
        "tracking.group=tests",
        "resume=true",
    )
    words += (
        "tracking.artifacts=true",
        "training.save_every=5",
        "training.steps=60",
        "evaluation.interval=null",
    )
    begun = Forked(["train.py", *words], launch_environment(tmp_path / "cache"))
    while not list(run.glob("checkpoints/step-*")):
        assert begun.poll() is None, begun.said()
        time.sleep(0.01)
    os.kill(begun.pid, signal.SIGTERM)
    begun.wait(60)
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    logs = sorted(run.rglob("run-*.wandb"))
    assert len(logs) == 2
    assert len({log.stem for log in logs}) == 1
    assert all(log.parent.name.startswith("offline-run-") for log in logs)
    content = logs[-1].read_bytes() + logs[0].read_bytes()
    for name in (b"tests", b"tiny-report", b"tiny-letters-flora", b"final/letters/flora/bits_per_byte"):
        assert name in content
