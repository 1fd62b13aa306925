"""recipe=common_voice interrupted in every stage, by one process or two, and offline."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.forked import ROOT
from tests.headline.runs import (
    Finish,
    Finished,
    Reached,
    done,
    figures,
    hub_environment,
    interrupted,
    launched,
    lines,
    uninterrupted,
)
from tests.headline.speech_material import SHORT, SPEECH_SIZES, built_speech, release_of
from tests.headline.test_common_voice import finished_run, needs_espeak, speech_hub

SIZES = (*SPEECH_SIZES, "training.steps=4", "training.save_every=2")
pytestmark = [pytest.mark.headline, needs_espeak]


@pytest.fixture(scope="module")
def material() -> Path:
    return built_speech(SHORT)


@pytest.fixture(scope="module")
def finish(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finish]:
    """`finish(2)`: a run of two processes that nobody interrupted."""

    def start(processes: int) -> AbstractContextManager[Finished]:
        words = [*SIZES, f"num_processes={processes}"]
        return finished_run(material, tmp_path_factory.mktemp("whole"), *words, processes=processes)

    with uninterrupted(start) as finish:
        yield finish


def stages(run: Path, home: Path) -> dict[str, Reached]:
    """Stage -> whether it has been reached, in the order of a run."""

    def has_files(folder: Path, pattern: str, count: int = 1) -> bool:
        return len(list(folder.glob(pattern))) >= count

    return {
        "reading clips": lambda: has_files(home / "cache", "**/tokens/*.tokens", 3),
        "training": lambda: has_files(run, "checkpoints/step-*"),
        "evaluating held-out examples": lambda: (run / "eval" / "heldout").exists(),
        "exporting": lambda: has_files(run, "adapters/*/adapter_model.safetensors", 3),
        "transcribing": lambda: lines("transcripts-*.jsonl", run / "eval" / "speech") >= 10,
        "writing the report": lambda: (run / "eval" / "speech" / "error_rates.json").exists(),
    }


def check_same(run: Path, whole: Path) -> None:
    """Everything that both runs found is the same, and nothing is left of interrupted writes."""
    theirs, ours = figures(whole), figures(run)
    for found in (theirs, ours):
        for language in found["speech"]["languages"]:
            for utterance in language["utterances"]:
                # the encoder of ogg files gives each a random serial number
                assert utterance.pop("audio").startswith("data:audio/ogg;base64,")
    for part, expected in theirs.items():
        assert ours[part] == expected, part
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("step-*"))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_run_interrupted_in_every_stage_ends_with_the_same_figures(
    material: Path, finish: Finish, tmp_path: Path, processes: int, number: signal.Signals
) -> None:
    whole, run, home = finish(processes).run, tmp_path / "run", tmp_path / "home"
    data = f"tasks.ar.train.common_voice={release_of(material)}"
    words = [data, *SIZES, f"num_processes={processes}", "resume=true"]
    with speech_hub(material) as hub:
        environment = hub_environment(hub.url, home)
        started = launched("common_voice", run, *words, processes=processes)
        for stage, reached in stages(run, home).items():
            status, errors = interrupted(
                started, environment, when=reached, number=number, log=tmp_path / "errors.txt"
            )
            assert status != 0, stage
            assert f'File "{ROOT}/flora_train/' not in errors, f"{stage}: {errors}"
        ended = done(started, environment)
    assert ended.returncode == 0, ended.stderr
    check_same(run, whole)


def test_two_processes_find_what_one_finds(finish: Finish) -> None:
    one, two = figures(finish(1).run), figures(finish(2).run)

    def losses(found: dict[str, Any]) -> list[float]:
        rows = [row for result in found["results"] for row in (result["base"], *result["contenders"])]
        return [row["bits_per_byte"]["value"] for row in rows]

    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    for mine, theirs in zip(one["speech"]["languages"], two["speech"]["languages"], strict=True):
        assert mine["clips"] == theirs["clips"]
        assert mine["contenders"][0]["wer"]["units"] == theirs["contenders"][0]["wer"]["units"]


def test_the_cache_of_a_first_run_is_enough_without_the_hub(material: Path, tmp_path: Path) -> None:
    """From a folder of archives: they are unpacked once, and give the figures of the release's folder."""
    data = f"tasks.ar.train.common_voice={material / 'archives'}"
    with speech_hub(material) as hub:
        environment = hub_environment(hub.url, tmp_path / "home")
        first = done(launched("common_voice", tmp_path / "online", data, *SIZES), environment)
        assert first.returncode == 0, first.stderr
    assert first.stderr.count("unpacking ") == 6
    offline = hub_environment(None, tmp_path / "home")
    second = done(launched("common_voice", tmp_path / "offline", data, *SIZES), offline)
    assert second.returncode == 0, second.stderr
    assert "unpacking " not in second.stderr
    check_same(tmp_path / "offline", tmp_path / "online")
