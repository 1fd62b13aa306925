"""A run's base and data are verified: a difference is refused, or allowed by a flag and noted in results."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from shutil import copytree

import pytest
import yaml
from safetensors.torch import load_file, save_file

from flora_train.config.errors import Problem
from tests.e2e.conftest import Launch
from tests.forked import python

SOLVE = [
    "solve",
    "outputs/tiny",
    "evaluation.problems=trivial",
    "evaluation.num_samples=1",
    "evaluation.sandbox=none",
]
BASE = "holds other weights than the run was trained on (SHA-256 "
NAME = "letters-lora"


@pytest.fixture(scope="module")
def trained(recipe: Path, launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data and a run (outputs/tiny) of their own."""
    place = tmp_path_factory.mktemp("identity")
    content = yaml.safe_load(recipe.read_text())
    copytree(content["model"]["path"], place / "base", ignore=lambda *_: [".flora_train_sha256.json"])
    content["model"]["path"] = "base"
    for name, task in content["tasks"].items():
        (place / f"{name}.jsonl").write_text(Path(task["train"]).read_text())
        task["train"] = f"{name}.jsonl"
    content["tasks"]["letters"]["language"] = "sh"
    (place / "trivial").mkdir()
    problem = {"name": "solved", "prompt": "echo a #", "tests": "true", "stop_tokens": ["\n"]}
    (place / "trivial" / "humaneval-sh.jsonl").write_text(json.dumps(problem))
    (place / "tiny.yaml").write_text(yaml.safe_dump(content))
    done = python(
        "-m",
        "flora_train",
        "train",
        "recipe=tiny.yaml",
        "training.steps=3",
        "evaluation.interval=null",
        folder=place,
    )
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def place(trained: Path, tmp_path: Path) -> Path:
    return Path(copytree(trained, tmp_path / "place"))


def call(place: Path, *words: str) -> tuple[int, str]:
    done = python("-m", "flora_train", *words, folder=place)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def change_weights(place: Path) -> None:
    file = place / "base" / "model.safetensors"
    before, tensors = file.stat(), load_file(file)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, file, {"format": "pt"})
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and cp -p leave it


def add_row(place: Path) -> None:
    with (place / "letters.jsonl").open("a") as rows:
        rows.write('\n{"prompt": "a", "completion": "bcd"}')


def test_the_hash_of_the_base_is_kept_beside_it_and_read_again_when_a_file_changes(place: Path) -> None:
    status, said = call(place, "evaluate", "outputs/tiny")
    assert status == 0, said
    kept = json.loads((place / "base" / ".flora_train_sha256.json").read_text())["model.safetensors"]
    facts = json.loads((place / "outputs/tiny/run.json").read_text())
    assert facts["base"]["weights"] == kept["sha256"]
    assert set(facts["data"]) == {"letters", "digits"}


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "outputs/tiny"],
        ["export", "outputs/tiny", NAME, "--as", "merged"],
        ["export", "outputs/tiny", NAME, "--as", "lora-svd"],
        ["export", "outputs/tiny", NAME],
        ["push", "outputs/tiny", "--repo", "me/tiny", "--dry-run"],
        [*SOLVE, "--out=outputs/solved"],
    ],
    ids=" ".join,
)
def test_another_base_is_refused_and_nothing_is_written(place: Path, words: list[str]) -> None:
    change_weights(place)
    before = {path: path.read_bytes() for path in (place / "outputs").rglob("*") if path.is_file()}
    status, said = call(place, *words)
    assert status == 2
    assert f"model.path = 'base': {BASE}" in said
    assert "--allow-different-base" in said
    assert {path: path.read_bytes() for path in (place / "outputs").rglob("*") if path.is_file()} == before


def test_another_base_that_is_allowed_stands_in_every_result(place: Path) -> None:
    change_weights(place)
    allow = "--allow-different-base"
    run = place / "outputs" / "tiny"
    for words in (["evaluate", "outputs/tiny"], ["export", "outputs/tiny", NAME, "--as", "merged"], SOLVE):
        status, said = call(place, *words, allow)
        assert status == 0, said
    report = json.loads((run / "eval" / "report.json").read_text())
    (difference,) = report["facts"]["origin_differences"]
    assert BASE in difference
    assert difference in report["not_measured"]
    assert "holds other weights than the run was trained on" in (run / "eval" / "report.html").read_text()
    assert BASE in (run / "adapters" / NAME / "README.md").read_text()
    assert json.loads((run / "merged" / NAME / "flora_train.json").read_text())["differences"] == [difference]
    allowed = json.loads((run / "run.json").read_text())["allowed"]
    assert [entry["command"] for entry in allowed] == ["evaluate", "export --as merged", "solve"]
    assert report["code"][0]["origin_differences"] == [difference]


def test_changed_rows_are_refused_by_task_and_difference_unless_allowed(place: Path) -> None:
    add_row(place)
    for words in (["evaluate", "outputs/tiny"], ["export", "outputs/tiny", NAME, "--as", "lora-svd"]):
        status, said = call(place, *words)
        assert status == 2
        assert (
            "tasks.letters: gives other examples than the run was trained on (57 training rows then, 58 now)"
            in said
        )
        assert "held-out examples may have been trained on" in said
        assert "tasks.digits" not in said
    status, said = call(place, "evaluate", "outputs/tiny", "--allow-different-data")
    assert status == 0, said
    report = json.loads((place / "outputs/tiny/eval/report.json").read_text())
    assert "tasks.letters: gives other examples" in report["facts"]["origin_differences"][0]


def test_a_report_needs_neither_base_nor_data(place: Path) -> None:
    for path in (*place.glob("base/*"), *place.glob("*.jsonl")):
        path.unlink()
    status, said = call(place, "report", "outputs/tiny")
    assert status == 0, said


def test_resumed_run_refuses_another_base_and_other_rows(place: Path) -> None:
    state = place / "outputs" / "tiny" / "run.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "finished": False}))
    words = ["train", "recipe=tiny.yaml", "training.steps=3", "evaluation.interval=null", "resume=true"]
    add_row(place)
    status, said = call(place, *words)
    assert status == 2
    assert "tasks.letters: gives other examples" in said
    change_weights(place)
    status, said = call(place, *words)
    assert status == 2
    assert f"model.path = 'base': {BASE}" in said


@pytest.mark.parametrize(
    "words",
    [
        ["export", "outputs/tiny", NAME, "--as", "merged"],
        ["evaluate", "outputs/tiny", "--allow-different-data"],
        SOLVE,
    ],
    ids=" ".join,
)
def test_another_tokenizer_is_refused(place: Path, words: list[str]) -> None:
    file = place / "base" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    status, said = call(place, *words)
    assert status == 2
    assert "model.path = 'base': holds another tokenizer than the run was trained with" in said
    assert not (place / "outputs/tiny/merged").exists()


def test_a_kept_adapter_under_another_ones_name_is_refused(place: Path) -> None:
    kept = place / "outputs/tiny/checkpoints/best"
    names = [kept / f"{task}-lora.safetensors" for task in ("letters", "digits")]
    contents = [path.read_bytes() for path in names]
    for path, content in zip(names, reversed(contents), strict=True):
        path.write_bytes(content)
    status, said = call(place, "evaluate", "outputs/tiny")
    assert status == 2
    assert "is not a whole checkpoint of digits-lora: it holds the adapter letters-lora" in said


def test_an_adapter_named_twice_is_written_once(place: Path) -> None:
    for words in (
        ["export", "outputs/tiny", NAME, NAME, "--as", "merged"],
        ["push", "outputs/tiny", NAME, NAME, "--repo", "me/x", "--dry-run"],
    ):
        status, said = call(place, *words)
        assert status == 0, said


def test_second_solve_into_one_folder_is_refused(place: Path) -> None:
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        status, said = call(place, *SOLVE, f"--out={place}")
    assert status == 2
    assert str(Problem("output_dir", str(place), "another process trains or evaluates in it")) in said
    assert not (place / "trivial" / "verdicts.jsonl").exists()


def test_a_comparison_does_not_take_the_place_of_a_runs_page(place: Path) -> None:
    page = place / "outputs/tiny/eval/report.html"
    before = page.read_bytes()
    status, said = call(place, "report", "outputs/tiny", "outputs/tiny", "--out", str(page))
    assert status == 2
    assert "is the page of one run: choose another" in said
    assert page.read_bytes() == before
