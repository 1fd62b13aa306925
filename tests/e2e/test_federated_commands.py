"""What commands say of a federated run: its report again, a plan before it, and one error where it cannot be
used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from transformers import AutoModel

import flora_train
from flora_train.cli import main
from flora_train.commands.run_result import RunResult
from flora_train.config.errors import UserError
from flora_train.federated.result_types import FederatedReport
from tests.encoders import labelled_rows, save_encoder, write_rows

NAMES = ("lora", "full", "central")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients, two rounds, three strategies."""
    folder = tmp_path_factory.mktemp("federated")
    base = save_encoder(folder / "base")
    AutoModel.from_pretrained(base).save_pretrained(base)  # with a pooler, which is then no part of the heads
    content = {
        "name": "clients",
        "num_threads": 1,
        "output_dir": str(folder / "run"),
        "model": {"path": str(base), "dtype": "float32"},
        "tasks": {
            "kind": {
                "train": write_rows(folder / "rows.jsonl", labelled_rows(60)),
                "validation_fraction": 0.2,
                "label": "kind",
                "text": "text",
            }
        },
        "adapters": {
            "lora": {"method": "lora", "rank": 2, "lr": 1e-2, "lr_schedule": "constant"},
            "full": {"method": "head", "lr": 1e-3, "lr_schedule": "constant"},
        },
        "federated": {
            "rounds": 2,
            "num_clients": 3,
            "dirichlet_alpha": 1.0,
            "batch_examples": 4,
            "strategies": {
                "lora": {"adapter": "lora"},
                "full": {"adapter": "full", "algorithm": "full"},
                "central": {"adapter": "lora", "central": True},
            },
        },
        "training": {"steps": 2, "tokens_per_microbatch": 300, "max_length": 32},
        "evaluation": {"bootstrap_samples": 100},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(recipe: Path) -> RunResult:
    return flora_train.train(flora_train.load_config([f"recipe={recipe}"]))


def test_plan_tells_clients_bytes_and_disk_before_the_run(
    recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", f"recipe={recipe}", f"output_dir={tmp_path / 'planned'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headings = [line.split()[0] for line in lines]
    assert headings == ["clients", "rounds", *["strategy"] * 3, "disk", "time"]
    assert "3, of which 3 train in a round" in lines[0]
    assert "2 in each of 3 runs (3 strategies x 1 seeds)" in lines[1]
    assert [line.split()[1] for line in lines[2:5]] == [f"{name}:" for name in NAMES]
    assert lines[4].endswith("nothing is sent")
    assert not (tmp_path / "planned").exists()


def test_plan_refuses_clients_that_cannot_be_made(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"recipe={recipe}", "federated.num_clients=500"]) == 2
    assert capsys.readouterr().err.startswith("error: federated.")


def test_doctor_shares_a_micro_batch_among_the_clients_of_a_round(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"recipe={recipe}", "federated.clients_per_round=2"]) == 0
    said = capsys.readouterr().out
    assert "A micro-batch of 300 tokens, shared evenly by 2 clients of a round:" in said
    assert "2 x lora, rank 2" in said


def test_result_of_a_run_is_a_federated_report(run: RunResult) -> None:
    report = run.report
    assert isinstance(report, FederatedReport)
    assert [strategy.name for strategy in report.strategies] == list(NAMES)
    shown = run._repr_html_()
    assert "federated.html" in shown
    assert shown.count("<tr>") == 4
    assert "accuracy" in shown
    lora = report.strategies[0]
    assert lora.values * 4 * 3 == lora.seeds[0].rounds[-1].bytes_up


def test_planned_bytes_are_those_that_were_sent(
    run: RunResult, recipe: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = run.report
    assert isinstance(report, FederatedReport)
    assert main(["plan", f"recipe={recipe}", f"output_dir={tmp_path / 'planned'}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    lora, full, _ = report.strategies
    sent = [line.partition(": ")[2].partition(" numbers")[0] for line in lines if line.startswith("strategy")]
    assert sent[0] == f"{lora.values:,}"
    assert int(sent[1].replace(",", "")) >= full.values  # weights without a gradient are not sent


def test_report_writes_the_page_again_and_prints_the_tables(
    run: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    page = run / "eval/federated.html"
    before = page.read_bytes()
    page.unlink()
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    assert page.read_bytes() == before
    assert said.splitlines()[-1] == str(page)
    assert "clients: 3 clients, 2 rounds; higher is better, in percent" in said


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--table", "results.csv"], "table"),
        (["--out", "page.html"], "out"),
        (["--beside", "paper"], "beside"),
    ],
)
def test_report_refuses_what_is_not_for_federated_runs(
    words: list[str], key: str, run: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {key} = '{words[1]}': is not for federated runs")


def test_several_runs_are_not_compared_where_one_is_federated(
    run: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(run), str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run = '{run}': is a federated run, whose strategies are compared")


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate"],
        ["solve"],
        ["chat"],
        ["serve"],
        ["export"],
        ["push", "--repo", "org/name", "--dry-run"],
        ["lm-eval", "--tasks", "arc_easy"],
    ],
    ids=lambda words: words[0],
)
def test_other_commands_say_what_the_run_is_and_what_works(
    words: list[str], run: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([words[0], str(run), *words[1:]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: run = '{run}': is a federated run: flora-train report {run}")
    assert str(run / "adapters") in line


@pytest.mark.parametrize("read", [flora_train.read_metrics, flora_train.evaluate, lambda run: run.metrics])
def test_python_says_the_same(read: Callable[[RunResult], object], run: RunResult) -> None:
    with pytest.raises(UserError, match="is a federated run"):
        read(run)


def test_global_adapters_are_peft_folders(run: RunResult) -> None:
    names = sorted(path.name for path in (run / "adapters").iterdir())
    assert names == ["global-central", "global-lora"]
    assert (run / "adapters/global-lora/adapter_model.safetensors").exists()
