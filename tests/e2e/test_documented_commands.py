"""Every command of README and docs is run here or by another test, or is listed with the reason why not."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copytree, rmtree, which
from typing import Any

import pytest
import yaml

from tests.documents import ROOT, all_commands, blocks, commands, normalised
from tests.e2e.conftest import launch_environment, save_tiny_checkpoint
from tests.forked import python

LIST = yaml.safe_load((Path(__file__).parent / "documented_commands.yaml").read_text(encoding="utf-8"))
TASKS = ("lua", "perl", "ruby")
PROMPTS = ROOT / "tests" / "fixtures" / "multipl_e_problems"
PYTHON_BLOCKS = {
    "README.md": "tests/e2e/test_documented_commands.py",
    "docs/figures.md": "tests/e2e/test_answers.py",
    "docs/routed.md": "tests/unit/evaluation/generation/test_routed_document.py",
    "docs/routed_export.md": "tests/e2e/test_routed.py",
    "docs/serving.md": "tests/e2e/test_documented_commands.py",
    "docs/embeddings.md": "tests/e2e/test_sentence_transformers.py",
    "docs/python.md": "tests/e2e/test_python.py",
    "docs/tutorial.md": "tests/e2e/test_tutorial.py",
}
"""Document with Python blocks -> the module of tests that runs them."""


@dataclass(frozen=True)
class Run:
    """An entry of `runs`."""

    command: str
    needs: list[str] = field(default_factory=list)
    replace: dict[str, str] = field(default_factory=dict)
    exit: int = 0
    quick: bool = False
    programs: bool = False

    @property
    def text(self) -> str:
        """The command with its placeholders replaced."""
        text = self.command.replace("FOLDER", "prompts")
        for word, replacement in self.replace.items():
            text = re.sub(rf"\b{word}\b", replacement, text)
        return text


RUNS = [Run(**{**entry, "command": normalised(entry["command"])}) for entry in LIST["runs"]]


def marked(run: Run) -> Any:
    """A parameter of a test; all but the quick commands are left to `make test-full`."""
    return pytest.param(run, id=run.command, marks=() if run.quick else pytest.mark.full)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone, with a tiny model, tiny data and a tiny recipe `quickstart`."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("eval", "launch", "train.py"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "assets" / "models").mkdir(parents=True)
    for script in (ROOT / "assets").iterdir():
        if script.name not in ("models", "code", "code_local"):
            (folder / "assets" / script.name).symlink_to(script)
    model = save_tiny_checkpoint(folder / "assets" / "models" / "smollm2-135m")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**settings, "max_position_embeddings": 1024}))
    write_data(folder)
    write_recipe(folder)
    (folder / "prompts").symlink_to(PROMPTS)
    return folder


def write_data(folder: Path) -> None:
    """The shipped corpora, shortened; files and a folder for `init`; completions for `execute`."""
    code = folder / "assets" / "code"
    code.mkdir()
    (folder / "assets" / "code_local").mkdir()
    for task in TASKS:
        for split, rows in (("train", 40), ("validation", 6)):
            lines = (
                (ROOT / "assets" / "code" / f"{task}.{split}.jsonl").read_text(encoding="utf-8").splitlines()
            )
            short = sorted(lines, key=len)[:rows]
            (code / f"{task}.{split}.jsonl").write_text("\n".join(short) + "\n", encoding="utf-8")
    for task in ("lua", "ruby"):
        (folder / f"{task}.jsonl").write_bytes((code / f"{task}.train.jsonl").read_bytes())
    (folder / "assets" / "code_local" / "ruby.train.jsonl").write_bytes(
        (code / "ruby.train.jsonl").read_bytes()
    )
    (folder / "data").mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(40)]
    (folder / "data" / "support.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chats = []
    for row in rows:
        turns = (("user", row["question"]), ("assistant", row["answer"]))
        chats.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    (folder / "data" / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (folder / "src").mkdir()
    for n in range(30):
        (folder / "src" / f"module_{n}.py").write_text(f"def add_{n}(x):\n    return x + {n}\n")
    samples = [
        {"language": "lua", "name": name, "completion": "    return nil\nend", "sample": sample}
        for name in problem_names("lua")
        for sample in range(10)
    ]
    (folder / "completions.jsonl").write_text("\n".join(map(json.dumps, samples)))


def problem_names(language: str) -> list[str]:
    """The problems of the fixture in a language."""
    lines = (PROMPTS / f"humaneval-{language}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["name"] for line in lines if line.strip()]


def write_recipe(folder: Path) -> None:
    """The recipe `quickstart` with fewer and smaller steps, without programming problems."""
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    sizes = {"steps": 8, "tokens_per_step": 9 * 64, "tokens_per_microbatch": 9 * 64, "max_length": 64}
    recipe["training"] = {**recipe["training"], **sizes}
    evaluation = {
        "interval": 4,
        "problems": [],
        "max_new_tokens": 4,
        "bootstrap_samples": 100,
        "num_samples": 1,
    }
    recipe["evaluation"] = {**recipe["evaluation"], **evaluation}
    recipe["task_defaults"] = {"max_validation_examples": 4}
    recipe["num_threads"] = 1
    (folder / "recipes").mkdir()
    (folder / "recipes" / "quickstart.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


@pytest.fixture(scope="module")
def finished(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the tiny recipe, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "quickstart"
    done = execute(f"flora-train train recipe=quickstart output_dir={folder}", workspace)
    assert done.returncode == 0, done.stderr
    return folder


def execute(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one command line in a folder.

    Python programs are forked from a process that has loaded torch, and so is the script of `accelerate
    launch`; the launcher itself runs below launch/supervise.sh, and in test_launch.py.
    """
    environment = launch_environment(folder.parent / "cache")
    words = shlex.split(command)
    if words[0] == "flora-train":
        return python("-m", "flora_train", *words[1:], environment=environment, folder=folder)
    if "accelerate launch" in command and not command.startswith("launch/"):
        processes = 2 if "cpu_2proc" in command else 1
        script = next(number for number, word in enumerate(words) if word.endswith(".py"))
        return python(*words[script:], environment=environment, folder=folder, processes=processes)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shell = {**environment, "PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env=shell, capture_output=True, text=True, timeout=600
    )


def prepare(run: Run, folder: Path, finished: Path) -> None:
    """Copies of the finished run where the command needs them, and nothing where it writes a run anew."""
    (folder / "outputs").mkdir(exist_ok=True)
    for name in run.needs:
        if not (folder / name).exists():
            copytree(finished, folder / name)
    if "some/peft-adapter" in run.command and not (folder / "some").exists():
        copytree(finished / "adapters" / "lua-lora", folder / "some" / "peft-adapter")
    if re.search(r"(flora-train train|train\.py) ", run.text) and "resume=true" not in run.text:
        target = re.search(r"output_dir=(\S+)", run.text)
        own_data = "outputs/lua" if "mine.yaml" in run.text else "outputs/quickstart"
        rmtree(folder / (target[1] if target else own_data), ignore_errors=True)


@pytest.mark.parametrize("run", [marked(run) for run in RUNS])
def test_command_runs_as_it_stands(run: Run, workspace: Path, finished: Path) -> None:
    if run.programs and which("bwrap") is None:
        pytest.skip("programs are executed in bubblewrap: eval/install_toolchains.sh lua pl")
    prepare(run, workspace, finished)
    if "mine.yaml" in run.command and not run.command.startswith("flora-train init"):
        ensure_recipe_of_own_data(workspace)
    if "--out mine.yaml" in run.command:
        (workspace / "mine.yaml").unlink(missing_ok=True)
    done = execute(run.text, workspace)
    assert done.returncode == run.exit, f"{run.text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def ensure_recipe_of_own_data(folder: Path) -> None:
    """mine.yaml, as the command before it in the documents writes it."""
    if not (folder / "mine.yaml").exists():
        command = "flora-train init lua.jsonl ruby.jsonl --model assets/models/smollm2-135m --out mine.yaml"
        assert execute(command, folder).returncode == 0


@pytest.mark.full
@pytest.mark.parametrize("document", ["README.md", "docs/serving.md"])
def test_python_of_a_document_runs_as_it_stands(document: str, workspace: Path, finished: Path) -> None:
    if not (workspace / "outputs" / "quickstart").exists():
        copytree(finished, workspace / "outputs" / "quickstart")
    rmtree(workspace / "outputs" / "ten_lines", ignore_errors=True)
    for block in blocks(ROOT / document, "python"):
        done = python(
            "-c", block.text, environment=launch_environment(workspace.parent / "cache"), folder=workspace
        )
        assert done.returncode == 0, done.stderr
        assert "lua" in done.stdout


def test_every_python_block_is_run_by_a_test() -> None:
    found = {str(document.relative_to(ROOT)) for document in documents_with("python")}
    assert found == set(PYTHON_BLOCKS)
    for document, module in PYTHON_BLOCKS.items():
        assert Path(document).stem in (ROOT / module).read_text(encoding="utf-8")


def documents_with(language: str) -> list[Path]:
    """Documents that contain a block in a language."""
    from tests.documents import DOCUMENTS

    return [document for document in DOCUMENTS if blocks(document, language)]


def not_run() -> list[str]:
    """The commands that no test runs."""
    return [normalised(command) for group in LIST["not_run"].values() for command in group]


def test_every_command_is_run_or_listed_with_a_reason() -> None:
    listed = [run.command for run in RUNS]
    listed += [normalised(entry["command"]) for entry in LIST["tested"]]
    listed += [*not_run(), *LIST["names"]]
    assert len(listed) == len(set(listed)), "a command is listed twice"
    documented = all_commands()
    missing = {
        command: [path.name for path in documented[command]] for command in documented.keys() - set(listed)
    }
    assert not missing, "add these to documented_commands.yaml"
    assert set(listed) <= documented.keys(), f"in no document: {set(listed) - documented.keys()}"


def test_reasons_are_sentences_of_their_own() -> None:
    for reason, group in LIST["not_run"].items():
        assert len(reason.split()) >= 2
        assert group


@pytest.mark.parametrize("entry", LIST["tested"], ids=lambda entry: entry["command"])
def test_command_is_in_the_test_that_is_named(entry: dict[str, Any]) -> None:
    command = normalised(entry["command"])
    if entry.get("tutorial"):
        assert command in commands(ROOT / "docs" / "tutorial.md")
        assert "test_the_tutorial_from_top_to_bottom" in (ROOT / "tests/e2e/test_tutorial.py").read_text()
        return
    path, _, name = entry["test"].partition("::")
    text = (ROOT / path).read_text(encoding="utf-8")
    if name:
        match = re.search(rf"^def {name}\(.*?(?=^(?:def|@|class) |\Z)", text, re.DOTALL | re.MULTILINE)
        assert match, f"no test {name} in {path}"
        text = match[0]
    assert entry["contains"] in text


def test_commands_that_were_not_run_are_not_called_tested() -> None:
    for command in not_run():
        for document in all_commands()[command]:
            lines = document.read_text(encoding="utf-8").splitlines()
            calls = [line for line in lines if command in normalised(line) and re.search(r"\btested\b", line)]
            assert not [line for line in calls if not re.search(r"\bnot tested\b", line)], command
