"""The builder and the check find evaluation problems in training data; the shipped data have none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from assets.code_corpus import go, lua
from assets.code_corpus.examples import Origin, function_examples
from assets.code_corpus.languages import SYNTAX
from assets.code_corpus.overlap import Problems, description, word_runs

ROOT = Path(__file__).resolve().parents[3]
STARTER = ROOT / "eval/starter_problems.yaml"
PROMPTS = ROOT / "tests/fixtures/multipl_e"
DESCRIPTION = (
    "Check if in given table of numbers, are any two numbers closer to each other than given threshold."
)


@pytest.fixture
def problems() -> Problems:
    found = Problems()
    found.add("HumanEval_0_has_close_elements", "has_close_elements", DESCRIPTION)
    return found


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "assets/check_overlap.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("lua", "local function hasCloseElements(x)"),
        ("php", "function has_close_elements($x) {"),
        ("js", "exports.hasCloseElements = (x) => {"),
        ("js", "  hasCloseElements(x) {"),
        ("go", "func (s *Set[T]) HasCloseElements(x int) bool {"),
        ("rust", "pub fn has_close_elements<T>(x: T) {"),
        ("d", "bool hasCloseElements(T)(T x) if (isNumeric!T)\n{"),
        ("python", "has_close_elements = lambda x: x"),
    ],
)
def test_defined_name_is_found_in_every_language(language: str, code: str, problems: Problems):
    assert problems.named_in(code, SYNTAX[language].DEFINED_NAME) == "HumanEval_0_has_close_elements"
    assert problems.named_in(code.replace("lose", "old"), SYNTAX[language].DEFINED_NAME) is None


def test_eight_words_of_a_description_are_an_overlap_and_seven_are_not(problems: Problems):
    assert problems.described_in("-- Are any two\n-- numbers closer to each other, ...")
    assert problems.described_in("-- any two numbers closer to each other") is None
    assert list(word_runs("a b c d e f g")) == []


def test_description_leaves_out_examples_and_code():
    prompt = (
        "#include<vector>\n// Adds x\n// and y\n// >>> add(2, 3)\n// five\n// Really.\n"
        "int add(int x, int y) {\n"
    )
    assert "".join(description(prompt).replace("/", "").split()) == "AddsxandyReally."


def test_builder_counts_both_kinds_of_overlap(problems: Problems):
    source = (
        "function M.has_close_elements(x)\n  local y = x\n  return y\nend\n"
        f"-- {DESCRIPTION}\nfunction close(x)\n  local y = x\n  return y\nend\n"
        "function kept(x)\n  local y = x\n  return y\nend\n"
    )
    dropped: Counter[str] = Counter()
    examples = function_examples(source, lua, Origin("p", "1", "x", "MIT"), problems, dropped)
    assert [example.prompt for example in examples] == ["function kept(x)"]
    assert dropped == {"benchmark name": 1, "benchmark text": 1}
    assert function_examples(
        "func f() {\n\ta()\n\tb()\n}\n", go, Origin("p", "1", "x", "MIT"), Problems(), dropped
    )


def test_check_fails_on_a_planted_function_and_passes_without_it(tmp_path: Path):
    starter = tmp_path / "problems.yaml"
    starter.write_text(
        "problems:\n  - {name: is_even, doc: Checks whether a number is even.}\n", encoding="utf-8"
    )
    rows = [{"prompt": "fn is_odd(n: i64) -> bool {", "completion": "\n    n % 2 == 1\n}"}]
    rows += [{"prompt": "fn is_even(n: i64) -> bool {", "completion": "\n    n % 2 == 0\n}"}]
    file = tmp_path / "rust.train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    finished = check("--problems", starter, tmp_path)
    assert finished.returncode == 1
    assert f"{file}:2 defines the function of starter is_even" in finished.stdout
    file.write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    finished = check("--problems", starter, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert "1 examples compared with 1 problems" in finished.stdout


def test_check_says_when_there_is_nothing_to_compare(tmp_path: Path):
    finished = check("--prompts", tmp_path, tmp_path)
    assert finished.returncode == 1
    assert "no *.jsonl or *.json with names such as" in finished.stderr


@pytest.mark.parametrize(
    ("option", "path"), [("--problems", STARTER), ("--prompts", PROMPTS)], ids=["starter", "multipl_e"]
)
def test_shipped_corpus_holds_no_problem(option: str, path: Path):
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is absent")
    finished = check(option, path, "assets/code")
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_unknown_language_is_refused_with_the_choices():
    command = [sys.executable, "assets/build_code_corpus.py", "--languages", "cobol"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "invalid choice: 'cobol'" in finished.stderr
    assert "rust" in finished.stderr.splitlines()[-1]
