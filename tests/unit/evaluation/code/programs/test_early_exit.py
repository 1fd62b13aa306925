"""Completions that end the program before its tests are flagged, and ordinary ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from flora_train.evaluation.code.completion_files import read_completions
from flora_train.evaluation.code.problems.problem import load_problems
from flora_train.evaluation.code.programs.early_exit import exits_early
from flora_train.evaluation.code.programs.execute import Program, execute
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.evaluation.code.programs.sandbox import Sandbox
from tests.unit.evaluation.code.conftest import working

FIXTURES = Path(__file__).parents[4] / "fixtures"
EARLY = {
    "lua": ["  return 0\nend\nos.exit(0)", "  return 0\nend\ndo return end"],
    "pl": [
        "    exit 0;\n}",
        "    exit;\n}",
        "    return 0;\n}\n__END__",
        "    return 0;\n}\n=pod",
        "    exec 'true';\n}",
    ],
    "rb": ["  exit! 0\nend", "end\nexit", "  0\nend\nreturn", "  0\nend\n__END__", "  exec 'true'\nend"],
    "js": ["  process.exit(0);\n}", "  process['exit']();\n}", "  return 0;\n}\nreturn;"],
    "php": [
        "    exit(0);\n}",
        "    exit;\n}",
        "    die();\n}",
        "    return 0;\n}\nreturn;",
        "    return 0;\n}\n__halt_compiler();",
    ],
    "py": [
        "\n    quit()",
        "\n    raise SystemExit",
        "\n    import sys; sys.exit(0)",
        "\n    import os; os._exit(0)",
    ],
    "cpp": ["    std::exit(0);", "    _Exit(0);", "    quick_exit(0);"],
}
"""Of HumanEval_35_max_element. (LuaUnit itself notices os.exit during a test.)"""
FLAGGED = {
    "rs": "std::process::exit(0)",
    "go": "os.Exit(0)",
    "java": "System.exit(0);",
    "cs": "Environment.Exit(0);",
    "scala": "sys.exit(0)",
    "swift": "exit(0)",
    "dart": "exit(0);",
    "d": "exit(0);",
    "jl": "exit()",
    "r": "quit(status = 0)",
    "ml": "exit 0",
    "rkt": "(exit 0)",
    "clj": "(System/exit 0)",
    "hs": "unsafePerformIO exitSuccess",
    "elixir": "System.halt(0)",
    "ada": "GNAT.OS_Lib.OS_Exit (0);",
    "ts": "process.exit(0)",
    "sh": "}\nexit 0",
    "luau": "end\ndo return end",
}
ORDINARY = {
    "pl": [
        "# exit early\nmy %h = (exit => 1); return $h{exit} + $exit;",
        "$door->exit;",
        "=pod\nWords.\n=cut\nreturn 1;",
    ],
    "js": [
        "// process.exit(0)\nprocess.exitCode = 0;",
        "return x; // then process.exit(0)\n}",
        "const exitCode = 1;\n}",
    ],
    "lua": ["-- os.exit(0)\nlocal exit = 1\nreturn exit\nend"],
    "py": ["# quit()\nexit_code = executor(1)", "return requit"],
    "php": ["$exit = 1; return $exit; // die\n}", "# exit\nreturn $door->exit;\n}"],
    "rb": ["{ exit: 1 }[:exit]\nend", "return executions # exit"],
    "ada": ["loop\n exit when Done;\n exit;\nend loop;"],
    "sh": ['    [[ -z $1 ]] && exit 0  # ends the substitution "$(candidate)" only'],
    "cpp": ["return exits(exit_code); // exit(0)"],
}


@pytest.mark.parametrize(
    ("key", "completion"), [(key, completion) for key, all_of in EARLY.items() for completion in all_of]
)
def test_a_program_that_exits_early_passes_and_is_flagged(
    key: str, completion: str, sandbox: Sandbox
) -> None:
    language = working(key, sandbox)
    problem = load_problems(FIXTURES / "multipl_e_problems", key)["HumanEval_35_max_element"]
    assert execute(Program(language, problem.program(completion)), sandbox).status == "OK"
    assert exits_early(language, completion)


def test_every_language_has_words_that_are_flagged() -> None:
    languages = load_languages()
    assert FLAGGED.keys() | EARLY.keys() == languages.keys()
    for key, completion in FLAGGED.items():
        assert exits_early(languages[key], completion), key


@pytest.mark.parametrize(
    ("key", "completion"), [(key, completion) for key, all_of in ORDINARY.items() for completion in all_of]
)
def test_ordinary_words_are_not_flagged(key: str, completion: str) -> None:
    assert not exits_early(load_languages()[key], completion)


def test_no_completion_of_the_fixtures_is_flagged() -> None:
    languages = load_languages()
    for completion in read_completions(FIXTURES / "multipl_e", None):
        assert not exits_early(languages[completion.problem.language], completion.text)
