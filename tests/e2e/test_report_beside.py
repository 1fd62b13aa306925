"""`flora-train report RUN --beside paper`, on the committed results of real runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from flora_train.cli import main
from tests.documents import ROOT, blocks

RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the folders of finished runs, as far as `report` reads them."""
    monkeypatch.chdir(tmp_path)
    for name, results in (
        ("multipl_e", "multipl_e_local"),
        ("speech", "speech_local"),
        ("quick", "quickstart"),
    ):
        report = json.loads((RESULTS / f"{results}.json").read_text(encoding="utf-8"))
        folder = tmp_path / "outputs" / name
        (folder / "eval").mkdir(parents=True)
        (folder / "eval" / "report.json").write_text(json.dumps(report), encoding="utf-8")
        (folder / "run.json").write_text('{"finished": true}', encoding="utf-8")
        (folder / "config.yaml").write_text(report["facts"]["config"], encoding="utf-8")
    return tmp_path / "outputs"


def page_of(run: Path) -> str:
    return (run / "eval" / "report.html").read_text(encoding="utf-8")


def test_the_papers_table_is_printed_and_stays_in_the_page_until_it_is_drawn_without(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "outputs/multipl_e", "--beside", "paper"]) == 0
    printed = capsys.readouterr().out
    assert "Tables 1 and 3, StarCoder 15B: pass@1 on multipl_e problems" in printed
    assert "Not a replication of the published results. In this run:" in printed
    assert "  - 20 steps instead of 1,500" in printed
    assert 'id="published"' in page_of(outputs / "multipl_e")
    content = json.loads((outputs / "multipl_e" / "eval" / "report.json").read_text(encoding="utf-8"))
    assert content["code"] == json.loads((RESULTS / "multipl_e_local.json").read_text())["code"]
    assert main(["report", "outputs/multipl_e"]) == 0
    assert 'id="published"' not in page_of(outputs / "multipl_e")


def test_speech_stands_beside_table_2(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "outputs/speech", "--beside", "paper", "--table", "outputs/beside.csv"]) == 0
    assert "Table 2, Whisper large: Word error rate as written, in percent" in capsys.readouterr().out
    assert "Czech" in (outputs / "beside.csv").read_text(encoding="utf-8")


def test_the_file_in_the_documentation_is_shown_beside_a_run(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = [
        block.text for block in blocks(ROOT / "docs" / "reports.md", "yaml") if "tables:" in block.text
    ]
    Path("earlier.yaml").write_text(example, encoding="utf-8")
    given = ["report", "outputs/multipl_e", "--beside", "earlier.yaml", "--table", "outputs/beside.tex"]
    assert main(given) == 0
    assert "Our runs of last year" in capsys.readouterr().out
    assert r"24.0$\pm$0.4" in (outputs / "beside.tex").read_text(encoding="utf-8")


def test_a_run_with_programs_and_speech_shows_both_tables(
    outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = outputs / "multipl_e" / "eval" / "report.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    other = json.loads((RESULTS / "speech_local.json").read_text(encoding="utf-8"))
    for key in ("tasks", "adapters", "results"):
        report[key] += other[key]
    config, spoken = (yaml.safe_load(one["facts"]["config"]) for one in (report, other))
    config["tasks"] |= spoken["tasks"]
    report["facts"]["config"] = yaml.safe_dump(config)
    report["speech"] = other["speech"]
    path.write_text(json.dumps(report), encoding="utf-8")
    assert main(["report", "outputs/multipl_e", "--beside", "paper"]) == 0
    printed = capsys.readouterr().out
    assert "Tables 1 and 3, StarCoder 15B" in printed
    assert "Table 2, Whisper large" in printed
    assert page_of(outputs / "multipl_e").count('class="published"') == 2


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["outputs/quick", "--beside", "paper"], "beside = 'paper': has no table for this run"),
        (["outputs/quick", "--beside", "papers"], "beside = 'papers': no such file"),
        (["outputs/quick", "outputs/speech", "--beside", "paper"], "beside = 'paper': is for one run"),
        (["outputs/quick", "--beside", "paper", "--table", "x.txt"], "table = 'x.txt': must end in"),
    ],
)
def test_what_cannot_be_shown_is_one_error_and_leaves_the_page_alone(
    arguments: list[str], error: str, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert error in lines[0]
    assert not (outputs / "quick" / "eval" / "report.html").exists()
