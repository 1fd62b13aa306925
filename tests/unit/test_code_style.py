"""Limits on the style of the package's code, as benchmarks/code_style.py counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import code_style
from benchmarks.code_style import Module, Place, read_modules, working_tree


@pytest.fixture(scope="module")
def modules() -> list[Module]:
    return read_modules(working_tree())


def listed(places: list[Place]) -> str:
    return "\n".join(str(place) for place in places)


def test_inline_conditionals_are_rare(modules: list[Module]) -> None:
    places = code_style.inline_conditionals(modules)
    assert code_style.per_100_lines(places, modules) <= 1.5, listed(places)


def test_nested_comprehensions_are_rare(modules: list[Module]) -> None:
    places = code_style.nested_comprehensions(modules)
    assert code_style.per_100_lines(places, modules) <= 0.2, listed(places)


def test_at_most_nine_modules_are_loose_in_the_root(modules: list[Module]) -> None:
    places = code_style.loose_modules(modules)
    assert len(places) <= 9, listed(places)


def test_readme_has_at_most_130_lines() -> None:
    assert len(working_tree()["README.md"].splitlines()) <= 130


def test_no_untyped_mapping_crosses_a_packages_border(modules: list[Module]) -> None:
    places = code_style.mappings_across_borders(modules)
    assert not places, listed(places)


def test_no_line_is_longer_than_110_characters(modules: list[Module]) -> None:
    places = code_style.long_lines(modules)
    assert not places, listed(places)


def test_no_module_docstring_is_a_question(modules: list[Module]) -> None:
    places = code_style.question_docstrings(modules)
    assert not places, listed(places)


def test_only_the_command_line_imports_typer(modules: list[Module]) -> None:
    places = code_style.typer_imports(modules)
    assert not places, listed(places)


def test_each_figure_counts_what_it_says() -> None:
    """On a package of two modules that has one of each, and beside it the form that does not count."""
    library = (
        '''"""Where is a value?"""
from typing import Any
import typer
Facts = tuple[dict[str, Any], int]
def used(a, b, c, d) -> Facts: ...
def unused(a, b, c, *, d) -> dict[str, Any]: ...
def typed(a) -> dict[str, int]: ...
class Run:
    facts: dict[str, Any]
    def method(self, a, b, c) -> int: return a if b else c
    def state_dict(self) -> dict[str, Any]: ...
pairs = [(a, b) for a in range(3) for b in range(3)]
squares = [[a * b for a in range(3)] for b in range(3)]
'''
        + "x" * 110
        + "\n"
        + "x" * 111
    )
    user = '''"""The command line."""
from flora_train.library import values
from flora_train.library.values import used
import typer
print(used, values.typed, used(1).facts, used(1).state_dict, [a for a in range(3)])
'''
    modules = read_modules({"flora_train/library/values.py": library, "flora_train/cli.py": user})
    lines = {kind: [place.line for place in count(modules)] for kind, count in code_style.COUNTED.items()}
    assert lines == {
        "conditionals": [10],
        "comprehensions": [12, 13],
        "questions": [1],
        "mappings": [6, 9, 11],
        "borders": [5, 9],
        "keyword-only": [6],
        "positional": [5],
        "loose": [1],
        "long-lines": [15],
        "typer": [3],
    }


def test_figures_of_the_first_reading() -> None:
    """The commit that was read before the style was changed, where its history is at hand."""
    if not (Path(code_style.ROOT) / ".git").exists():
        pytest.skip("no git repository")
    try:
        files = code_style.committed_files(code_style.BEFORE)
    except code_style.subprocess.CalledProcessError:
        pytest.skip(f"the repository has no commit {code_style.BEFORE}: a shallow clone")
    figures = code_style.figures(files)
    assert figures["Inline conditionals per 100 lines"] == "2.46"
    assert figures["Nested comprehensions per 100 lines"] == "0.72"
    assert figures["Modules whose docstring asks a question"] == "152"
    assert figures["Modules loose in the root"] == "20"
    assert figures["Lines of README.md"] == "341"
