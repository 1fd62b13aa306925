"""Verdicts are appended to verdict files only; files with other content stay unchanged."""

from __future__ import annotations

import fcntl
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.commands.execute import execute_completions
from flora_train.config.errors import UserError
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox
from flora_train.evaluation.code.programs.verdicts import have_other_limits, read_verdicts
from tests.unit.evaluation.code.conftest import working

ROOT = Path(__file__).parents[5]
PROMPTS = ROOT / "tests" / "fixtures" / "multipl_e_problems"
LANGUAGES = load_languages()
RIGHT = "    return max(l)"
RECORD: dict[str, Any] = {
    **{
        "adapter": "a",
        "language": "py",
        "name": "p",
        "sample": 0,
        "program": "x",
        "sandbox": "bubblewrap",
        "cpu_seconds": 15.0,
    },
    **{"status": "OK", "exit": 0, "seconds": 1.0, "output": "", "again": False, "suspicious": False},
}


@pytest.fixture
def completions(tmp_path: Path, sandbox: Sandbox) -> Path:
    working("py", sandbox)
    file = tmp_path / "completions.jsonl"
    rows = [
        {"language": "python", "name": "HumanEval_35_max_element", "completion": RIGHT, "sample": i}
        for i in range(2)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def execute(completions: Path, out: Path | None = None, **options: object) -> None:
    execute_completions(
        str(completions), prompts=str(PROMPTS), out=None if out is None else str(out), **options
    )


@pytest.mark.parametrize(
    "content",
    [
        b"note",
        b"a note\n",
        b"a note\nof two lines, the last unfinished",
        b'{"a": 1}\n',
        b"[]\n",
        b"\xff\xfe\x00",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\n",
        b'{"adapter": "a"}\n',
        json.dumps(RECORD).encode() + b"\nnotes\n",
        json.dumps(RECORD).encode() + b"\nnotes without an end",
        b"[" * 100_000 + b"\n",
    ],
)
def test_execute_does_not_change_a_file_of_another_format(
    content: bytes, completions: Path, tmp_path: Path
) -> None:
    note = tmp_path / "note.txt"
    note.write_bytes(content)
    with pytest.raises(UserError, match=r"note\.txt"):
        execute(completions, note)
    assert note.read_bytes() == content


def test_execute_does_not_write_over_what_it_reads(completions: Path, tmp_path: Path) -> None:
    link, hard = tmp_path / "link.jsonl", tmp_path / "hard.jsonl"
    link.symlink_to(completions)
    os.link(completions, hard)
    folder = tmp_path / "folder"
    folder.mkdir()
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "absent")
    before = completions.read_bytes()
    prompts = PROMPTS / "humaneval-py.jsonl"
    for out in (completions, link, hard, prompts, folder, dangling, Path("/dev/null"), completions / "below"):
        with pytest.raises(UserError):
            execute(completions, out)
        assert completions.read_bytes() == before
    assert prompts.read_bytes().startswith(b"{")
    assert not (tmp_path / "absent").exists()


def test_execute_resumes_its_verdict_file_and_creates_folders(
    completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "folder" / "verdicts.jsonl"
    execute(completions, out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 2
    assert json.loads(lines[0])["checks_ran"] is True
    out.write_bytes(lines[0] + lines[1][:40])  # what a kill leaves
    execute(completions, out)
    assert sorted(out.read_bytes().splitlines()[0:1]) == [lines[0].rstrip(b"\n")]
    assert [json.loads(line)["status"] for line in out.read_bytes().splitlines()] == ["OK", "OK"]
    before = out.read_bytes()
    execute(completions, out)
    assert out.read_bytes() == before
    out.write_bytes(b"")
    execute(completions, out)
    assert len(out.read_bytes().splitlines()) == 2


def test_execute_refuses_a_file_locked_by_another_process(completions: Path, tmp_path: Path) -> None:
    out = tmp_path / "verdicts.jsonl"
    with out.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process"):
            execute(completions, out)
    assert out.read_bytes() == b""


def test_execute_shows_names_as_text(
    completions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["[/red]", "[bold]x", "\x1b[31mred\x1b]0;title\x07", "a\nb", "\u202egnp.exe", ":smile:"]
    row = {
        "language": "py",
        "name": "HumanEval_35_max_element",
        "completion": "    return 1 \x1b[2J",
        "sample": 0,
    }
    completions.write_text("".join(json.dumps({**row, "adapter": name}) + "\n" for name in names))
    execute(completions)
    shown = capsys.readouterr().out
    for text in (
        "[/red]",
        "[bold]x",
        "\\x1b[31mred\\x1b]0;title\\x07",
        "a\\x0ab",
        "\\u202egnp.exe",
        ":smile:",
    ):
        assert text in shown
    assert "\x1b" not in shown
    assert "\u202e" not in shown


@pytest.mark.attack
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    st.sampled_from(sorted(RECORD)),
)
def test_read_verdicts_raises_a_user_error_or_succeeds(
    tmp_path_factory: pytest.TempPathFactory, value: Any, key: str
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "verdicts.jsonl"
    for content in (
        json.dumps(value),
        json.dumps({**RECORD, key: value}),
        json.dumps({**RECORD, key: value})[:-3],
    ):
        file.write_text(content + "\n")
        with suppress(UserError):
            read_verdicts(file, "bubblewrap", LANGUAGES)
        assert file.read_text() == content + "\n"


@pytest.mark.attack
@given(st.binary(max_size=200))
def test_read_verdicts_takes_any_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "verdicts.jsonl"
    file.write_bytes(content)
    with suppress(UserError):
        read_verdicts(file, "bubblewrap", {})
    assert file.read_bytes() == content


def test_have_other_limits_compares_sandbox_and_cpu_seconds(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    assert not have_other_limits(file, "bubblewrap", LANGUAGES)
    file.write_text("not a verdict\n" + json.dumps(RECORD) + "\n")
    assert not have_other_limits(file, "bubblewrap", LANGUAGES)
    assert have_other_limits(file, "none", LANGUAGES)
    slower = {"py": LANGUAGES["py"].model_copy(update={"seconds": 20.0})}
    assert have_other_limits(file, "bubblewrap", slower)


def test_only_a_partial_verdict_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "verdicts.jsonl"
    line = json.dumps({**RECORD, "name": 'a "quoted\\ name é'}, ensure_ascii=False)
    for end in range(len(line)):
        file.write_text(line[:end])
        assert read_verdicts(file, "bubblewrap", LANGUAGES) == {}
    foreign = [
        '{"adapter": "a", "language": "py", "name": "p", "sample": 0, "completion": "x"}',
        '{"adapter": 3',
        '{"adapter": "a", "no',
    ]
    for text in (
        *foreign,
        '{"adapter": "my notes"}',
        '{"adapter": "a", "language": "py", "name": "p", "completion": "return',
    ):
        file.write_text(text)
        with pytest.raises(UserError, match="does not contain verdicts"):
            read_verdicts(file, "bubblewrap", LANGUAGES)
