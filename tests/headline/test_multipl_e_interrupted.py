"""recipe=multipl_e interrupted in every stage, by one process or two, offline, and where it cannot run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT
from tests.headline.conftest import add_repositories
from tests.headline.runs import (
    CODE_SIZES,
    Finish,
    Finished,
    Reached,
    command,
    done,
    figures,
    hub_environment,
    interrupted,
    launched,
    lines,
    uninterrupted,
)
from tests.headline.test_multipl_e import finished_run
from tests.hub_server import Hub, serve

SIZES = (*CODE_SIZES, "training.steps=6", "training.save_every=2")


@pytest.fixture(scope="module")
def finish(code_material: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finish]:
    """`finish(2)`: a run of two processes that nobody interrupted."""

    def start(processes: int) -> AbstractContextManager[Finished]:
        words = [*SIZES, f"num_processes={processes}"]
        return finished_run(code_material, tmp_path_factory.mktemp("whole"), *words, processes=processes)

    with uninterrupted(start) as finish:
        yield finish


def stages(run: Path, home: Path) -> dict[str, Reached]:
    """Stage -> whether it has been reached, in the order of a run."""
    suite = run / "eval" / "multipl-e"

    def has_files(folder: Path, pattern: str, count: int = 1) -> bool:
        return len(list(folder.glob(pattern))) >= count

    return {
        "loading": lambda: has_files(home / "cache", "**/tokens/*.tokens", 3),
        "training": lambda: has_files(run, "checkpoints/step-*"),
        "evaluating held-out examples": lambda: (run / "eval" / "heldout").exists(),
        "exporting": lambda: has_files(run, "adapters/*/adapter_model.safetensors", 3),
        "generating": lambda: lines("completions-*.jsonl", suite) >= 10,
        "executing": lambda: lines("verdicts.jsonl", suite) >= 5,
        "writing the report": lambda: (suite / "scores.json").exists(),
    }


def check_same(run: Path, whole: Path) -> None:
    """Everything that both runs found is the same, and nothing is left of interrupted writes."""
    theirs, ours = figures(whole), figures(run)
    for part, expected in theirs.items():
        assert ours[part] == expected, part
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("step-*"))


@pytest.mark.headline
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_run_interrupted_in_every_stage_ends_with_the_same_figures(
    code_hub: Hub, finish: Finish, tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    whole, run, home = finish(processes).run, tmp_path / "run", tmp_path / "home"
    environment = hub_environment(code_hub.url, home)
    words = launched(
        "multipl_e", run, *SIZES, f"num_processes={processes}", "resume=true", processes=processes
    )
    for stage, reached in stages(run, home).items():
        status, errors = interrupted(
            words, environment, when=reached, number=number, log=tmp_path / "errors.txt"
        )
        assert status != 0, stage
        assert f'File "{ROOT}/flora_train/' not in errors, f"{stage}: {errors}"
    ended = done(words, environment)
    assert ended.returncode == 0, ended.stderr
    check_same(run, whole)


@pytest.mark.headline
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_interrupted_push_is_finished_by_another(
    finish: Finish, tmp_path: Path, number: signal.Signals
) -> None:
    whole = finish(1)
    repository = f"me/interrupted-{number.name.lower()}"
    words = command("push", str(whole.run), "--repo", repository)
    sent = len(whole.hub.lfs)
    requests = len(whole.hub.asked)

    def uploads() -> int:
        return sum("/lfs/" in path or "/preupload/" in path for _, path in whole.hub.asked[requests:])

    if sent:  # the hub has the files of an earlier push, and asks for none
        whole.hub.lfs.clear()
    interrupted(
        words, whole.environment, when=lambda: uploads() >= 3, number=number, log=tmp_path / "errors.txt"
    )
    assert not whole.hub.repos[repository].commits
    again = done(words, whole.environment)
    assert again.returncode == 0, again.stderr
    files = whole.hub.repos[repository].files
    for folder in (whole.run / "adapters").iterdir():
        weights = folder / "adapter_model.safetensors"
        assert files[f"{folder.name}/adapter_model.safetensors"] == weights.read_bytes()


@pytest.mark.headline
def test_two_processes_find_what_one_finds(finish: Finish) -> None:
    one, two = figures(finish(1).run), figures(finish(2).run)
    assert one["verdicts"].keys() == two["verdicts"].keys()

    def losses(found: dict[str, Any]) -> list[float]:
        rows = [row for result in found["results"] for row in (result["base"], *result["contenders"])]
        return [row["bits_per_byte"]["value"] for row in rows]

    assert losses(two) == pytest.approx(losses(one), rel=1e-3)


@pytest.mark.headline
@pytest.mark.parametrize("processes", [1, 2])
def test_the_cache_of_a_first_run_is_enough_without_the_hub(
    code_material: Path, tmp_path: Path, processes: int
) -> None:
    words = [*SIZES, f"num_processes={processes}"]
    with serve() as hub:
        add_repositories(hub, code_material)
        environment = hub_environment(hub.url, tmp_path / "home")
        first = done(launched("multipl_e", tmp_path / "online", *words, processes=processes), environment)
        assert first.returncode == 0, first.stderr
    offline = hub_environment(None, tmp_path / "home")
    second = done(launched("multipl_e", tmp_path / "offline", *words, processes=processes), offline)
    assert second.returncode == 0, second.stderr
    check_same(tmp_path / "offline", tmp_path / "online")


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_quantization_without_a_gpu_is_refused_before_anything_is_downloaded(
    code_hub: Hub, tmp_path: Path, processes: int
) -> None:
    environment = hub_environment(code_hub.url, tmp_path / "home")
    words = [*SIZES, "model.quantization=8bit"]
    refused = done(launched("multipl_e", tmp_path / "run", *words, processes=processes), environment)
    assert refused.returncode != 0
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert errors[0].startswith("error: model.quantization = '8bit': needs a CUDA GPU")
    assert f'File "{ROOT}/flora_train/' not in refused.stderr
    downloads = [path for method, path in code_hub.asked if method == "GET" and "/resolve" in path]
    assert not downloads
    assert not (tmp_path / "run").exists()
