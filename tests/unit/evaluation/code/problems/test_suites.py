"""Suites of a recipe, and the errors for missing problems, languages or sandboxes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flora_train.config.errors import UserError, user_error
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.evaluation.code import evaluate
from flora_train.evaluation.code.evaluate import plan_evaluation
from flora_train.evaluation.code.problems.suites import load_suite
from tests.hub_server import Hub, serve
from tests.hub_server.client import go_offline, use_hub

ROWS = [{"name": f"p{i}", "prompt": "x=1 #", "tests": "true", "stop_tokens": ["\n"]} for i in range(5)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "Mine"
    place.mkdir()
    (place / "humaneval-sh.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return place


def recipe(problems: Any, language: str | None = "sh", **evaluation: Any) -> RunConfig:
    return validate(
        {
            "name": "r",
            "model": {"path": "m"},
            "tasks": {"t": {"train": "t.jsonl", "language": language}},
            "adapters": {"ia3": {"method": "ia3", "lr": 1e-3}},
            "training": {"steps": 1},
            "evaluation": {"problems": problems, **evaluation},
        }
    )


def test_a_folder_is_a_suite_of_its_name_and_a_limit_is_remembered(folder: Path) -> None:
    suite = load_suite(str(folder), ["sh", "lua"], 2)
    assert suite.name == "mine"
    assert list(suite.asked["sh"]) == ["p0", "p1"]
    assert len(suite.problems["sh"]) == 5
    assert suite.missing == {"lua": f"{folder} has no problems in it"}


def test_suite_name_is_that_of_the_folder_for_any_spelling(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert load_suite(".", ["sh"], None).name == load_suite(f"{folder}/../Mine/", ["sh"], None).name == "mine"


def test_a_table_of_own_problems_is_a_suite_of_its_name(tmp_path: Path) -> None:
    table = tmp_path / "Mine.yaml"
    row = {"name": "add_one", "doc": "Adds one.", "args": {"n": "int"}, "returns": "int"}
    tests = [{"args": [n], "result": n + 1} for n in range(4)]
    solved = {**row, "tests": tests, "solutions": {"lua": "return n + 1"}}
    table.write_text(json.dumps({"problems": [solved]}))
    suite = load_suite(str(table), ["lua", "sh"], None)
    assert suite.name == "mine"
    assert list(suite.problems["lua"]) == ["add_one"]
    assert "return n + 1" not in suite.problems["lua"]["add_one"].program("")
    assert suite.missing == {"sh": f"{table} has no problems in it"}
    table.write_text(json.dumps({"problems": [{**row, "tests": tests[:3]}]}))
    with pytest.raises(UserError, match=r"add_one\.tests"):
        load_suite(str(table), ["lua"], None)


def test_another_prompt_is_another_suite(folder: Path) -> None:
    before = load_suite(str(folder), ["sh"], None).sha("sh")
    (folder / "humaneval-sh.jsonl").write_text(
        "\n".join(json.dumps({**row, "prompt": "y=1 #"}) for row in ROWS)
    )
    assert load_suite(str(folder), ["sh"], None).sha("sh") != before


def test_starter_problems_exist_in_their_languages() -> None:
    suite = load_suite("starter", ["lua", "hs"], None)
    assert len(suite.problems["lua"]) >= 20
    assert "hs" in suite.missing


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the problems in the layout of nuprl/MultiPL-E."""
    suite = tmp_path / "suite"
    configurations = ""
    for subset in ("humaneval-sh", "mbpp-sh"):
        (suite / subset).mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(ROWS), suite / subset / "test-00000-of-00001.parquet")
        configurations += (
            f"- config_name: {subset}\n  data_files:\n  - split: test\n    path: {subset}/test-*\n"
        )
    (suite / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    with serve() as hub:
        hub.add_folder("nuprl/MultiPL-E", suite, "dataset")
        use_hub(monkeypatch, hub, tmp_path / "cache")
        yield hub


def test_problems_of_the_hub_are_read_whatever_fails_for_a_while(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_faults("all")
    suite = load_suite("hub:nuprl/MultiPL-E", ["sh", "py"], None)
    assert (suite.name, list(suite.problems), list(suite.missing)) == ("multipl-e", ["sh"], ["py"])
    local = load_suite(str(folder), ["sh"], None).problems["sh"]
    prompts = [problem.prompt for problem in suite.problems["sh"].values()]
    assert prompts == [problem.prompt for problem in local.values()]
    go_offline(monkeypatch)
    assert load_suite("hub:nuprl/MultiPL-E", ["sh"], None).sha("sh") == suite.sha("sh")


def test_problems_that_the_hub_does_not_give_are_one_error_with_an_alternative(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alternative = "Instead, give a folder with MultiPL-E's humaneval-<language>.jsonl, or starter"
    with pytest.raises(UserError, match=rf"the hub has no such data set.*{alternative}"):
        load_suite("hub:nuprl/MultiPL", ["sh"], None)
    hub.repos["datasets/nuprl/MultiPL-E"].gated = True
    use_hub(monkeypatch, hub, tmp_path / "cache", token=None)
    with pytest.raises(UserError, match=r"evaluation\.problems = 'hub:nuprl/MultiPL-E': is gated: accept"):
        load_suite("hub:nuprl/MultiPL-E", ["sh"], None)


@pytest.mark.parametrize("field", ["name", "prompt", "tests", "stop_tokens"])
def test_a_prompt_file_without_a_field_is_named_with_its_line(folder: Path, field: str) -> None:
    rows = [ROWS[0], {key: value for key, value in ROWS[1].items() if key != field}]
    (folder / "humaneval-sh.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        UserError, match=rf"humaneval-sh\.jsonl:2: lacks {field}: these are not MultiPL-E prompts"
    ):
        load_suite(str(folder), ["sh"], None)


def test_a_plan_needs_tasks_with_a_language_that_the_table_has(folder: Path) -> None:
    assert plan_evaluation(recipe([])) is None
    with pytest.raises(UserError, match=r"no task has a language: give tasks\.<name>\.language"):
        plan_evaluation(recipe(str(folder), language=None))
    with pytest.raises(
        UserError, match=r"tasks\.t\.language = 'phpp': is not in eval/languages\.yaml.* Did you mean 'php'"
    ):
        plan_evaluation(recipe(str(folder), language="phpp"))
    with pytest.raises(
        UserError, match=r"evaluation\.languages = 'lua': no task has this language; tasks have sh"
    ):
        plan_evaluation(recipe(str(folder), languages=["lua"]))
    with pytest.raises(UserError, match="two suites would share this name"):
        plan_evaluation(recipe([str(folder), f"{folder}/"]))


def test_without_a_sandbox_nothing_is_planned_and_training_may_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(kind: str) -> None:
        raise user_error("evaluation.sandbox", kind, "needs bubblewrap: apt-get install bubblewrap")

    monkeypatch.setattr(evaluate, "open_sandbox", closed)
    with pytest.raises(UserError, match="needs bubblewrap"):
        plan_evaluation(recipe(str(folder)))
    plan = plan_evaluation(recipe(str(folder)), need_sandbox=False)
    assert plan is not None
    assert plan.languages == {}
    assert "needs bubblewrap" in plan.broken["sh"]


@pytest.mark.parametrize("name", ["heldout", "Speech", "report.json"])
def test_a_suite_must_not_have_a_reserved_name(folder: Path, name: str) -> None:
    place = folder.rename(folder.with_name(name))
    with pytest.raises(
        UserError, match="would have the name of another file or folder in the run's folder eval/: rename it"
    ):
        plan_evaluation(recipe([str(place)]))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"stop_tokens": "\nend"}, "must be a list of texts"),
        ({"stop_tokens": '["\\nend"]'}, "must be a list of texts"),
        ({"stop_tokens": None}, "must be a list of texts"),
        ({"stop_tokens": ["\nend", ""]}, "must be a list of texts that are not empty"),
        ({"stop_tokens": ["\nend", 3]}, "must be a list of texts"),
        ({"prompt": ["x"]}, "prompt = ['x']: must be text"),
        ({"tests": None}, "tests: must be text"),
    ],
)
def test_problem_with_a_field_of_another_kind_is_refused_with_its_line(
    folder: Path, changed: dict[str, Any], reason: str
) -> None:
    (folder / "humaneval-sh.jsonl").write_text("\n".join(map(json.dumps, [ROWS[0], {**ROWS[1], **changed}])))
    with pytest.raises(UserError) as caught:
        load_suite(str(folder), ["sh"], None)
    assert str(caught.value).startswith(f"{folder / 'humaneval-sh.jsonl'}:2: {next(iter(changed))}")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"name": "p", "name": "q"}', "has the key 'name' twice"),
        ('{"name": "p", "x": {"a": 1, "a": 2}}', "has the key 'a' twice"),
        ("[" * 100_000, "is nested too deeply"),
        ("{", "is not JSON"),
    ],
    ids=["twice", "nested", "deep", "cut"],
)
def test_line_that_cannot_be_read_whole_is_refused_with_its_place(
    folder: Path, line: str, reason: str
) -> None:
    (folder / "humaneval-sh.jsonl").write_text(f"{json.dumps(ROWS[0])}\n{line}")
    with pytest.raises(UserError, match=f"humaneval-sh.jsonl:2: {reason}"):
        load_suite(str(folder), ["sh"], None)
