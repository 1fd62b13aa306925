"""The journal: every damaged line is found on opening, and no other file is overwritten or deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.config.errors import UserError
from flora_train.config.load import validate
from flora_train.evaluation.code.completion_log import CompletionLog, LoggedCompletion
from flora_train.evaluation.code.evaluate import settings_of
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.saved_files import check_evaluation

SETTINGS = {"problems": "starter", "seed": 0}
CONFIG = validate(
    {
        "name": "tiny",
        "model": {"path": "base"},
        "tasks": {"lua": {"train": "lua.jsonl"}},
        "adapters": {"lora": {"method": "lora", "rank": 2, "lr": 0.1}},
        "mixture": {"strategy": "uniform"},
        "training": {"steps": 2},
        "evaluation": {"sandbox": "none", "temperature": 0.5},
    }
)


def entry(sample: int) -> LoggedCompletion:
    return LoggedCompletion(
        "lua-flora", "lua", "add", sample, "return a + b\n\u2028", "stop", 7, "p" * 64, "a" * 64
    )


def log_in(folder: Path) -> CompletionLog:
    log = CompletionLog(folder / "starter")
    log.claim(SETTINGS)
    writer = log.writer(0)
    for sample in range(3):
        writer.append(entry(sample))
    return log


def test_growing_log_reads_back_what_was_appended(tmp_path: Path) -> None:
    assert list(log_in(tmp_path).read().values()) == [entry(sample) for sample in range(3)]


def read_or_refused(log: CompletionLog) -> list[LoggedCompletion]:
    """What it holds; nothing where it names the damaged line."""
    try:
        return list(log.read().values())
    except UserError as error:
        (problem,) = error.problems
        hint = "delete this line to have it computed again" in problem.hint
        return [] if hint and "completions-0.jsonl:" in problem.key else [entry(-1)]


@pytest.mark.attack
@given(place=st.integers(0), bit=st.integers(0, 7))
def test_growing_log_finds_every_flipped_bit(
    place: int, bit: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = log_in(tmp_path_factory.mktemp("log"))
    file = log.path / "completions-0.jsonl"
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << bit
    file.write_bytes(content)
    found = read_or_refused(log)
    whole = {entry(sample) for sample in range(3)}
    for (
        logged
    ) in found:  # what it is of is compared by whoever knows that; a lost last line end is a lost line
        assert logged in whole or logged.adapter_sha != "a" * 64 or logged.prompt_sha != "p" * 64


def test_growing_log_does_not_overwrite_the_settings_of_something_else(tmp_path: Path) -> None:
    file = tmp_path / "starter" / "settings.json"
    file.parent.mkdir()
    for text in ('{"editor.fontSize": 12}', "[1]", "no JSON", "[" * 100_000):
        file.write_text(text)
        with pytest.raises(UserError, match="was not written by flora_train and would be overwritten"):
            CompletionLog(tmp_path / "starter").claim(SETTINGS)
        assert file.read_text() == text


def test_forgetting_a_log_keeps_what_is_not_its_own(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    (log.path / "completions-old.jsonl").write_text("mine")
    log.delete()
    assert [path.name for path in log.path.iterdir()] == ["completions-old.jsonl"]


def test_claim_with_restart_deletes_entries_of_other_settings_only(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    log.verdicts.write_text("verdict\n")
    log.scores.write_text("{}")
    log.claim(SETTINGS, restart=True)
    assert len(log.read()) == 3
    assert log.verdicts.exists()
    with pytest.raises(UserError, match="seed = 1: its completions were made with 0"):
        log.claim({**SETTINGS, "seed": 1})
    assert len(log.read()) == 3
    log.claim({**SETTINGS, "seed": 1}, restart=True)
    assert log.read() == {}
    assert not log.verdicts.exists()
    assert not log.scores.exists()
    log.writer(0).append(entry(0))
    with pytest.raises(UserError, match="seed = 0"):
        log.claim(SETTINGS)


@pytest.mark.parametrize("text", ["", "3", "{}", '{"languages": 3}', '{"languages": [{}]}', "[" * 100_000])
def test_damaged_scores_are_found_before_an_evaluation(tmp_path: Path, text: str) -> None:
    log = log_in(tmp_path)
    (log.path / "scores.json").write_text(text)
    with pytest.raises(
        UserError, match=r"scores\.json: is damaged.*: delete it, and flora-train solve writes it again"
    ):
        check_evaluation(tmp_path, {"starter": {}}, CONFIG)


@pytest.mark.parametrize("line", ["[]", "3", '{"adapter": []}', "\udcff", "[" * 100_000])
def test_damaged_verdicts_are_found_before_an_evaluation(tmp_path: Path, line: str) -> None:
    log = log_in(tmp_path)
    log.verdicts.write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    with pytest.raises(UserError, match=r"verdicts\.jsonl"):
        check_evaluation(tmp_path, {"starter": {}}, CONFIG)


def test_a_log_line_without_checksum_is_checked_for_its_types(tmp_path: Path) -> None:
    log = log_in(tmp_path)
    file = log.path / "completions-0.jsonl"
    row = json.loads(file.read_text().split("\n")[0])
    del row["check"]
    file.write_text(json.dumps(row) + "\n")
    assert list(log.read().values()) == [entry(0)]
    file.write_text(json.dumps({**row, "sample": "0"}) + "\n")
    with pytest.raises(UserError, match="is damaged, or not a completion"):
        log.read()


def test_other_settings_of_completions_are_found_before_an_evaluation(tmp_path: Path) -> None:
    log, languages = CompletionLog(tmp_path / "starter"), {"lua": load_languages()["lua"]}
    log.claim({"problems": "starter", **settings_of(CONFIG), "dtype": "float32"})
    log.writer(0).append(entry(0))
    check_evaluation(tmp_path, {"starter": languages}, CONFIG)
    warmer = CONFIG.model_copy(
        update={"evaluation": CONFIG.evaluation.model_copy(update={"temperature": 0.9})}
    )
    with pytest.raises(UserError, match=r"temperature = 0\.9: its completions were made with 0\.5"):
        check_evaluation(tmp_path, {"starter": languages}, warmer)
    check_evaluation(tmp_path, {"starter": languages}, warmer, restart=True)
    assert len(log.read()) == 1


@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_folder_in_the_place_of_a_report_is_found_before_an_evaluation(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=r"is in the way of a file of this name"):
        check_evaluation(tmp_path, {}, CONFIG)
