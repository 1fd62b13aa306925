"""A run trains without Python's Linux-only parts, as on Windows and macOS."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import launch_environment
from tests.forked import python

WITHOUT = """
import os, pathlib, signal, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "resource"):
            raise ImportError(f"No module named {name!r}")
sys.meta_path.insert(0, Missing())
for name in [name for name in sys.modules if name in ("fcntl", "resource") or name.startswith("flora_train")]:
    del sys.modules[name]
for module, name in ((os, "sched_getaffinity"), (os, "posix_fallocate"), (os, "sysconf"), \
                     (signal, "pthread_sigmask")):
    delattr(module, name)
read_text, is_dir = pathlib.Path.read_text, pathlib.Path.is_dir
def no_proc(path, *args, **kwargs):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(path)
    return read_text(path, *args, **kwargs)
pathlib.Path.read_text = no_proc
pathlib.Path.is_dir = lambda path: not str(path).startswith("/proc") and is_dir(path)
"""
"""What other packages have loaded by then is theirs: on those systems they have files of their own for
them."""


def run(*words: str, cache: Path) -> subprocess.CompletedProcess[str]:
    program = WITHOUT + f"from flora_train.__main__ import start; start({list(words)!r})"
    return python("-c", program, environment=launch_environment(cache))


@pytest.fixture(scope="module")
def trained(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("elsewhere")
    done = run("train", f"recipe={recipe}", f"output_dir={folder / 'run'}", "training.steps=2", cache=folder)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_a_run_trains_and_reports_without_linux(trained: Path) -> None:
    assert json.loads((trained / "run.json").read_text())["finished"]
    assert (trained / "eval" / "report.html").exists()


def test_every_module_is_imported_without_linux(tmp_path: Path) -> None:
    program = WITHOUT + (
        "import importlib, pkgutil, flora_train\n"
        # what is registered once in a process
        "skipped = ('_triton', 'shipped', '__main__', 'peft_plugin')\n"
        "names = [m.name for m in pkgutil.walk_packages(flora_train.__path__, 'flora_train.') if not "
        "any(s in m.name for s in skipped)]\n"
        "for name in names:\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except ModuleNotFoundError as error:\n"
        # these run in the environments of vLLM, lm_eval and Flower alone
        "        folders = {'vllm': 'flora_train.serving.', 'lm_eval': 'flora_train.evaluation.harness.',\n"
        "                   'flwr': 'flora_train.federated.flower.'}\n"
        "        if error.name not in folders or not name.startswith(folders[error.name]):\n"
        "            raise\n"
        "print(len(names))"
    )
    done = python("-c", program, environment=launch_environment(tmp_path))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 100


def test_executing_programs_says_use_wsl(trained: Path, tmp_path: Path) -> None:
    problem = {"language": "py", "name": "p", "prompt": "x = 1", "tests": "", "stop_tokens": []}
    (tmp_path / "completions").mkdir()
    (tmp_path / "completions" / "p.json").write_text(json.dumps({**problem, "completions": ["y"]}))
    done = run("execute", str(tmp_path / "completions"), cache=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "on Windows use WSL" in done.stderr
    assert "Traceback" not in done.stderr


def test_paging_to_files_says_that_it_needs_linux(recipe: Path, tmp_path: Path) -> None:
    words = [
        "adapters.device_slots=4",
        "mixture.strategy=fair",
        "mixture.active_tasks=1",
        "mixture.turn_steps=3",
    ]
    done = run(
        "train",
        f"recipe={recipe}",
        f"output_dir={tmp_path / 'run'}",
        "paging.host=disk",
        *words,
        cache=tmp_path,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "error: paging.host = 'disk': is supported on Linux only: use memory" in done.stderr
