"""The starter problems and tables like theirs: easy problems for very small models, in every language."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

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
"""JavaScript, Lua and R round larger integers."""

ArgumentType = Literal["int", "bool", "float", "str", "list[int]", "list[str]"]
SnakeCase = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$")]
ELEMENTS: Mapping[ArgumentType, ArgumentType] = {"list[int]": "int", "list[str]": "str"}
FITS: Mapping[ArgumentType, Callable[[Any], bool]] = {
    "int": lambda value: type(value) is int and abs(value) <= LARGEST_INT,
    "bool": lambda value: type(value) is bool,
    "float": lambda value: type(value) is float,
    "str": lambda value: (
        type(value) is str and all(letter.isprintable() or letter in "\n\t" for letter in value)
    ),
    "list[int]": lambda value: type(value) is list and all(map(FITS["int"], value)),
    "list[str]": lambda value: type(value) is list and all(map(FITS["str"], value)),
}
HINTS = {"missing": "is required", "extra_forbidden": "is not a key here"}
"""pydantic's error type -> hint, where its own message is about Python."""

Content = TypeVar("Content")


class StarterTest(BaseModel):
    """One call and its result. Not a ConfigModel, as a result may be true or false."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    args: list[Any]
    result: Any


class StarterProblem(ConfigModel):
    """A row of eval/starter_problems.yaml; the keys are explained at its top."""

    name: SnakeCase
    doc: Text
    args: dict[SnakeCase, ArgumentType] = Field(min_length=1)
    returns: ArgumentType
    tests: list[StarterTest] = Field(min_length=4)
    solutions: dict[Text, Text] = {}
    """Language -> body of a correct function, for tests of the table; a model never sees it."""

    @model_validator(mode="after")
    def _tests_fit_the_signature(self) -> StarterProblem:
        for number, test in enumerate(self.tests, 1):
            if len(test.args) != len(self.args):
                raise ValueError(
                    f"test {number} has {len(test.args)} args, but the function has {len(self.args)}"
                )
            argument_types, values = [*self.args.values(), self.returns], [*test.args, test.result]
            for name, argument_type, value in zip(
                [*self.args, "the result"], argument_types, values, strict=True
            ):
                if not FITS[argument_type](value):
                    raise ValueError(
                        f"test {number}: {name} is {value!r}, which is not of type {argument_type}"
                    )
        return self


class StarterLanguage(ConfigModel):
    """A row of eval/starter_languages.yaml; the keys are explained at its top."""

    prompt: Text
    parameter: Text = "{name}"
    types: dict[ArgumentType, Text] = {}
    booleans: Annotated[list[Text], Field(min_length=2, max_length=2)]
    literals: dict[Literal["int", "float", "str"], Text] = {}
    lists: Text
    escapes: str = ""
    check: Text
    checks: dict[ArgumentType, Text] = {}
    tests: Text
    stop_tokens: list[Text]
    camel_case: bool = False

    def literal(self, value: Any, argument_type: ArgumentType) -> str:
        """The literal for `value` in this language."""
        if argument_type == "bool":
            return self.booleans[value]
        if element := ELEMENTS.get(argument_type):
            items = ", ".join(self.literal(item, element) for item in value)
            return filled(self.lists, items=items, type=self.types.get(argument_type, ""))
        text = self._quoted(value) if argument_type == "str" else repr(value)
        return filled(self.literals.get(argument_type, "{value}"), value=text)  # type: ignore[arg-type]

    def render(self, key: str, problem: StarterProblem) -> Problem:
        """The problem in this language. key: of the language."""
        name = problem.name
        if self.camel_case:
            name = re.sub(r"_(.)", lambda match: match[1].upper(), name)
        parameters = []
        for argument, argument_type in problem.args.items():
            parameters.append(filled(self.parameter, name=argument, type=self.types.get(argument_type, "")))
        prompt = filled(
            self.prompt,
            doc=problem.doc,
            name=name,
            parameters=", ".join(parameters),
            returns=self.types.get(problem.returns, ""),
        )
        checks = "\n".join(self._check(name, problem, test) for test in problem.tests)
        return Problem(
            key, problem.name, prompt, filled(self.tests, name=name, checks=checks), tuple(self.stop_tokens)
        )

    def _check(self, name: str, problem: StarterProblem, test: StarterTest) -> str:
        arguments = ", ".join(map(self.literal, test.args, problem.args.values()))
        template = self.checks.get(problem.returns, self.check)
        return filled(
            template, name=name, arguments=arguments, result=self.literal(test.result, problem.returns)
        )

    def _quoted(self, text: str) -> str:
        """The text with JSON's escapes, which all languages share, and this language's own."""
        quoted = json.dumps(text, ensure_ascii=False)
        return "".join(f"\\{letter}" if letter in self.escapes else letter for letter in quoted)


class StarterTable(ConfigModel):
    """eval/starter_problems.yaml."""

    problems: list[StarterProblem] = Field(min_length=1)


def load_starter_problems(
    language: str, problems: Path = PROBLEMS, languages: Path = LANGUAGES
) -> dict[str, Problem]:
    """Name -> problem in a language. Raises UserError for an unsupported language or a damaged table."""
    rows = _valid(languages, dict[str, StarterLanguage])
    if language not in rows:
        hint = f"has no starter problems; there are {choices(rows)}.{did_you_mean(language, rows)}"
        raise user_error("language", language, hint)
    rendered: dict[str, Problem] = {}
    for row in _valid(problems, StarterTable).problems:
        if row.name in rendered:
            raise user_error(str(problems), row.name, "occurs twice: names must be unique, rename one")
        rendered[row.name] = rows[language].render(language, row)
    return rendered


def filled(template: str, **values: str) -> str:
    """`template` with {name} replaced for the names given; other braces are part of the program."""
    return re.sub(rf"\{{({'|'.join(values)})\}}", lambda match: values[match[1]], template)


def _valid(path: Path, content_type: type[Content]) -> Content:
    """The content of a file. Raises UserError with every problem in it, each with file and location."""
    raw = read_yaml(path)
    try:
        return TypeAdapter(content_type).validate_python(raw)
    except ValidationError as error:
        raise UserError(*(_explained(path, raw, item) for item in error.errors())) from error


def _explained(path: Path, raw: Any, item: Any) -> UserProblem:
    """A validation error, with the problem's name as location if it has one."""
    location = list(item["loc"])
    match location:
        case ["problems", int(index), *rest]:
            row = raw["problems"][index]
            if isinstance(row, dict) and "name" in row:
                location = [row["name"], *rest]
    hint = HINTS.get(item["type"], item["msg"].removeprefix("Value error, "))
    value = None if item["type"] in ("missing", "value_error") else item["input"]
    return UserProblem(f"{path}: {'.'.join(map(str, location))}", value, hint)
