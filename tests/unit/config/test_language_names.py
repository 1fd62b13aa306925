"""A language is known by every word that MultiPL-E has for it."""

from __future__ import annotations

import subprocess

import pytest

from flora_train.config.evaluation_schema import EvaluationConfig
from flora_train.config.language_names import NAMES, language_key
from flora_train.config.paths import PROJECT_ROOT
from flora_train.config.task_schema import TaskConfig
from flora_train.evaluation.code.programs.languages import find_language, load_languages

MULTIPL_E = {
    **{
        "adb": "ada",
        "rb": "rb",
        "lua": "lua",
        "python": "py",
        "notypes.py": "py",
        "julia": "jl",
        "java": "java",
        "rust": "rs",
    },
    **{
        "swift": "swift",
        "racket": "rkt",
        "javascript": "js",
        "cpp": "cpp",
        "php": "php",
        "humaneval_to_dlang.py": "d",
        "d": "d",
    },
    **{
        "r": "r",
        "humaneval_to_r.py": "r",
        "humaneval_to_r": "r",
        "jl": "jl",
        "ml": "ml",
        "hs": "hs",
        "elixir": "elixir",
    },
    **{
        "clj": "clj",
        "dart": "dart",
        "go_test.go": "go",
        "ruby": "rb",
        "perl": "pl",
        "bash": "sh",
        "typescript": "ts",
    },
    **{
        "humaneval-js": "js",
        "mbpp-rs": "rs",
        "humaneval_to_go.py": "go",
        "eval_racket": "rkt",
        "C#": "cs",
        "C++": "cpp",
    },
    **{
        "csharp": "cs",
        "golang": "go",
        "haskell": "hs",
        "clojure": "clj",
        "ocaml": "ml",
        "scala": "scala",
        "luau": "luau",
    },
    **{
        "sh": "sh",
        "JavaScript": "js",
        "R": "r",
        "Lua": "lua",
        "PHP": "php",
        ".js": "js",
        " python ": "py",
        "ts": "ts",
        "cs": "cs",
    },
}


@pytest.mark.parametrize("word", MULTIPL_E)
def test_language_key_accepts_names_of_multipl_e(word: str) -> None:
    key = MULTIPL_E[word]
    assert language_key(word) == key
    table = load_languages()
    assert find_language(word, table) is table[key]
    assert TaskConfig(train="x", language=word).language == key
    assert EvaluationConfig(languages=[word, key]).languages == [key]


def test_every_word_means_a_language_of_the_table() -> None:
    table = load_languages()
    assert NAMES.keys() <= table.keys()
    assert all(language_key(key) == key for key in table)
    assert all(language_key(language.name) == key for key, language in table.items())
    assert language_key("klingon") == "klingon"


def test_installer_accepts_the_same_language_names() -> None:
    script = PROJECT_ROOT / "eval" / "install_toolchains.sh"
    words = [word for others in NAMES.values() for word in others]
    look = 'source <(sed -n "/^key_of()/,/^}/p" "$0"); for word in "$@"; do key_of "$word"; done'
    done = subprocess.run(
        ["bash", "-c", look, str(script), *words], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [language_key(word) for word in words]
