"""How is each language run? The table eval/languages.yaml, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator

from flora_train.config.base import ConfigModel, Text
from flora_train.config.errors import Problem, UserError, choices, did_you_mean, first_line, user_error
from flora_train.config.language_names import language_key
from flora_train.config.paths import PROJECT_ROOT

TABLE = PROJECT_ROOT / "eval" / "languages.yaml"
EXITS = r"(?i)\b(?:_?exit|quick_exit|quit|halt)!?\s*\("
"""A call that ends the program: exit(), System.exit(), process.exit(), os.Exit(), std::process::exit(), Runtime.halt(), ..."""


def _a_pattern(value: str | None) -> str | None:
    """Raises ValueError for what is no regular expression: it would be found out at the first program, after training."""
    try:
        re.compile(value or "")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from error
    return value


class Prepare(ConfigModel):
    """What a language's compiler needs once; what each key means stands at the table's top."""

    command: list[Text] = Field(min_length=1)
    when: str
    words: list[Text]

    _patterns = field_validator("when")(_a_pattern)


class Evidence(ConfigModel):
    """How a passing program shows that it ran its checks; what each key means stands at the table's top."""

    before: str
    write: str
    run: list[Text] | None = None


class Language(ConfigModel):
    """A row of the table; what each key means stands at its top."""

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

    _patterns = field_validator("says", "assertion", "syntax", "exits")(_a_pattern)

    def meaning(self, output: str) -> str:
        """AssertionError, SyntaxError or Exception: what the words of a failed run mean."""
        if self.syntax and re.search(self.syntax, output):
            return "SyntaxError"
        return "AssertionError" if re.search(self.assertion, output, re.DOTALL) else "Exception"

    @property
    def how_to_install(self) -> str:
        """The commands that a Debian user runs, or who has what Debian 12 has not."""
        if self.maker is not None:
            return f"from {self.maker}; Debian 12 has no package"
        npm = f" && npm install -g {' '.join(self.npm)}" if self.npm else ""
        return f"apt-get install {' '.join(self.packages)}{npm}"


def load_languages(cpu_seconds: float | None = None, table: Path = TABLE) -> dict[str, Language]:
    """Key of MultiPL-E's prompt sets -> language. cpu_seconds: what a program may compute, for all languages instead of their own.
    Raises UserError for a damaged table, with every row and key that is wrong."""
    languages, problems = {}, []
    for key, row in _rows(table).items():
        try:
            languages[key] = Language.model_validate({**row, "key": key})
        except ValidationError as error:
            problems += [
                Problem(
                    f"{table}: {'.'.join(map(str, (key, *found['loc'])))}",
                    found["input"],
                    found["msg"].removeprefix("Value error, "),
                )
                for found in error.errors()
            ]
    if problems:
        raise UserError(*problems)
    if cpu_seconds is None:
        return languages
    return {key: language.model_copy(update={"seconds": cpu_seconds}) for key, language in languages.items()}


def _rows(table: Path) -> Mapping[Any, Mapping[str, Any]]:
    """Raises UserError for a file that holds no rows of keys and values."""
    try:
        rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise user_error(str(table), None, f"cannot be read: {first_line(error)}") from error
    if not isinstance(rows, Mapping) or not rows:
        raise user_error(str(table), None, "must hold a row of keys and values for each language")
    for key, row in rows.items():
        if not isinstance(row, Mapping) or "key" in row:
            raise user_error(f"{table}: {key}", row, "must be keys and values, and key is not one of them")
    return rows


def find_language(key: str, languages: Mapping[str, Language]) -> Language:
    """key: or another word for it. Raises UserError for a language that the table lacks."""
    key = language_key(key)
    if key not in languages:
        raise user_error(
            "language", key, f"is not in eval/languages.yaml; there are {choices(languages)}.{did_you_mean(key, languages)}"
        )
    return languages[key]
