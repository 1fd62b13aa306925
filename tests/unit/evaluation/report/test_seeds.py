"""Seeds of a setting are reported as their mean and deviation, and none is selected as a setting would be."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import expand
from flora_train.config.load import validate
from flora_train.data.task import Task
from flora_train.evaluation.code.contenders import Contender
from flora_train.evaluation.code.score_types import CodeSuite, LanguageScores
from flora_train.evaluation.code.scores import Scores
from flora_train.evaluation.code.summary import _differences, _in_order, _macro, _means, _score
from flora_train.evaluation.preferences.scores import ContenderNames, preference_result
from flora_train.evaluation.report.comparison import measures
from flora_train.evaluation.report.html import render_comparison, render_html
from flora_train.evaluation.report.joined_seeds import adapters_of, note_on_seeds, with_joined_seeds
from flora_train.evaluation.report.results import Evaluation, build_results
from flora_train.evaluation.report.seed_tables import seed_tables
from flora_train.evaluation.report.summary_text import summarise
from flora_train.evaluation.report.tables import write_table
from flora_train.evaluation.report.terminal import print_pass_at_k, print_results, print_sweeps
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.report.types import Report, RunFacts, SampleCompletion
from flora_train.evaluation.result_model import Interval
from flora_train.evaluation.seeds import SeedGroup, deviation, seed_groups
from flora_train.export.model_card_results import tables
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.heldout import HeldOut
from tests.architectures import tiny_model
from tests.unit.evaluation.preferences.test_scores import pairs as preference_pairs
from tests.unit.training.harness import random_split

N = 8
ADAPTERS = {
    "flora": {"method": "flora", "lr": 1e-2, "seed": [0, 1, 2]},
    "lora": {"method": "lora", "lr": [1e-3, 2e-3], "seed": [0, 1]},
    "ia3": {"method": "ia3", "lr": 1e-2},
}
LOSSES = {
    "flora_seed0": 1.9,
    "flora_seed1": 2.0,
    "flora_seed2": 2.4,
    # the best single seed is of the setting with the worse mean
    "lora_lr1e-3_seed0": 1.0,
    "lora_lr1e-3_seed1": 2.6,
    "lora_lr2e-3_seed0": 1.5,
    "lora_lr2e-3_seed1": 1.6,
    "ia3": 2.2,
}
"""Family -> nats of an example, on average."""


def report_of(folder: Path, losses: dict[str, float] = LOSSES, **parts: Any) -> Report:
    adapters = {name: entry for name, entry in ADAPTERS.items() if any(f.startswith(name) for f in losses)}
    config = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": {"a": {"train": "unused.jsonl"}},
            "adapters": adapters,
            "training": {"steps": 20},
            "evaluation": {"bootstrap_samples": 200},
        }
    )
    specs = expand(config)
    assert {spec.family for spec in specs} == losses.keys()
    bank = AdapterBank.attach(tiny_model(), specs)
    generator = np.random.default_rng(0)
    nats = {-1: 3.0 * generator.uniform(0.8, 1.2, N)}
    for spec in bank.specs:
        nats[bank.ids[spec.name]] = losses[spec.family] * generator.uniform(0.8, 1.2, N)
    heldout = {"a": HeldOut("a", nats, np.full(N, 5), generator.integers(10, 20, N))}
    tasks = {"a": Task("a", 1.0, random_split(0, 20), random_split(1, N), "hash")}
    texts = {"base": "base text", **{family: f"text of {family}" for family in losses}}
    completions = [SampleCompletion(task="a", prompt="p", completions=texts)]
    run = RunFolder(folder)
    evaluation = Evaluation(heldout, {}, completions, **parts)
    facts = RunFacts(model="unused", config="name: test\n")
    return build_results(config, run, tasks, bank, evaluation=evaluation, facts=facts)


def test_mean_deviation_and_interval_of_a_setting(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    (result,) = report.results
    means = {row.family: row for row in result.over_seeds}
    assert list(means) == ["flora", "lora_lr1e-3", "lora_lr2e-3"]
    for family, row in means.items():
        seeds = [r for r in result.contenders if r.family.startswith(f"{family}_seed")]
        values = [r.bits_per_byte.value for r in seeds]
        assert None not in values
        assert row.bits_per_byte.value == pytest.approx(statistics.mean(values))  # type: ignore[type-var]
        assert row.bits_per_byte.deviation == pytest.approx(statistics.stdev(values))  # type: ignore[type-var]
        low, high = row.bits_per_byte.low, row.bits_per_byte.high
        assert low is not None
        assert high is not None
        assert low < row.bits_per_byte.value < high  # type: ignore[operator]
        changes = [r.difference_to_base.value for r in seeds]
        assert row.difference_to_base.value == pytest.approx(statistics.mean(changes))  # type: ignore[type-var]
    assert all(row.bits_per_byte.deviation is None for row in result.contenders)


def test_the_winner_is_of_the_means_and_no_seed_is_best(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    (result,) = report.results
    assert not any(row.best for row in result.contenders)
    assert [row.family for row in result.over_seeds if row.best] == ["lora_lr2e-3"]
    assert result.best is not None
    assert result.best.family == "lora_lr2e-3"
    (sweep,) = report.sweeps
    assert (sweep.sweep, sweep.winner) == ("lora", "lora_lr2e-3")
    assert [(m.family, m.seeds, m.settings) for m in sweep.members] == [
        ("lora_lr1e-3", 2, {"lr": 1e-3}),
        ("lora_lr2e-3", 2, {"lr": 2e-3}),
    ]
    assert all(member.deviation for member in sweep.members)


def test_seeds_alone_are_no_sweep(tmp_path: Path) -> None:
    report = report_of(tmp_path, {name: loss for name, loss in LOSSES.items() if not name.startswith("lora")})
    assert report.sweeps == ()
    assert "Other learning rates" in " ".join(report.not_measured)
    page = render_html(report)
    assert 'id="sweeps"' not in page
    assert 'id="seeds"' in page


def test_summary_speaks_of_means(tmp_path: Path) -> None:
    many = " ".join(summarise(with_joined_seeds(report_of(tmp_path))))
    assert "8 adapters on task a were trained in one run" in many
    assert "The best method is lora_lr2e-3" in many
    flora = {name: loss for name, loss in LOSSES.items() if name.startswith("flora")}
    alone = " ".join(summarise(with_joined_seeds(report_of(tmp_path, flora))))
    assert "In the mean over their seeds they predict held-out text better" in alone


def test_differences_are_between_means(tmp_path: Path) -> None:
    (result,) = report_of(tmp_path).results
    found = {frozenset((pair.first, pair.second)) for pair in result.differences}
    families = ["flora", "lora_lr1e-3", "lora_lr2e-3", "ia3"]
    assert found == {frozenset((a, b)) for i, a in enumerate(families) for b in families[i + 1 :]}


def test_seed_that_is_not_finite_leaves_no_mean(tmp_path: Path) -> None:
    report = report_of(tmp_path, {**LOSSES, "lora_lr2e-3_seed1": float("nan")})
    (result,) = report.results
    mean = next(row for row in result.over_seeds if row.family == "lora_lr2e-3")
    assert mean.bits_per_byte.finite is None
    assert mean.bits_per_byte.deviation is None
    assert report.sweeps[0].winner == "lora_lr1e-3"
    assert "not finite" in render_html(report)


def test_report_without_seeds_is_written_as_before(tmp_path: Path) -> None:
    report = report_of(tmp_path, {"ia3": 2.0})
    text = json.dumps(report.model_dump(mode="json"))
    assert "deviation" not in text
    assert "over_seeds" not in text
    assert "seeds_of" not in text
    assert with_joined_seeds(report) is report
    assert note_on_seeds(report) is None
    assert seed_tables(report) == []


def test_report_with_seeds_reads_the_same(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert Report.model_validate(json.loads(json.dumps(report.model_dump(mode="json")))) == report
    joined = with_joined_seeds(report)
    assert with_joined_seeds(joined) == joined
    assert [row.family for row in joined.results[0].contenders] == [
        "flora",
        "lora_lr1e-3",
        "lora_lr2e-3",
        "ia3",
    ]
    assert len(joined.adapters) == len(report.adapters)


def test_page_shows_means_with_deviations_and_every_seed(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    page = render_html(report)
    (result,) = report.results
    flora = next(row for row in result.over_seeds if row.family == "flora").bits_per_byte
    assert f"{flora.value:.3f} ± {flora.deviation:.3f}" in page
    assert "flora: seeds 0, 1, 2" in page
    for row in result.contenders:
        if row.family.startswith("flora"):
            assert f"{row.family[-1]}: {row.bits_per_byte.value:.3f}" in page
    (table,) = seed_tables(report)
    assert [(row.family, len(row.values)) for row in table.rows] == [
        ("flora", 3),
        ("lora_lr1e-3", 2),
        ("lora_lr2e-3", 2),
    ]
    assert "trained with one seed only" in " ".join(report.not_measured)
    assert "of ia3" in " ".join(report.not_measured)


def test_terminal_shows_means_with_deviations(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    console = Console(record=True, width=100, soft_wrap=True)
    print_results(with_joined_seeds(report), console)
    print_sweeps(with_joined_seeds(report), console)
    text = console.export_text()
    flora = report.results[0].over_seeds[0].bits_per_byte
    assert f"{flora.value:.3f} +/- {flora.deviation:.3f}" in text
    assert "seed0" not in text
    assert "lora_lr2e-3 (best" in text
    assert "lowest bits per byte for lora_lr2e-3 on a" in text
    assert [adapter.name for adapter in adapters_of(report, "a", "lora_lr2e-3")] == [
        "a-lora_lr2e-3_seed0",
        "a-lora_lr2e-3_seed1",
    ]


def test_tables_show_means_and_csv_has_seeds_too(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    flora = report.results[0].over_seeds[0].bits_per_byte
    for ending in (".csv", ".md", ".tex"):
        write_table({"run": report}, tmp_path / f"table{ending}")
    with (tmp_path / "table.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert float(rows["flora"]["deviation"]) == flora.deviation
    assert float(rows["flora"]["value"]) == flora.value
    assert rows["flora_seed1"]["deviation"] == rows["ia3"]["deviation"] == ""
    markdown, latex = ((tmp_path / f"table{ending}").read_text() for ending in (".md", ".tex"))
    for text, sign in ((markdown, "±"), (latex, r"$\pm$")):
        assert f"{sign} {flora.deviation:.3f}"[:-1] in text
        assert "seed0" not in text
        assert "standard deviation over seeds" in text


def test_card_of_a_seed_has_the_mean_beside_it(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    (table,) = tables(report, "a-flora_seed1")
    labels = [row[0] for row in table.rows]
    assert labels[table.adapter_row] == "flora_seed1"
    mean = table.rows[labels.index("flora, mean over seeds")]
    assert "±" in mean[1]
    assert "standard deviation over seeds" in table.note


def test_trackers_get_mean_and_deviation(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    metrics = final_metrics(report)
    flora = report.results[0].over_seeds[0].bits_per_byte
    assert metrics["final/a/flora/bits_per_byte"] == flora.value
    assert metrics["final/a/flora/bits_per_byte_deviation"] == flora.deviation
    assert "final/a/flora_seed0/bits_per_byte" in metrics


def test_runs_are_compared_by_means(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    joined = with_joined_seeds(report)
    (measure,) = measures([joined, joined])
    assert [row.what[1] for row in measure.rows] == ["base", "flora", "lora_lr1e-3", "lora_lr2e-3", "ia3"]
    page = render_comparison({"first": report, "second": report})
    assert "±" in page
    assert "flora_seed0" not in page


def code_suite(solved: dict[str, list[int]], **config: Any) -> tuple[LanguageScores, Any]:
    """solved: family -> number of 4 samples of each problem that pass."""
    run = validate(
        {
            "name": "test",
            "model": {"path": "unused"},
            "tasks": {"lua": {"train": "unused.jsonl", "language": "lua"}},
            "training": {"steps": 20},
            **config,
        }
    )
    specs = expand(run)
    groups = seed_groups(specs)
    contenders = [Contender("base", "base", -1, ("lua",), "")]
    contenders += [Contender(spec.name, spec.family, i, ("lua",), "") for i, spec in enumerate(specs)]
    records = []
    for contender in contenders:
        for problem, passed in enumerate(solved[contender.family]):
            for sample in range(4):
                records.append(
                    {
                        "adapter": contender.name,
                        "language": "lua",
                        "name": f"p{problem}",
                        "sample": sample,
                        "status": "OK" if sample < passed else "Exception",
                    }
                )
    seeds = {group.name: [specs[i].name for i in group.members] for group in groups}
    scores = Scores(records, resamples=200, seeds=seeds)  # type: ignore[arg-type]
    means = _means(groups, specs, contenders)
    part = LanguageScores(
        language="lua",
        name="Lua",
        problems=3,
        available=3,
        prompts_sha="0",
        contenders=[_score(c, "lua", scores, cut={}, ks=[1, 2]) for c in contenders],
        over_seeds=[_score(c, "lua", scores, cut={}, ks=[1, 2]) for c in means],
        differences=_differences(_in_order(contenders, means, scores), "lua", scores, ks=[1, 2]),
        cpu_seconds=5.0,
        wins_and_losses=(),
    )
    return part, _macro([*contenders, *means], scores, [1, 2], joined={})


SOLVED = {"base": [0, 1, 2], "flora_seed0": [1, 2, 3], "flora_seed1": [2, 2, 2], "flora_seed2": [4, 2, 0]}


def test_pass_at_k_is_the_mean_over_seeds_of_each_problem(tmp_path: Path) -> None:
    adapters = {"flora": ADAPTERS["flora"]}
    part, macro = code_suite(SOLVED, adapters=adapters)
    (mean,) = part.over_seeds
    seeds = [row.pass_at[1].value for row in part.contenders if row.family != "base"]
    assert mean.pass_at[1].value == pytest.approx(statistics.mean(seeds))  # type: ignore[type-var]
    assert mean.pass_at[1].deviation == pytest.approx(statistics.stdev(seeds), abs=1e-12)  # type: ignore[type-var]
    assert mean.ended["OK"] == 18
    assert mean.samples == 4
    assert (part.differences[0].first, part.differences[0].second) == ("flora", "base")
    assert {d.first for d in part.differences} == {"flora", *SOLVED} - {"base"}
    assert [row.family for row in macro.over_seeds] == ["flora"]
    assert macro.over_seeds[0].pass_at[1].deviation == mean.pass_at[1].deviation
    suite = CodeSuite(
        suite="starter", source="starter", num_samples=4, pass_at_k=(1, 2), temperature=0.2, top_p=0.95,
        max_new_tokens=64, seed=0, confidence=0.95, sandbox="bubblewrap", completions=48, tokens=100,
        languages=(part,), macro=macro, not_evaluated=(),
    )  # fmt: skip
    losses = {family: loss for family, loss in LOSSES.items() if family.startswith("flora")}
    report = report_of(tmp_path, losses, code=[suite])
    joined = with_joined_seeds(report)
    assert [row.family for row in joined.code[0].languages[0].contenders] == ["base", "flora"]
    console = Console(record=True, width=120, soft_wrap=True)
    print_pass_at_k(joined.code, console)
    assert f"{mean.pass_at[1].value:.3f} +/- {mean.pass_at[1].deviation:.3f}" in console.export_text()
    page = render_html(report)
    assert page.count("seed0") < 20
    assert "± is the standard deviation over seeds" in page


def test_rewards_are_means_over_seeds() -> None:
    generator = np.random.default_rng(1)
    logps = {i: generator.normal(size=6) for i in (-1, 0, 1, 2)}
    others = {i: generator.normal(size=6) for i in (-1, 0, 1, 2)}
    losses = {i: np.full(6, 1.0 + i) for i in (-1, 0, 1, 2)}
    names = {-1: ContenderNames("base", "base")}
    names |= {i: ContenderNames(f"a-x_seed{i}", f"x_seed{i}") for i in (0, 1)}
    names[2] = ContenderNames("a-y", "y")
    result = preference_result(
        "a",
        preference_pairs(logps, others, losses=losses),
        names,
        samples=100,
        confidence=0.95,
        seed=0,
        groups=[SeedGroup("a", "x", (0, 1))],
    )
    (mean,) = result.over_seeds
    seeds = [result.by_family[f"x_seed{i}"] for i in (0, 1)]
    for name in ("reward_accuracy", "reward_margin", "loss"):
        values = [seed.figure(name).value for seed in seeds]  # type: ignore[arg-type,union-attr]
        interval = mean.figure(name)  # type: ignore[arg-type]
        assert interval is not None
        assert interval.value == pytest.approx(statistics.mean(values))  # type: ignore[type-var]
        assert interval.deviation == pytest.approx(statistics.stdev(values))  # type: ignore[type-var]
    pairs = [(d.first, d.second) for d in result.differences]
    assert pairs == [("x_seed0", "base"), ("x_seed1", "base"), ("y", "base"), ("x", "base"), ("x", "y")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1.0, 3.0], 2**0.5), ([1.0], None), ([1.0, None], None), ([1.0, float("inf")], None), ([2.0, 2.0], 0)],
)
def test_deviation_is_that_of_a_sample(values: list[float | None], expected: float | None) -> None:
    assert deviation(values) == (None if expected is None else pytest.approx(expected))


def test_an_interval_without_deviation_is_written_without_it() -> None:
    """Also by callers that leave out every None, as the manifest of a repository on the hub does."""
    interval = Interval(value=1.0, low=0.0, high=None, excludes_zero=False)
    written = {"value": 1.0, "low": 0.0, "high": None, "excludes_zero": False}
    assert interval.model_dump() == written
    assert interval.model_dump(exclude_none=True) == {k: v for k, v in written.items() if v is not None}
