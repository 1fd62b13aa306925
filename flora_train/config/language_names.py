"""What MultiPL-E and its users call a programming language, and the key of eval/languages.yaml that is
meant."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from flora_train.config.base import Text

WORDS: dict[str, tuple[str, ...]] = {
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
"""Key -> other words for it: in MultiPL-E's file names, dataset configurations and `language` fields, and its
full name."""
KEYS = {word: key for key, words in WORDS.items() for word in words}
AROUND = re.compile(r"^(?:humaneval_to_|human_eval_to_|eval_|humaneval-|mbpp-)")
"""What stands before a language in names of MultiPL-E's scripts and configurations."""


def language_key(word: str) -> str:
    """In lower case and without what MultiPL-E puts around it; a word that no language is known by stays as
    it is otherwise."""
    plain = word.strip().lower()
    if AROUND.match(plain):
        plain = AROUND.sub("", plain).removesuffix(".py")
    plain = plain.removeprefix(".")
    return KEYS.get(plain, plain)


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


ProgrammingLanguage = Annotated[Text, AfterValidator(language_key)]
"""A language by any of its words; the value is its key."""
ProgrammingLanguages = Annotated[
    list[ProgrammingLanguage],
    BeforeValidator(_one_or_several),
    AfterValidator(lambda keys: list(dict.fromkeys(keys))),
]
"""Several, each once."""
