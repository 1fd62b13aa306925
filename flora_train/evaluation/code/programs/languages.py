"""Language: how programs of a language are compiled and run, from the table eval/languages.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from flora_train.config.base import ConfigModel, Text
from flora_train.config.errors import Problem, UserError, choices, did_you_mean, first_line, user_error
from flora_train.config.language_names import language_key
from flora_train.config.paths import PROJECT_ROOT

TABLE = PROJECT_ROOT / "eval" / "languages.yaml"
EXITS = r"(?i)\b(?:_?exit|quick_exit|quit|halt)!?\s*\("
"""Calls that end a program: exit(), System.exit(), process.exit(), os.Exit(), std::process::exit(),
Runtime.halt(), ...
"""


def _valid_pattern(value: str | None) -> str | None:
    """Raises ValueError for an invalid regular expression, before the first program needs it."""
    try:
        re.compile(value or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a valid regular expression: {error}") from error
    return value


class Prepare(ConfigModel):
    """What a language's compiler prepares once; the keys are explained at the top of the table."""

    command: list[Text] = Field(min_length=1)
    when: str
    words: list[Text]

    _patterns = field_validator("when")(_valid_pattern)


class Evidence(ConfigModel):
    """How a passing program proves that it ran its checks; the keys are explained at the top of the table."""

    before: str
    write: str
    run: list[Text] | None = None


class Language(ConfigModel):
    """A row of the table; the keys are explained at its top."""

    key: Text
    name: Text
    file: Text = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    run: list[Text] = Field(min_length=1)
    compile: list[Text] | None = Field(None, min_length=1)
    prepare: Prepare | None = None
    seconds: float = Field(15.0, gt=0)
    compile_seconds: float = Field(30.0, gt=0)
    quiet: bool = False
    says: str | None = None
    never: str | None = None
    assertion: str
    syntax: str | None = None
    exits: str = EXITS
    comment: str = "//"
    evidence: Evidence | None = None
    packages: list[Text] = []
    npm: list[Text] = []
    maker: Text | None = None
    passing: str = Field(alias="pass")
    failing: str = Field(alias="fail")

    _patterns = field_validator("says", "assertion", "syntax", "exits")(_valid_pattern)

    def error_status(self, output: str) -> Literal["AssertionError", "SyntaxError", "Exception"]:
        """The status of a failed run, from its output."""
        if self.syntax and re.search(self.syntax, output):
            return "SyntaxError"
        return "AssertionError" if re.search(self.assertion, output, re.DOTALL) else "Exception"

    @property
    def how_to_install(self) -> str:
        """The commands to install the language on Debian, or its website if Debian 12 has no package."""
        if self.maker is not None:
            return f"from {self.maker}; Debian 12 has no package"
        commands = [f"apt-get install {' '.join(self.packages)}"]
        if self.npm:
            commands.append(f"npm install -g {' '.join(self.npm)}")
        return " && ".join(commands)


def load_languages(cpu_seconds: float | None = None, table: Path = TABLE) -> dict[str, Language]:
    """Key of MultiPL-E's prompt sets -> language.

    Raises UserError for a damaged table, naming every wrong key.

    cpu_seconds: CPU time limit of a program, instead of each language's own.
    """
    languages, problems = {}, []
    for key, row in _rows(table).items():
        try:
            languages[key] = Language.model_validate({**row, "key": key})
        except ValidationError as error:
            for item in error.errors():
                location = ".".join(map(str, (key, *item["loc"])))
                hint = item["msg"].removeprefix("Value error, ")
                problems.append(Problem(f"{table}: {location}", item["input"], hint))
    if problems:
        raise UserError(*problems)
    if cpu_seconds is None:
        return languages
    return {key: language.model_copy(update={"seconds": cpu_seconds}) for key, language in languages.items()}


def _rows(table: Path) -> Mapping[Any, Mapping[str, Any]]:
    """Raises UserError for a file without rows of keys and values."""
    try:
        rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise user_error(str(table), None, f"cannot be read: {first_line(error)}") from error
    if not isinstance(rows, Mapping) or not rows:
        raise user_error(str(table), None, "must have a row of keys and values for each language")
    for key, row in rows.items():
        if not isinstance(row, Mapping) or "key" in row:
            raise user_error(f"{table}: {key}", row, "must be a mapping without the key `key`")
    return rows


def find_language(key: str, languages: Mapping[str, Language]) -> Language:
    """The language of a key or of another name for it. Raises UserError if it is not in the table."""
    key = language_key(key)
    if key not in languages:
        hint = f"is not in eval/languages.yaml; it has {choices(languages)}.{did_you_mean(key, languages)}"
        raise user_error("language", key, hint)
    return languages[key]
