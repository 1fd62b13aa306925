"""Files of completions and verdicts: both layouts, resumed executions, no mixing."""

from __future__ import annotations

import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from flora_train.cli import main
from flora_train.config.errors import UserError
from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.evaluation.code.completion_files import read_completions, write_multipl_e
from flora_train.evaluation.code.completion_log import CompletionLog, LoggedCompletion
from flora_train.evaluation.code.problems.problem import Problem
from flora_train.evaluation.code.programs import verdicts
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox

PROBLEM = {
    "name": "p",
    "language": "sh",
    "prompt": "add() {\n",
    "tests": "}\n[[ $(add 1 2) = 3 ]]",
    "stop_tokens": ["\n}"],
}
ENDLESS = (
    "echo 3\n }\nwhile :; do :; done\nafterwards() {"  # in the main shell: a subshell would be killed alone
)
GOOD, BAD = "    echo $(($1 + $2))\n}\nrm -rf x", "    echo 4"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "humaneval-sh.jsonl").write_text(
        json.dumps(PROBLEM) + "\n" + json.dumps({**PROBLEM, "name": "q"})
    )
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "made.jsonl"
    path.write_text("\n".join(json.dumps({"language": "sh", "name": "p", **row}) for row in rows))
    return path


def test_a_completion_ends_at_its_earliest_stop_token() -> None:
    problem = Problem("sh", "p", "P", "T", ("\n}", "\n#"))
    assert problem.program("a\n# b\n}") == "Pa\nT"
    assert problem.program("a") == "Pa\nT"


def test_samples_count_up_and_both_layouts_mean_the_same(prompts: Path) -> None:
    ours = read_completions(write(prompts, {"completion": GOOD}, {"completion": BAD}), prompts)
    theirs = prompts / "theirs"
    theirs.mkdir()
    packed = gzip.compress(json.dumps({**PROBLEM, "completions": [GOOD, BAD]}).encode())
    (theirs / "p.json.gz").write_bytes(packed)
    (theirs / "p.results.json.gz").write_bytes(packed)
    assert read_completions(theirs, None) == ours
    assert [completion.key for completion in ours] == [("model", "sh", "p", 0), ("model", "sh", "p", 1)]


def test_multipl_e_layout_is_read_back_as_written(prompts: Path) -> None:
    ours = read_completions(write(prompts, {"completion": GOOD}, {"completion": BAD}), prompts)
    write_multipl_e(ours[::-1], prompts / "theirs", EvaluationConfig(temperature=0.8))
    (folder,) = (prompts / "theirs").iterdir()
    assert folder.name == "humaneval-sh-model-0.8-reworded"
    assert read_completions(folder, None) == ours


def judged(prompts: Path, path: Path, sandbox: Sandbox) -> dict[Any, dict[str, Any]]:
    return verdicts.collect_verdicts(
        read_completions(path, prompts), load_languages(), sandbox, file=prompts / "verdicts.jsonl", workers=2
    )


def test_collect_verdicts_resumes_after_a_kill(
    prompts: Path, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(prompts, *({"name": name, "completion": text} for name in "pq" for text in (GOOD, BAD)))
    first = judged(prompts, path, sandbox)
    assert [record["status"] for record in first.values()] == ["OK", "AssertionError", "OK", "AssertionError"]
    file = prompts / "verdicts.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    ran: list[int] = []
    real = verdicts.execute_all

    def counted(programs: Any, *arguments: Any, **options: Any) -> None:
        ran.append(len(programs))
        real(programs, *arguments, **options)

    monkeypatch.setattr(verdicts, "execute_all", counted)
    again = judged(prompts, path, sandbox)
    assert ran == [2]
    assert {key: record["status"] for key, record in again.items()} == {
        key: record["status"] for key, record in first.items()
    }
    assert len(file.read_text().splitlines()) == 4


def test_verdicts_on_other_completions_are_refused(prompts: Path, sandbox: Sandbox) -> None:
    judged(prompts, write(prompts, {"completion": GOOD}), sandbox)
    with pytest.raises(UserError, match="verdict on another completion or prompt"):
        judged(prompts, write(prompts, {"completion": BAD}), sandbox)


def test_verdicts_with_another_time_limit_are_refused(
    prompts: Path, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["execute", str(write(prompts, {"completion": ENDLESS})), f"--prompts={prompts}"]
    assert main([*words, "--cpu-seconds=1"]) == 0
    (record,) = map(json.loads, (prompts / "made.verdicts.jsonl").read_text().splitlines())
    assert (record["status"], record["cpu_seconds"]) == ("Timeout", 1)
    assert record["seconds"] < load_languages()["sh"].seconds
    capsys.readouterr()
    assert main(words) == 2
    assert re.search(
        r"verdicts.jsonl:1: cpu_seconds = 1.*now has 15: give the same cpu_seconds, or",
        capsys.readouterr().err,
    )


def test_the_command_prints_pass_at_k(
    prompts: Path, sandbox: Sandbox, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(
        prompts, {"completion": GOOD, "adapter": "sh-flora"}, {"completion": BAD, "adapter": "sh-lora"}
    )
    assert main(["execute", str(path), f"--prompts={prompts}"]) == 0
    said = capsys.readouterr().out
    assert "sh-flora" in said
    assert "1.000 [0.025, 1.000]" in said  # of one problem
    assert "1 AssertionError" in said
    assert (prompts / "made.verdicts.jsonl").exists()


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        (
            [{"completion": GOOD}],
            ["--languages=shh"],
            "'shh': is not in eval/languages.yaml.*Did you mean 'sh'",
        ),
        ([{"completion": GOOD}], ["--languages=lua"], "no completion is in it; there are sh"),
        ([{"completion": GOOD}], ["--pass-at-k=1,2"], "k = 2: is more than the 1 samples"),
        ([{"completion": GOOD}], ["--pass-at-k=0"], "pass_at_k.0 = 0: must be at least 1"),
        ([{"completion": GOOD}], ["--sandbox=docker"], "sandbox = 'docker': must be bubblewrap or none"),
        (
            [{"completion": GOOD}],
            ["worker=2"],
            "worker = '2': options of this command begin with --. Did you mean '--workers'",
        ),
        (
            [{"completion": GOOD, "name": "z"}],
            [],
            "'z': is not a problem of .*humaneval-sh.jsonl: these completions are for other",
        ),
        (
            [{"completion": GOOD, "language": "lua"}],
            [],
            "humaneval-lua.jsonl.*no such file; the folder has prompts of sh",
        ),
        ([{"text": GOOD}], [], "made.jsonl:1: lacks completion"),
        ([{"completion": GOOD, "sample": 0}, {"completion": BAD, "sample": 0}], [], "occurs twice"),
        ([], [], "has no completions"),
    ],
)
def test_bad_input_is_one_clear_error(
    rows: list[dict[str, Any]],
    words: list[str],
    said: str,
    prompts: Path,
    sandbox: Sandbox,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["execute", str(write(prompts, *rows)), f"--prompts={prompts}", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error), error


def test_without_bubblewrap_nothing_runs(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "flora_train.evaluation.code.programs.sandbox.shutil.which",
        lambda name: None if name == "bwrap" else name,
    )
    path = write(prompts, {"completion": "touch /tmp/ran"})
    assert main(["execute", str(path), f"--prompts={prompts}"]) == 2
    assert "needs bubblewrap: apt-get install bubblewrap" in capsys.readouterr().err
    assert not (prompts / "made.verdicts.jsonl").exists()
    assert (
        main(["execute", str(write(prompts, {"completion": GOOD})), f"--prompts={prompts}", "--sandbox=none"])
        == 0
    )
    assert "unconfined" in capsys.readouterr().out


ODD = "echo '\u2028\u2029\x85\ud800'"


def test_unicode_line_separators_do_not_end_a_line_of_completions(prompts: Path, sandbox: Sandbox) -> None:
    file = write(prompts, {"completion": ODD})
    for _ in range(2):  # the second time verdicts are read again
        assert len(judged(prompts, file, sandbox)) == 1
    log = CompletionLog(prompts / "log")
    log.claim({"seed": 0})
    logged = LoggedCompletion("a", "sh", "p", 0, ODD.replace("\ud800", ""), "stop", 3, "", "")
    log.writer(0).append(logged)
    assert log.read() == {logged.key: logged}


def test_settings_may_change_until_something_is_written(tmp_path: Path) -> None:
    log = CompletionLog(tmp_path)
    log.claim({"seed": 0})
    log.claim({"seed": 1})
    log.writer(0).append(LoggedCompletion("a", "sh", "p", 0, "", "stop", 1, "", ""))
    log.claim({"seed": 1})
    with pytest.raises(UserError, match=r"seed = 2: its completions were made with 1 and would be mixed"):
        log.claim({"seed": 2})


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"completions": "return 1"}, "completions = .*must be a list of texts"),
        ({"completions": ["x"], "stop_tokens": "\n}"}, "stop_tokens = .*must be a list of texts"),
        ({"completions": ["x"], "stop_tokens": [""]}, "that are not empty"),
    ],
)
def test_text_where_a_list_belongs_is_refused_and_never_cut_into_letters(
    prompts: Path, changed: dict[str, Any], reason: str
) -> None:
    (prompts / "theirs.json").write_text(json.dumps({**PROBLEM, **changed}))
    with pytest.raises(UserError, match=reason):
        read_completions(prompts / "theirs.json", None)


def test_completion_whose_line_has_a_key_twice_is_refused(prompts: Path) -> None:
    (prompts / "made.jsonl").write_text(
        '{"language": "sh", "name": "p", "completion": "a", "completion": "b"}'
    )
    with pytest.raises(UserError, match=r"made.jsonl:1: has the key 'completion' twice"):
        read_completions(prompts / "made.jsonl", prompts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.json.gz", "fd"])
def test_a_pipe_of_completions_is_an_error(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is not a regular file"):
        read_completions(tmp_path / name, tmp_path)
