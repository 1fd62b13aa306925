"""A program sees no environment variable of the user, and no path of home, current folder or checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.code.programs import sandbox as sandbox_module
from flora_train.evaluation.code.programs import sandbox_paths as places
from flora_train.evaluation.code.programs.execute import Program, execute, preflight
from flora_train.evaluation.code.programs.sandbox import Sandbox, open_sandbox
from flora_train.evaluation.code.programs.sandbox_paths import clean_path, hidden_below, neutral_folder
from tests.unit.evaluation.code.conftest import working

CANARY = "canary-5f2c"
LOOK = """
for p in /proc/[0-9]*; do
  for f in environ cmdline maps mountinfo mounts mountstats cgroup status stat comm auxv limits; do \
    cat $p/$f; done
  ls -l $p/fd $p/cwd $p/exe $p/root $p/map_files
done 2>/dev/null | tr '\\0' '\\n'
env; pwd; pwd -P; hostname; cat /proc/sys/kernel/hostname /proc/keys /proc/key-users; ls -a / /tmp /program \
/usr /dev/shm
cat /proc/1/mem /no/such/file; ls $OLDPWD /program/..; /program/nothing
"""
PYTHON = """
import os, sys
print(sys.argv, __file__, os.getcwd(), sys.path, dict(os.environ))
print(open("/proc/1/environ", "rb").read(), os.uname())
def memory(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            try:
                mem.seek(start)
                yield mem.read(min(end - start, 1 << 24))
            except (OSError, OverflowError, ValueError):
                pass
needle = bytes(reversed(b"c2f5-yranac"))
try:
    for part in memory(1):
        at = part.find(needle)
        if at >= 0:
            print(part[max(0, at - 100) : at + 100])
except OSError as error:
    print(error)
raise ValueError("the traceback names a path")
"""
SOURCES = {
    "sh": LOOK + "false",
    "py": PYTHON,
    "lua": "for _, n in ipairs{'environ', 'cmdline', 'mountinfo', 'maps'} do for p = 1, 9 do "
    "local f = io.open('/proc/' .. p .. '/' .. n)\n"
    "if f then print((f:read('a'):gsub('%z', '\\n'))) end end end\nprint(arg[0], "
    "os.getenv('HF_TOKEN'))\nerror('where')",
    "js": "const fs = require('fs');\nfor (const n of ['environ', 'cmdline', 'mountinfo', 'maps']) "
    "for (let p = 1; p < 9; p++)\n"
    "try { console.log(fs.readFileSync(`/proc/${p}/${n}`, 'latin1')); } catch {}\n"
    "console.log(process.env, __filename, process.argv, require('os').hostname()); null.x",
}
"""Language -> a program that prints what it can read and fails, so that its last words are kept."""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, current folder and temporary folder with the canary in their names, and the canary in the
    environment."""
    home = tmp_path / CANARY
    (home / "tmp").mkdir(parents=True)
    (home / "run").mkdir()
    tmp_path.chmod(0o777)
    for name, value in {
        "HF_TOKEN": f"{CANARY}-token",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        CANARY: "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.chdir(home / "run")
    return home


@pytest.fixture
def whole_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flora_train.evaluation.code.programs.execute.TAIL", 1 << 20)


@pytest.mark.parametrize("key", SOURCES)
def test_sandbox_shows_no_variable_and_no_path_of_the_caller(
    key: str, planted: Path, whole_output: None, sandbox: Sandbox
) -> None:
    verdict = execute(Program(working(key, sandbox), SOURCES[key]), open_sandbox("bubblewrap"))
    assert verdict.status in ("Exception", "AssertionError", "SyntaxError"), verdict
    assert len(verdict.output) > 100
    for word in (CANARY, str(Path(__file__).parents[5]), str(planted)):
        assert word not in verdict.output


def test_sandbox_shows_nothing_to_what_is_prepared_or_compiled_or_to_preflight(
    planted: Path, whole_output: None, sandbox: Sandbox
) -> None:
    fresh, language = open_sandbox("bubblewrap"), working("cpp", sandbox)
    assert language.prepare is not None
    look = ["sh", "-c", "cat /proc/*/environ /proc/*/cmdline /proc/self/mountinfo > seen; echo > all.h"]
    prepare = language.prepare.model_copy(update={"command": look})
    program = Program(language.model_copy(update={"prepare": prepare}), language.passing)
    assert execute(program, fresh).status == "OK"
    folder = fresh.prepared.get("cpp", lambda empty: False)
    assert folder is not None
    seen = (folder / "seen").read_bytes()
    assert b"/usr/bin" in seen
    assert CANARY.encode() not in seen
    compiles = language.model_copy(update={"compile": ["sh", "-c", LOOK + "ls -l; exit 1"], "prepare": None})
    verdict = execute(Program(compiles, language.passing), fresh)
    assert verdict.status == "SyntaxError"
    assert "main.cpp" in verdict.output
    assert CANARY not in verdict.output
    shell = working("sh", sandbox).model_copy(
        update={"passing": LOOK + f"\n! {LOOK_FOR}", "failing": "false"}
    )
    assert preflight([shell], fresh) == {}


LOOK_FOR = f"cat /proc/1/environ /proc/1/cmdline /proc/1/mountinfo | tr '\\0' '\\n' | grep {CANARY[:-4]}"


def test_unconfined_programs_have_a_clean_environment(
    planted: Path, whole_output: None, sandbox: Sandbox
) -> None:
    unconfined = open_sandbox("none")
    for key, source in {
        "sh": "env; tr '\\0' '\\n' < /proc/self/environ; false",
        "py": "import os; print(dict(os.environ), os.path.expanduser('~')); assert 0",
        "cpp": (
            "#include <bits/stdc++.h>\nextern char **environ;\n"
            "int main() { for (char **e = environ; *e; ++e) std::cerr << *e << std::endl; assert(0); }"
        ),
    }.items():
        verdict = execute(Program(working(key, sandbox), source), unconfined)
        assert verdict.status == "AssertionError", verdict
        assert "PATH" in verdict.output
        assert "token" not in verdict.output
        assert "HF_TOKEN" not in verdict.output
        assert f"{CANARY}=1" not in verdict.output


def test_unconfined_programs_are_found_on_the_users_path_but_do_not_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "my_interpreter").write_text("#!/bin/sh\n")
    (mine / "my_interpreter").chmod(0o755)
    monkeypatch.setenv("PATH", f"/nowhere-{CANARY}:{mine}:/usr/bin:/bin")
    assert clean_path(["env", "my_interpreter", "main.x"]).split(":") == [str(mine), *places.SYSTEM_PATH]


def test_a_home_inside_a_folder_of_the_system_is_covered(
    monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a folder in /usr")
    home = Path("/usr/src") / CANARY
    home.mkdir(parents=True)
    try:
        (home / "secret").write_text("x")
        monkeypatch.setenv("HOME", str(home))
        assert hidden_below(Path("/usr")) == [Path("/usr/src")]
        program = Program(
            working("sh", sandbox), "ls -R /usr/src; cat /proc/self/mountinfo; find /usr/src; false"
        )
        verdict = execute(program, open_sandbox("bubblewrap"))
        assert CANARY not in verdict.output
        assert verdict.status == "AssertionError"
    finally:
        shutil.rmtree(home)


def test_a_bubblewrap_in_the_callers_home_is_refused(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = planted / "bwrap"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    monkeypatch.setattr(sandbox_module, "find_program", lambda name: str(own))
    with pytest.raises(UserError, match="could read the path of"):
        open_sandbox("bubblewrap")


def test_work_folders_lie_outside_home_and_temporary_folder(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not neutral_folder().is_relative_to(planted)
    monkeypatch.setenv("HOME", "/tmp")
    monkeypatch.chdir("/")
    assert neutral_folder() != Path("/tmp")
    monkeypatch.setattr(places, "NEUTRAL", (str(planted),))
    monkeypatch.setenv("HOME", str(planted))
    with pytest.raises(UserError, match="outside your home"):
        neutral_folder()


def test_execute_warns_that_none_hides_nothing(tmp_path: Path, sandbox: Sandbox) -> None:
    root = Path(__file__).parents[5]
    fixtures = root / "tests" / "fixtures" / "multipl_e"
    file = tmp_path / "lua.json"
    shutil.copy(next(fixtures.glob("lua-*.json")), file)
    working("lua", sandbox)
    done = subprocess.run(
        [sys.executable, "-m", "flora_train", "execute", str(file), "--sandbox=none"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "HF_TOKEN": CANARY},
    )
    assert done.returncode == 0, done.stderr
    assert "environment of all your processes" in done.stderr
    assert CANARY not in (tmp_path / "lua.json.verdicts.jsonl").read_text()
