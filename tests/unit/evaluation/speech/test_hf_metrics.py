"""Metrics of the evaluate library, offline and with two processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flora_train.config.errors import UserError
from flora_train.evaluation.speech.hf_metrics import CharacterErrorRate, WordErrorRate
from tests.forked import python

SCRIPT = """
import os
from flora_train.evaluation.speech.hf_metrics import WordErrorRate
rank = int(os.environ["RANK"])
metric = WordErrorRate(normalizer="letters", num_process=2, process_id=rank, experiment_id="test", \
                       cache_dir=os.environ["FOLDER"])
said = [["One fish.", "two fish"], ["red fish", "blue fish!"]][rank]
heard = [["one fish", "two dish"], ["red", "blue fish fish"]][rank]
print(metric.compute(predictions=heard, references=said))
"""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_metric_returns_rate_counts_and_normaliser(tmp_path: Path) -> None:
    metric = WordErrorRate(normalizer="letters", cache_dir=str(tmp_path))
    found = metric.compute(predictions=["hello word"], references=["Hello, world!"])
    assert found == {"wer": 0.5, "S": 1, "D": 0, "I": 0, "N": 2, "n": 1, "normalizer": "letters-1"}
    metric = CharacterErrorRate(cache_dir=str(tmp_path))
    metric.add_batch(predictions=["abd"], references=["abc"])
    metric.add(prediction="x", reference="x")
    assert metric.compute() == {"cer": 0.25, "S": 1, "D": 0, "I": 0, "N": 4, "n": 2, "normalizer": "none"}


def test_two_processes_make_one_corpus(tmp_path: Path) -> None:
    done = python("-c", SCRIPT, environment={**os.environ, "FOLDER": str(tmp_path)}, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "{'wer': 0.375, 'S': 1, 'D': 1, 'I': 1, 'N': 8, 'n': 4, 'normalizer': 'letters-1'}",
        "None",
    ]


def test_an_unknown_normaliser_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"normalizer = 'letter': must be one of arabic, letters, none or unspaced"
    ):
        WordErrorRate(normalizer="letter", cache_dir=str(tmp_path))
