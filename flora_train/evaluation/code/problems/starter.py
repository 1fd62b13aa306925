"""What can a very small model already program? Our own easy problems, written out in every language from one table."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError, model_validator

from flora_train.config.base import ConfigModel, Text
from flora_train.config.errors import Problem as UserProblem
from flora_train.config.errors import UserError, choices, did_you_mean, user_error
from flora_train.config.paths import PROJECT_ROOT, read_yaml
from flora_train.evaluation.code.problems.problem import Problem

PROBLEMS = PROJECT_ROOT / "eval" / "starter_problems.yaml"
LANGUAGES = PROJECT_ROOT / "eval" / "starter_languages.yaml"
STARTER_LANGUAGES = ("lua", "pl", "rb", "js", "ts", "php", "py", "r", "cpp", "go", "rs", "d", "java")
"""The rows of LANGUAGES; keys as in eval/languages.yaml."""
LARGEST_INT = 2**53
"""JavaScript, Lua and R would round beyond it."""

Kind = Literal["int", "bool", "float", "str", "list[int]", "list[str]"]
SnakeCase = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")]
ELEMENTS: Mapping[Kind, Kind] = {"list[int]": "int", "list[str]": "str"}
FITS: Mapping[Kind, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and abs(value) <= LARGEST_INT,
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) is float,
    "str": lambda value: type(value) is str and all(letter.isprintable() or letter in "\n\t" for letter in value),
    "list[int]": lambda value: type(value) is list and all(map(FITS["int"], value)),
    "list[str]": lambda value: type(value) is list and all(map(FITS["str"], value)),
}
HINTS = {"missing": "is required", "extra_forbidden": "is no key here"}
"""pydantic's error type -> our words, where its own are about Python."""

Content = TypeVar("Content")


class StarterTest(BaseModel):
    """One call and its result. No ConfigModel: a result may be true or false."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    args: list[Any]
    result: Any


class StarterProblem(ConfigModel):
    """A row of eval/starter_problems.yaml; what each key means stands at its top."""

    name: SnakeCase
    doc: Text
    args: dict[SnakeCase, Kind] = Field(min_length=1)
    returns: Kind
    tests: list[StarterTest] = Field(min_length=4)

    @model_validator(mode="after")
    def _tests_fit_the_signature(self) -> StarterProblem:
        for number, test in enumerate(self.tests, 1):
            if len(test.args) != len(self.args):
                raise ValueError(f"test {number} has {len(test.args)} args, but the function has {len(self.args)}")
            kinds, values = [*self.args.values(), self.returns], [*test.args, test.result]
            for name, kind, value in zip([*self.args, "the result"], kinds, values, strict=True):
                if not FITS[kind](value):
                    raise ValueError(f"test {number}: {name} is {value!r}, which is no {kind}")
        return self


class StarterLanguage(ConfigModel):
    """A row of eval/starter_languages.yaml; what each key means stands at its top."""

    prompt: Text
    parameter: Text = "{name}"
    types: dict[Kind, Text] = {}
    booleans: Annotated[list[Text], Field(min_length=2, max_length=2)]
    literals: dict[Literal["int", "float", "str"], Text] = {}
    lists: Text
    escapes: str = ""
    check: Text
    checks: dict[Kind, Text] = {}
    tests: Text
    stop_tokens: list[Text]
    camel_case: bool = False

    def literal(self, value: Any, kind: Kind) -> str:
        """`value` as this language writes it in a program."""
        if kind == "bool":
            return self.booleans[value]
        if element := ELEMENTS.get(kind):
            items = ", ".join(self.literal(item, element) for item in value)
            return filled(self.lists, items=items, type=self.types.get(kind, ""))
        text = self._quoted(value) if kind == "str" else repr(value)
        return filled(self.literals.get(kind, "{value}"), value=text)  # type: ignore[arg-type]

    def render(self, key: str, problem: StarterProblem) -> Problem:
        """The problem in this language, whose key is `key`."""
        name = re.sub(r"_(.)", lambda found: found[1].upper(), problem.name) if self.camel_case else problem.name
        parameters = (filled(self.parameter, name=arg, type=self.types.get(kind, "")) for arg, kind in problem.args.items())
        prompt = filled(
            self.prompt,
            doc=problem.doc,
            name=name,
            parameters=", ".join(parameters),
            returns=self.types.get(problem.returns, ""),
        )
        checks = "\n".join(self._check(name, problem, test) for test in problem.tests)
        return Problem(key, problem.name, prompt, filled(self.tests, name=name, checks=checks), tuple(self.stop_tokens))

    def _check(self, name: str, problem: StarterProblem, test: StarterTest) -> str:
        arguments = ", ".join(map(self.literal, test.args, problem.args.values()))
        template = self.checks.get(problem.returns, self.check)
        return filled(template, name=name, arguments=arguments, result=self.literal(test.result, problem.returns))

    def _quoted(self, text: str) -> str:
        """JSON's escapes for quotes, backslash, line end and tab, which are also every language's, and then its own."""
        quoted = json.dumps(text, ensure_ascii=False)
        return "".join(f"\\{letter}" if letter in self.escapes else letter for letter in quoted)


class StarterTable(ConfigModel):
    """eval/starter_problems.yaml."""

    problems: list[StarterProblem] = Field(min_length=1)


def load_starter_problems(language: str, problems: Path = PROBLEMS, languages: Path = LANGUAGES) -> dict[str, Problem]:
    """Name -> problem in the language whose key this is. Raises UserError for a language that cannot be written, and for a
    damaged table."""
    rows = _valid(languages, dict[str, StarterLanguage])
    if language not in rows:
        words = f"the starter problems are not written for it; there are {choices(rows)}.{did_you_mean(language, rows)}"
        raise user_error("language", language, words)
    found: dict[str, Problem] = {}
    for row in _valid(problems, StarterTable).problems:
        if row.name in found:
            raise user_error(str(problems), row.name, "stands twice: names are keys, rename one")
        found[row.name] = rows[language].render(language, row)
    return found


def filled(template: str, **words: str) -> str:
    """`template` with {word} replaced for the words given; other braces are the language's own."""
    return re.sub(rf"\{{({'|'.join(words)})\}}", lambda found: words[found[1]], template)


def _valid(path: Path, kind: type[Content]) -> Content:
    """What the file holds. Raises UserError with every problem in it, each with file and place."""
    raw = read_yaml(path)
    try:
        return TypeAdapter(kind).validate_python(raw)
    except ValidationError as error:
        raise UserError(*(_explained(path, raw, item) for item in error.errors())) from error


def _explained(path: Path, raw: Any, item: Any) -> UserProblem:
    """A problem of the table is called by its name where it has one."""
    match item["loc"]:
        case ("problems", int(index), *rest) if isinstance(row := raw["problems"][index], dict) and "name" in row:
            place = [row["name"], *rest]
        case place:
            pass
    hint = HINTS.get(item["type"], item["msg"].removeprefix("Value error, "))
    value = None if item["type"] in ("missing", "value_error") else item["input"]
    return UserProblem(f"{path}: {'.'.join(map(str, place))}", value, hint)
