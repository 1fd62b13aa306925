"""The study of federated strategies: tables and answers that follow from reports, and the runs for rates."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml

from flora_train.config.load import validate
from flora_train.evaluation.result_model import Interval
from flora_train.federated.build_report import write_federated_report
from flora_train.federated.result_types import (
    FederatedReport,
    RoundResult,
    SeedResult,
    StrategyDifference,
    StrategyResult,
)
from flora_train.federated.stages import stages_of
from studies.federated_study.rates import GRID, name_of, rates_recipe, rates_table
from studies.federated_study.runs import StudyError, StudyRun, finished_runs, read_runs
from studies.federated_study.table import answer, write_tables

ROOT = Path(__file__).resolve().parents[3]
RECIPE = yaml.safe_load((ROOT / "recipes" / "federated_local.yaml").read_text(encoding="utf-8"))
ROUNDS = 20


def interval(value: float, half: float) -> Interval:
    low, high = value - half, value + half
    return Interval(value=value, low=low, high=high, excludes_zero=low > 0 or high < 0)


def strategy(name: str, values: Sequence[float]) -> StrategyResult:
    """A strategy whose accuracy rises to these values (of the seeds) in the last round."""
    seeds = []
    for number, value in enumerate(values):
        rounds = []
        for index in range(ROUNDS):
            reached = interval(value * (index + 1) / ROUNDS, 0.02)
            rounds.append(
                RoundResult(
                    round=index,
                    stage="adapter",
                    loss=1.0,
                    accepted=10,
                    bytes_up=10_000,
                    bytes_down=20_000,
                    seconds_clients=1.0,
                    seconds_server=0.5,
                    left_out=None,
                    figures={"accuracy": reached},
                )
            )
        seed = SeedResult(
            name=f"{name}-seed{number}", seed=number, rounds=rounds, examples={"a": 9}, label_entropy=0.7
        )
        seeds.append(seed)
    mean = sum(values) / len(values)
    return StrategyResult(
        name=name,
        algorithm="product_mean",
        central=False,
        method="lora",
        rank=8,
        values=100,
        seeds=seeds,
        figures={"accuracy": interval(mean, 0.03).replace(deviation=0.01)},
    )


def report_of(
    values: Mapping[str, Sequence[float]], alpha: float = 0.1, half: float = 0.02
) -> FederatedReport:
    """A report of strategies with these accuracies by seed. half: width of the intervals of differences."""
    strategies = [strategy(name, own) for name, own in values.items()]
    differences = []
    for number, first in enumerate(strategies):
        for second in strategies[number + 1 :]:
            value = (first.figures["accuracy"].value or 0) - (second.figures["accuracy"].value or 0)
            differences.append(
                StrategyDifference(first=first.name, second=second.name, value=interval(value, half))
            )
    return FederatedReport(
        name="federated_local",
        model="assets/models/minilm-l6",
        dtype="float32",
        machine="a processor, 2 threads",
        packages={"torch": "2", "transformers": "5"},
        created="2026-01-01T00:00:00",
        split="dirichlet",
        alpha=alpha,
        num_clients=100,
        clients_per_round=10,
        rounds=ROUNDS,
        local="5 steps of 8 examples",
        heldout_examples=672,
        confidence=0.95,
        figures=["accuracy"],
        lower_is_better=False,
        strategies=strategies,
        differences=differences,
    )


def write_run(folder: Path, report: FederatedReport) -> Path:
    (folder / "eval").mkdir(parents=True)
    write_federated_report(report, folder / "eval")
    return folder


def answer_to(lora: Sequence[float], slora: Sequence[float], full: Sequence[float]) -> str:
    report = report_of({"lora": lora, "slora": slora, "full": full})
    return answer(StudyRun(report, Path("run")))


def test_the_answer_follows_from_the_numbers() -> None:
    better = answer_to([0.40, 0.42], [0.50, 0.52], [0.60, 0.62])
    assert "No: SLoRA - full is -10.0 [-12.0, -8.0] points" in better
    assert "it closes 50%" in better
    assert "SLoRA is better than plain LoRA" in better
    closed = answer_to([0.40, 0.42], [0.595, 0.615], [0.60, 0.62])
    assert "Yes, as far as these texts can tell" in closed
    worse = answer_to([0.40, 0.42], [0.30, 0.32], [0.60, 0.62])
    assert "it closes -50%" in worse
    assert "SLoRA is worse than plain LoRA" in worse
    assert "There is no clear gap to close" in answer_to([0.60, 0.62], [0.60, 0.62], [0.61, 0.63])
    unclear = answer_to([0.40, 0.40], [0.41, 0.41], [0.425, 0.425])
    assert "Undecided" in unclear
    assert "no clear difference" in unclear


def test_seeds_that_disagree_make_no_clear_difference() -> None:
    run = StudyRun(report_of({"lora": [0.4, 0.6], "slora": [0.6, 0.5]}, half=0.01), Path("run"))
    found = run.difference("slora", "lora")
    assert found.of_seeds == pytest.approx([0.2, -0.1])
    assert found.interval.excludes_zero
    assert not found.is_clear
    opposite = run.difference("lora", "slora")
    assert opposite.value == pytest.approx(-found.value)
    with pytest.raises(StudyError, match="has no strategy full; it has lora, slora"):
        run.difference("full", "lora")


def test_the_answer_states_its_regime() -> None:
    text = answer_to([0.4, 0.4], [0.5, 0.5], [0.6, 0.6])
    for part in (
        "minilm-l6",
        "100 clients",
        "10 take part",
        "20 rounds of 5 steps of 8 examples",
        "672 test",
    ):
        assert part in text


def test_tables_have_all_strategies_alphas_and_rounds() -> None:
    values = {"lora": [0.4, 0.42], "slora": [0.5, 0.52], "full": [0.6, 0.64]}
    runs = [StudyRun(report_of(values, alpha), Path("run")) for alpha in (0.1, 1.0, 100.0)]
    text = "\n".join(write_tables(runs))
    assert "| slora | 51.0 [48.0, 54.0] ± 1.0 | 51.0" in text
    assert "| slora - lora | +10.0 [+8.0, +12.0] points (seeds +10.0, +10.0)* |" in text
    begin = "| full | 15.5 | 31.0 | 46.5 | 62.0"
    (by_round,) = [line for line in text.splitlines() if line.startswith(begin)]
    assert by_round.count("|") == 1 + 1 + 3 * 4
    assert "| full | 1 | 0.6 | 30, 30, 30 |" in text
    assert text.count("Does SLoRA close the gap") == 1


def test_the_page_and_its_figure_are_written(tmp_path: Path) -> None:
    values = {"lora": [0.4, 0.42], "slora": [0.5, 0.52], "full": [0.6, 0.62]}
    folders = []
    for alpha in (100.0, 0.1):
        folders.append(write_run(tmp_path / f"federated_100_{alpha:g}", report_of(values, alpha)))
    result = tmp_path / "federated_cpu.md"
    script = [sys.executable, str(ROOT / "studies" / "federated.py")]
    done = subprocess.run(
        [*script, *map(str, folders), "--save", "--result", str(result)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    text = result.read_text(encoding="utf-8")
    assert text.index("alpha 0.1") < text.index("alpha 100")
    assert "![accuracy by round](federated_cpu.svg)" in text
    svg = (tmp_path / "federated_cpu.svg").read_text(encoding="utf-8")
    assert all(f">{name}<" in svg for name in values)
    assert finished_runs(tmp_path) == sorted(folders)


def test_runs_that_cannot_be_compared_are_named(tmp_path: Path) -> None:
    values = {"lora": [0.4], "slora": [0.5], "full": [0.6]}
    first = write_run(tmp_path / "federated_100_0.1", report_of(values))
    other = report_of(values, 1.0).replace(heldout_examples=600)
    second = write_run(tmp_path / "federated_100_1", other)
    with pytest.raises(StudyError, match=r"federated_100_1: heldout_examples is 600, that of .* 672"):
        read_runs([first, second])
    with pytest.raises(StudyError, match="no run: make federated-study"):
        read_runs([])


def test_every_rate_is_a_strategy_on_development_texts() -> None:
    made = rates_recipe(RECIPE, Path("texts"), rounds=6, strategies=list(GRID))
    config = validate(made)
    assert config.federated is not None
    assert len(config.federated.strategies) == 3 * len(GRID)
    (task,) = config.tasks.values()
    assert "development" in str(task.train)
    assert "development" in str(task.validation)
    assert "test.jsonl" not in yaml.safe_dump(made)
    for rate in GRID["flora"][1]:
        (stage,) = stages_of(config, name_of("flora", rate), None)
        assert stage.spec.lr == rate
    for rate in GRID["slora"][1]:
        sparse, second = stages_of(config, name_of("slora", rate), None)
        assert sparse.spec.lr == rate
        assert (sparse.rounds, second.rounds) == (2, 4)
        assert second.spec.lr == RECIPE["adapters"]["lora"]["lr"]


def test_the_best_rate_of_each_strategy_is_named() -> None:
    _, (low, middle, high) = GRID["lora"]
    values = {name_of("lora", rate): [value] for rate, value in ((low, 0.3), (middle, 0.5), (high, 0.4))}
    values |= {name_of("full", rate): [0.1 * i] for i, rate in enumerate(GRID["full"][1])}
    lines = list(rates_table(report_of(values), ["lora", "full"]))
    assert f"| lora | lr | {middle:g} | **50.0** |" in lines
    assert (
        lines[-1]
        == f"Best: lora: lr {middle:g}; full: lr {GRID['full'][1][-1]:g} (at the edge of those tried)."
    )


def test_wrong_options_of_rates_are_one_line() -> None:
    with pytest.raises(StudyError, match="--strategies fedex: there are lora, slora, flora, ia3, full"):
        rates_recipe(RECIPE, Path("texts"), rounds=6, strategies=["fedex"])
    with pytest.raises(StudyError, match="--rounds 1: slora has two stages"):
        rates_recipe(RECIPE, Path("texts"), rounds=1, strategies=["lora"])
