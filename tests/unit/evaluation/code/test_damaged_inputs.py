"""Damaged completions and prompts are read, or one UserError names the location."""

from __future__ import annotations

import gzip
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flora_train.config.errors import UserError
from flora_train.evaluation.code import completion_files as completions_module
from flora_train.evaluation.code.completion_files import read_completions
from flora_train.evaluation.code.completion_log import CompletionLog
from flora_train.evaluation.code.problems.problem import load_problems
from flora_train.evaluation.code.scores import check_k

PROBLEM: dict[str, Any] = {
    "name": "p",
    "language": "sh",
    "prompt": "f() {\n",
    "tests": "}",
    "stop_tokens": ["\n}"],
}
ROW: dict[str, Any] = {"language": "sh", "name": "p", "completion": "x", "sample": 0, "adapter": "a"}
PACKED: dict[str, Any] = {**PROBLEM, "completions": ["x", "y"]}
LOGGED: dict[str, Any] = {
    **{
        "adapter": "a",
        "language": "sh",
        "name": "p",
        "sample": 0,
        "completion": "x",
        "ended": "stop",
        "tokens": 1,
    },
    **{"prompt_sha": "0", "adapter_sha": ""},
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


def prompts(folder: Path) -> Path:
    (folder / "humaneval-sh.jsonl").write_text(json.dumps(PROBLEM))
    return folder


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 10_000,
        "{",
        "null",
        "[]",
        json.dumps({**ROW, "sample": "0"}),
        json.dumps({**ROW, "sample": -1}),
        json.dumps({**ROW, "sample": True}),
        json.dumps({**ROW, "sample": 1e300}),
        json.dumps({**ROW, "sample": 10**300}),
        json.dumps({**ROW, "name": ["p"]}),
        json.dumps({**ROW, "name": {}}),
        json.dumps({**ROW, "language": 7}),
        json.dumps({**ROW, "language": "../../etc/passwd"}),
        json.dumps({**ROW, "language": "no\u0000such"}),
        json.dumps({**ROW, "language": "x" * 5000}),
        json.dumps({**ROW, "adapter": None}),
        json.dumps({**ROW, "completion": 3}),
    ],
)
def test_read_completions_names_the_line_that_is_wrong(line: str, tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + line)
    with pytest.raises(UserError, match=r"c\.jsonl:2|humaneval-"):
        read_completions(file, prompts(tmp_path))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no gzip", "not a complete gzip"),
        (gzip.compress(json.dumps(PACKED).encode(), mtime=0)[:-9], "not a complete gzip"),
        (gzip.compress(json.dumps(PACKED).encode(), mtime=0)[:20] + b"\xff" * 9, "not a complete gzip"),
        (gzip.compress(b"\xff\xfe", mtime=0), "is not text"),
        (gzip.compress(b"[", mtime=0), "not JSON"),
        (gzip.compress(b"0" * 200_000, mtime=0), "unpacks to more"),
        (gzip.compress(json.dumps({**PACKED, "completions": "xy"}).encode(), mtime=0), "list of texts"),
        (gzip.compress(json.dumps({**PACKED, "completions": [1]}).encode(), mtime=0), "must be text"),
        (gzip.compress(json.dumps({**PACKED, "stop_tokens": "\n}"}).encode(), mtime=0), "list of texts"),
        (gzip.compress(json.dumps({**PACKED, "stop_tokens": [""]}).encode(), mtime=0), "list of texts"),
        (gzip.compress(json.dumps({**PACKED, "name": "../../outside"}).encode(), mtime=0), "file name"),
        (gzip.compress(json.dumps({**PACKED, "tests": None}).encode(), mtime=0), "must be text"),
        (b"", "is not JSON|not a complete gzip"),
    ],
)
def test_read_completions_names_the_packed_file_that_is_wrong(
    content: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completions_module, "LARGEST_FILE", 100_000)
    (tmp_path / "p.json.gz").write_bytes(content)
    with pytest.raises(UserError, match=words) as raised:
        read_completions(tmp_path, None)
    assert "p.json.gz" in str(raised.value)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b'{"name": 1}', b"{}", b"[" * 100_000, b'{"stop_tokens": "\\n}"}']
)
def test_load_problems_names_the_line_that_is_wrong(content: bytes, tmp_path: Path) -> None:
    if content.startswith(b'{"stop'):
        content = json.dumps({**PROBLEM, "stop_tokens": "\n}"}).encode()
    (tmp_path / "humaneval-sh.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"humaneval-sh\.jsonl"):
        load_problems(tmp_path, "sh")


def test_prompts_and_completions_may_use_any_name_of_a_language(tmp_path: Path) -> None:
    (tmp_path / "humaneval-javascript.jsonl").write_text(json.dumps({**PROBLEM, "language": "javascript"}))
    file = tmp_path / "c.jsonl"
    file.write_text(
        "".join(
            json.dumps({**ROW, "language": word, "sample": i}) + "\n"
            for i, word in enumerate(("js", "JavaScript"))
        )
    )
    assert {completion.problem.language for completion in read_completions(file, tmp_path)} == {"js"}
    packed = tmp_path / "humaneval-humaneval_to_r.py"
    packed.mkdir()
    (packed / "p.json").write_text(json.dumps({**PACKED, "language": "humaneval_to_r.py"}))
    assert read_completions(packed, None)[0].problem.language == "r"


@pytest.mark.attack
@given(JSON, st.sampled_from(sorted({*ROW, *PACKED})), st.binary(max_size=40))
def test_readers_raise_a_user_error_or_succeed(
    tmp_path_factory: pytest.TempPathFactory, value: Any, key: str, tail: bytes
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    lines = [json.dumps(row).encode() for row in (value, {**ROW, key: value})]
    for content in (*lines, lines[1] + b"\n" + tail, tail):
        (folder / "c.jsonl").write_bytes(content)
        with suppress(UserError):
            read_completions(folder / "c.jsonl", prompts(folder))
    for content in (json.dumps({**PACKED, key: value}).encode(), tail):
        for packed in (content, gzip.compress(content), gzip.compress(content)[:-5] + tail):
            (folder / "p.json.gz").write_bytes(packed)
            with suppress(UserError):
                read_completions(folder / "p.json.gz", None)
        (folder / "humaneval-sh.jsonl").write_bytes(content)
        with suppress(UserError):
            load_problems(folder, "sh")


@pytest.mark.attack
@given(JSON, st.sampled_from(sorted(LOGGED)), st.binary(max_size=40))
def test_completion_log_raises_a_user_error_or_succeeds(
    tmp_path_factory: pytest.TempPathFactory, value: Any, key: str, tail: bytes
) -> None:
    log = CompletionLog(tmp_path_factory.mktemp("fuzz"))
    for content in (json.dumps(value).encode(), json.dumps({**LOGGED, key: value}).encode(), tail):
        (log.path / "completions-0.jsonl").write_bytes(content + b"\n")
        with suppress(UserError):
            for entry in log.read().values():
                assert {name: type(found) for name, found in vars(entry).items()} == {
                    n: type(v) for n, v in LOGGED.items()
                }


def test_errors_show_the_control_characters_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({**ROW, "language": "\x1b[2J"}) + "\n")
    with pytest.raises(UserError) as raised:
        read_completions(file, prompts(tmp_path))
    assert "\x1b" not in str(raised.value)
    with pytest.raises(UserError) as raised:
        check_k([("\x1b[2J", "sh", "p", 0)], [2])
    assert "\x1b" not in str(raised.value)
