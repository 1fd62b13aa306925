"""Names of programming languages in MultiPL-E, and the keys of eval/languages.yaml that they stand for."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from flora_train.config.base import Text

NAMES: dict[str, tuple[str, ...]] = {
    "ada": ("adb",),
    "clj": ("clojure",),
    "cpp": ("c++", "cxx"),
    "cs": ("csharp", "c#"),
    "d": ("dlang",),
    "elixir": ("ex", "exs"),
    "go": ("golang", "go_test.go"),
    "hs": ("haskell",),
    "jl": ("julia",),
    "js": ("javascript",),
    "ml": ("ocaml",),
    "pl": ("perl",),
    "py": ("python", "python3", "notypes.py", "py_no_types"),
    "rb": ("ruby",),
    "rkt": ("racket", "rkt-multiline"),
    "php": ("php-multiline",),
    "rs": ("rust",),
    "sh": ("bash",),
    "ts": ("typescript",),
}
"""Key -> other names: in file names, configurations and `language` fields of MultiPL-E, and full names."""
KEYS = {name: key for key, names in NAMES.items() for name in names}
AROUND = re.compile(r"^(?:humaneval_to_|human_eval_to_|eval_|humaneval-|mbpp-)")
"""Prefixes of languages in the names of scripts and configurations of MultiPL-E."""


def language_key(word: str) -> str:
    """The key of a language name, without the prefixes of MultiPL-E. An unknown name is returned in lower
    case."""
    plain = word.strip().lower()
    if AROUND.match(plain):
        plain = AROUND.sub("", plain).removesuffix(".py")
    plain = plain.removeprefix(".")
    return KEYS.get(plain, plain)


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ProgrammingLanguage = Annotated[Text, AfterValidator(language_key)]
"""A programming language by any of its names; the value is its key."""
ProgrammingLanguages = Annotated[
    list[ProgrammingLanguage],
    BeforeValidator(_one_or_several),
    AfterValidator(lambda keys: list(dict.fromkeys(keys))),
]
"""Several programming languages, each once."""
