"""What a language prepares once is used for programs that it suits, changes no verdict, and may fail."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flora_train.evaluation.code.programs.execute import Program, execute
from flora_train.evaluation.code.programs.languages import Language
from flora_train.evaluation.code.programs.sandbox import Sandbox, SandboxKind, open_sandbox
from flora_train.evaluation.code.programs.toolchain_cache import ToolchainCache
from tests.unit.evaluation.code.conftest import working

HEAD = "#include<assert.h>\n#include<bits/stdc++.h>\n"
PROGRAMS = {
    "OK": HEAD + "int main() { assert(std::gcd(4, 6) == 2); }",
    "AssertionError": HEAD + "int main() { assert(std::gcd(4, 6) == 3); }",
    "SyntaxError": HEAD + "int main() { assert(gcd_of(4, 6) == 2); }",
    "Exception": HEAD + "int main() { throw 1; }",
}


@pytest.fixture(params=["bubblewrap", pytest.param("none", marks=pytest.mark.full)])
def fresh(request: pytest.FixtureRequest, sandbox: Sandbox) -> Sandbox:
    """One that has prepared nothing."""
    kind: SandboxKind = request.param
    return open_sandbox(kind)


def cpp(sandbox: Sandbox, **prepare: Any) -> Language:
    language = working("cpp", sandbox)
    assert language.prepare is not None
    return language.model_copy(update={"prepare": language.prepare.model_copy(update=prepare)})


def test_no_verdict_depends_on_a_prepared_folder(fresh: Sandbox, sandbox: Sandbox) -> None:
    for status, source in PROGRAMS.items():
        prepared = execute(Program(cpp(sandbox), source), fresh)
        plain = execute(Program(cpp(sandbox).model_copy(update={"prepare": None}), source), fresh)
        assert (prepared.status, prepared.exit, prepared.output) == (status, plain.exit, plain.output)


def test_only_programs_that_start_with_the_header_use_the_prepared_folder(
    fresh: Sandbox, sandbox: Sandbox
) -> None:
    language = cpp(sandbox, command=["sh", "-c", "echo '#define PREPARED 1' > all.h"])
    main = "\n#ifndef PREPARED\n#error not prepared\n#endif\nint main() {}"
    statuses = {
        head: execute(Program(language, head + main), fresh).status
        for head in (HEAD, "\n#include <bits/stdc++.h>", "#define NDEBUG\n" + HEAD, "#include <vector>", "")
    }
    assert list(statuses.values()) == ["OK", "OK", "SyntaxError", "SyntaxError", "SyntaxError"]


def test_programs_are_compiled_without_a_prepared_folder_if_preparing_failed(
    fresh: Sandbox, sandbox: Sandbox
) -> None:
    assert execute(Program(cpp(sandbox, command=["false"]), PROGRAMS["OK"]), fresh).status == "OK"


def test_a_program_cannot_change_a_prepared_folder(sandbox: Sandbox) -> None:
    language = cpp(sandbox, command=["sh", "-c", "echo > all.h"])
    fresh = open_sandbox("bubblewrap")
    writes = language.model_copy(
        update={"compile": ["sh", "-c", "! touch /prepared/mine && g++ main.cpp -o main"]}
    )
    assert execute(Program(writes, PROGRAMS["OK"]), fresh).status == "OK"
    folder = fresh.prepared.get("cpp", lambda folder: False)
    assert folder is not None
    assert [path.name for path in folder.iterdir()] == ["all.h"]


def test_a_prepared_folder_is_made_once_and_deleted_with_its_owner() -> None:
    folders = ToolchainCache()
    filled: list[Path] = []

    def fill(folder: Path) -> bool:
        filled.append(folder)
        return True

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(folders.get, ["a"] * 32, [fill] * 32)) == set(filled)
    assert len(filled) == 1
    assert filled[0].is_dir()
    assert folders.get("b", lambda folder: False) is None
    del folders
    gc.collect()
    assert not filled[0].exists()
