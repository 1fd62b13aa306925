"""What is prepared before the first step grows with the number of adapters and tasks, not with its square."""

from __future__ import annotations

import time

import numpy as np
import pytest

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.load import validate
from flora_train.config.schema import RunConfig
from flora_train.data.task import Task, _learners
from flora_train.data.token_split import SplitCounts, TokenSplit, spans_after
from flora_train.training.step_plan import make_mixture
from tests.conftest import spec

MANY = 10_000


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return validate(
        {
            "name": "many",
            "model": {"path": "unused"},
            "tasks": {f"t{i}": {"train": "unused.jsonl"} for i in range(MANY)},
            "adapters": {f"a{i}": {"method": "ia3", "lr": 1, "tasks": [f"t{i}"]} for i in range(MANY)},
            "training": {"steps": 20, "tokens_per_step": 64, "max_length": 8},
        }
    )


def test_mixture_of_many_tasks_is_made_and_drawn_in_linear_time(config: RunConfig) -> None:
    split = TokenSplit(
        tokens=np.zeros(32, dtype=np.int32),
        offsets=np.arange(0, 33, 8),
        **spans_after(np.zeros(4), np.full(4, 8)),
        label_bytes=np.full(4, 8),
        pack_offsets=np.arange(5),
        counts=SplitCounts(rows=4, examples=4, tokens=32),
    )
    tasks = {name: Task(name, 1.0, split, split, "") for name in config.tasks}
    specs: list[AdapterSpec] = [spec("ia3", name, f"a{i}") for i, name in enumerate(tasks)]
    started = time.process_time()
    mixture = make_mixture(tasks, specs, config)
    drawn = [draw.task for number in range(20) for draw in mixture.step(number)]
    assert time.process_time() - started < 4  # with the square of the number: 20
    assert len(set(drawn)) == len(drawn) == 160


def test_learners_of_many_tasks_are_counted_in_linear_time(config: RunConfig) -> None:
    started = time.process_time()
    assert set(_learners(config).values()) == {1}
    assert time.process_time() - started < 1
