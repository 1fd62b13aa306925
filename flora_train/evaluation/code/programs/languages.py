"""How is each language run? The table eval/languages.yaml, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from flora_train.config.errors import choices, did_you_mean, fail
from flora_train.config.files import PROJECT_ROOT
from flora_train.config.section import Section, Text

TABLE = PROJECT_ROOT / "eval" / "languages.yaml"
EXITS = r"(?i)\b(?:_?exit|quick_exit|quit|halt)!?\s*\("
"""A call that ends the program: exit(), System.exit(), process.exit(), os.Exit(), std::process::exit(), Runtime.halt(), ..."""


class Prepare(Section):
    """What a language's compiler needs once; what each key means stands at the table's top."""

    command: list[Text]
    when: str
    words: list[Text]


class Language(Section):
    """A row of the table; what each key means stands at its top."""

    key: Text
    name: Text
    file: Text
    run: list[Text]
    compile: list[Text] | None = None
    prepare: Prepare | None = None
    seconds: float = Field(15.0, gt=0)
    compile_seconds: float = Field(30.0, gt=0)
    quiet: bool = False
    says: str | None = None
    assertion: str
    syntax: str | None = None
    exits: str = EXITS
    comment: str = "//"
    packages: list[Text] = []
    npm: list[Text] = []
    maker: Text | None = None
    passing: str = Field(alias="pass")
    failing: str = Field(alias="fail")

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
    Raises UserError for a damaged table."""
    rows: Mapping[str, Any] = yaml.safe_load(table.read_text(encoding="utf-8"))
    try:
        languages = {key: Language(key=key, **row) for key, row in rows.items()}
    except (ValidationError, TypeError) as error:
        raise fail(str(table), None, str(error)) from error
    if cpu_seconds is None:
        return languages
    return {key: language.model_copy(update={"seconds": cpu_seconds}) for key, language in languages.items()}


def find_language(key: str, languages: Mapping[str, Language]) -> Language:
    """Raises UserError for a language that the table lacks."""
    if key not in languages:
        raise fail(
            "language", key, f"is not in eval/languages.yaml; there are {choices(languages)}.{did_you_mean(key, languages)}"
        )
    return languages[key]
