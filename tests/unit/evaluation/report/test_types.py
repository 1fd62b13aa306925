"""report.json: a round trip keeps every value, and an error is one line that names the key."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from flora_train.config.errors import UserError
from flora_train.evaluation.report.files import read_report, read_report_if_any, write_report
from flora_train.evaluation.report.tracked_metrics import final_metrics
from flora_train.evaluation.report.types import SCHEMA_VERSION, Report, TaskSummary
from flora_train.evaluation.result_model import Interval
from flora_train.final_evaluation import recorded_facts
from flora_train.runtime.run_folder import RunFolder
from tests.unit.evaluation.report.test_html import THREE, run
from tests.unit.evaluation.report.test_programs import suite_of

RESULTS = Path(__file__).resolve().parents[4] / "benchmarks" / "results"
KEPT = ["quickstart", "quickstart_sweep", "multipl_e_local", "speech_local", "speech_sweep"]


def folder_with(tmp_path: Path, content: object) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.evaluation.mkdir(parents=True)
    (folder.evaluation / "report.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("name", KEPT)
def test_a_report_that_is_written_reads_the_same(name: str, tmp_path: Path) -> None:
    content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    report = read_report(folder_with(tmp_path, content))
    assert report.model_dump(mode="json") == content
    write_report(report, RunFolder(tmp_path / "run").evaluation)
    assert read_report(RunFolder(tmp_path / "run")) == report


@pytest.mark.parametrize("name", ["multipl_e_local", "speech_local", "speech_sweep"])
def test_kept_pages_show_the_kept_reports(name: str) -> None:
    report = Report.model_validate(json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")))
    page = (RESULTS / f"{name}.html").read_text(encoding="utf-8")
    assert f"Generated from report.json (schema {SCHEMA_VERSION}) of run {report.name}." in page
    for result in report.results:
        assert f"{result.base.bits_per_byte.value:.3f}" in page


@pytest.mark.parametrize(
    ("marks", "line"),
    [
        ({"schema": 5}, "was written by an older version of flora-train (schema 5, this version reads 7)"),
        (
            {"schema_version": 5},
            "was written by an older version of flora-train (schema 5, this version reads 7)",
        ),
        (
            {"schema_version": 99},
            "was written by a newer version of flora-train (schema 99, this version reads 7)",
        ),
        ({}, "is damaged (schema_version is missing)"),
    ],
)
def test_a_report_of_another_version_is_one_line_that_says_how_to_renew_it(
    marks: dict[str, int], line: str, tmp_path: Path
) -> None:
    content = {key: value for key, value in run(THREE).items() if key != "schema_version"} | marks
    with pytest.raises(UserError) as error:
        read_report(folder_with(tmp_path, content))
    (problem,) = error.value.problems
    assert str(problem) == (
        f"{tmp_path / 'run/eval/report.json'}: {line}: "
        f"flora-train evaluate {tmp_path / 'run'} writes it again"
    )


def test_a_run_without_a_report_has_none(tmp_path: Path) -> None:
    assert read_report_if_any(RunFolder(tmp_path)) is None
    with pytest.raises(UserError, match="has no report: the run did not finish"):
        read_report(RunFolder(tmp_path))


def damage(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Set the value at a dotted path."""

    def change(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        part: Any = content
        for key in parents:
            part = part[int(key)] if isinstance(part, list) else part[key]
        part[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("results.0.examples", "many"),
        ("results.0.examples", -1),
        ("results.0.examples", True),
        ("results.0.examples", 2.5),
        ("results.0.confidence", 1.5),
        ("results.0.contenders.1.bits_per_byte.low", "0.1"),
        ("results.0.contenders.1.bits_per_byte.value", 1e200),
        ("results.0.contenders.1.difference_to_base.excludes_zero", 1),
        ("results.1.contenders", []),
        ("adapters.0.lr", None),
        ("adapters.0.quarantined", {"step": 5}),
        ("adapters.0.retired", {"step": 5, "reason": "boredom"}),
        ("curves.training.lua-flora", [[1]]),
        ("tasks.0.target_share", 2),
        ("completions.0.completions", ["text"]),
        ("facts.seconds", {"train": -1}),
        ("code.0.languages.0.contenders.0.ended", {"Exploded": 1}),
        ("not_measured", "nothing"),
    ],
)
def test_a_damaged_value_is_one_line_that_names_its_key(path: str, value: object, tmp_path: Path) -> None:
    content = json.loads(json.dumps(run(THREE, code=[suite_of("lua")])))
    damage(path, value)(content)
    with pytest.raises(UserError) as error:
        read_report(folder_with(tmp_path, content))
    (problem,) = error.value.problems
    assert f"is damaged, or was written by another version ({path}" in problem.hint
    assert problem.hint.endswith("writes it again")


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    content = run(THREE, sweep=[])
    with pytest.raises(UserError, match=r"\(sweep: unknown key. Did you mean 'sweeps'\?\)"):
        read_report(folder_with(tmp_path, content))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("results.0.contenders.0.family", "mystery", "results of lua: 'mystery' is not described"),
        ("results.0.task", "mystery", "results: 'mystery' is not described"),
        ("adapters.0.task", "mystery", "adapters: 'mystery' is not described"),
        (
            "curves.drawn",
            {"lua": [[1, 2]], "perl": [[2, 2]]},
            "curves: drawn: tasks have points at different steps",
        ),
        ("completions.0.completions", {"flora": "x"}, "completions of lua: 'base' is not described"),
        ("code.0.pass_at_k", [1, 5], "code.0: pass_at lacks pass@5"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(
    path: str, value: object, message: str, tmp_path: Path
) -> None:
    content = json.loads(json.dumps(run(THREE, code=[suite_of("lua")])))
    damage(path, value)(content)
    with pytest.raises(UserError) as error:
        read_report(folder_with(tmp_path, content))
    assert f"({message})" in str(error.value)


def test_reports_cannot_be_changed_and_copies_are_validated() -> None:
    report = Report.model_validate(run(THREE))
    with pytest.raises(ValidationError):
        report.name = "other"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        report.replace(results=())
    assert report.families == ["flora", "lora", "ia3"]
    renamed = report.replace(adapters=report.adapters[:3], results=report.results[:1])
    assert (report.name, len(report.adapters), len(renamed.adapters)) == ("a run", 6, 3)


def test_intervals_are_finite_or_none() -> None:
    with pytest.raises(ValidationError):
        Interval(value=float("nan"), low=0.0, high=1.0, excludes_zero=False)
    partly = Interval(value=0.5, low=None, high=1.0, excludes_zero=False)
    assert partly.finite is None
    assert Interval(value=1, low=-2, high=3, excludes_zero=False).negated().finite == (-1.0, -3.0, 2.0)


def test_paths_that_are_no_utf8_can_be_written() -> None:
    task = run(THREE)["tasks"][0] | {"origin": os.fsdecode(b"data/\xe9.txt")}
    assert TaskSummary.model_validate(task).origin == "data/\\udce9.txt"


def test_final_metrics_have_plain_names_and_values() -> None:
    metrics = final_metrics(Report.model_validate(run(THREE, code=[suite_of("lua")])))
    assert metrics["final/lua/flora/bits_per_byte"] == pytest.approx(1.8)
    assert metrics["final/starter/lua/flora/pass@10"] == 0.4
    assert "final/ruby/lora/bits_per_byte" not in metrics  # its loss is not finite
    assert all(type(value) is float for value in metrics.values())


def test_facts_of_an_earlier_training_are_kept_and_damage_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run_json(
        {
            "finished": True,
            "training": {"device": "cuda:0", "apart": {"together": 1}, "seconds": {"train": 2.0}},
        }
    )
    facts = recorded_facts(folder)
    assert facts is not None
    assert (facts.device, facts.seconds) == ("cuda:0", {"train": 2.0})
    folder.write_run_json({"finished": True, "training": {"device": 3}})
    with pytest.raises(UserError, match="is damaged"):
        recorded_facts(folder)


def test_reading_a_report_of_a_thousand_adapters_takes_little_longer_than_parsing_it() -> None:
    text = json.dumps(run({f"task{i}": {"flora": -0.20, "lora": -0.10, "ia3": -0.05} for i in range(342)}))
    started = time.process_time()
    content = json.loads(text)
    parsed = time.process_time() - started
    report = Report.model_validate(content)
    validated = time.process_time() - started - parsed
    assert len(report.adapters) == 1026
    assert validated < 20 * parsed + 1.0


def test_a_sample_prompt_without_messages_is_refused(tmp_path: Path) -> None:
    content = json.loads((RESULTS / "quickstart.json").read_text(encoding="utf-8"))
    content["completions"][0]["prompt"] = []
    with pytest.raises(UserError, match="prompt"):
        read_report(folder_with(tmp_path, content))
