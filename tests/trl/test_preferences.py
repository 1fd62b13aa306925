"""DPO, IPO, ORPO and KTO, all in the same batches, against a run of TRL's own trainer for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from flora_train.config.preference_schema import Objective
from flora_train.data.preferences.preference import Preference
from tests.conftest import spec
from tests.trl.environment import run_script
from tests.trl.preference_runs import LIMIT, OurRun, RandomRows, random_rows, save_base, train_ours

STEPS, BATCH = 6, 4
TOLERANCE = 1e-5
LEARNING_RATES = {"adamw": 2e-3, "sgd": 0.2}
EPSILON = 1e-6
"""Of AdamW. With the default of 1e-8, numbers whose gradient is a rounding error move at random."""
OPTIMIZERS = {"adamw": "adamw_torch", "sgd": "sgd"}


@dataclass(frozen=True)
class Case:
    """A task, and how TRL is told the same."""

    preference: Preference
    options: dict[str, Any]
    """Of TRL's configuration."""
    rows: RandomRows


def case(
    objective: Objective, seed: int, options: dict[str, Any], *, longest_prompt: int = 6, **settings: Any
) -> Case:
    rows = random_rows(seed, STEPS * BATCH, labelled=objective == "kto", longest_prompt=longest_prompt)
    return Case(Preference(objective, **settings), {"max_length": LIMIT, **options}, rows)


CASES = {
    "dpo": case("dpo", 1, {"loss_type": ["sigmoid"]}, beta=0.3),
    "dpo_sft": case(
        "dpo", 2, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.4]}, beta=0.1, sft_weight=0.4
    ),
    "ipo": case("ipo", 3, {"loss_type": ["ipo"]}, beta=0.5),
    # TRL's next-token loss covers the prompt, too: of one token, it has nothing to predict
    "orpo": case("orpo", 4, {}, longest_prompt=1, beta=0.4, sft_weight=1.0),
    "kto": case(
        "kto",
        5,
        {"desirable_weight": 1.5, "undesirable_weight": 0.75},
        beta=0.4,
        desirable_weight=1.5,
        undesirable_weight=0.75,
    ),
}


@dataclass(frozen=True)
class Compared:
    """Our run of all cases, and TRL's runs of each."""

    ours: OurRun
    theirs: dict[str, Any]
    """Case -> losses and tokens."""
    weights: dict[str, NDArray[np.float32]]
    """Case and PEFT's name of a tensor -> its final values."""


@pytest.fixture(scope="module", params=["adamw", "sgd"])
def compared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    optimizer, folder = request.param, tmp_path_factory.mktemp(request.param)
    lr, base = LEARNING_RATES[optimizer], save_base(folder / "base")
    specs = [
        spec("lora", name, rank=4 + i, lr=lr, max_grad_norm=None, weight_decay=0.0)
        for i, name in enumerate(CASES)
    ]
    tasks = {name: case.rows.task(name, case.preference) for name, case in CASES.items()}
    ours = train_ours(
        specs, tasks, folder, base=base, steps=STEPS, batch_size=BATCH, optimizer=optimizer, eps=EPSILON
    )
    jobs = []
    for adapter in specs:
        of_task = CASES[adapter.task]
        jobs.append(
            {
                "name": adapter.task,
                "objective": of_task.preference.objective,
                "adapter": str(ours.initial[adapter.name]),
                "rows": of_task.rows.for_trl(range(STEPS * BATCH)),
                "batch_size": BATCH,
                "beta": of_task.preference.beta,
                "optimizer": OPTIMIZERS[optimizer],
                "learning_rate": lr,
                "epsilon": EPSILON,
                "options": of_task.options,
            }
        )
    theirs, weights = run_script("train_preferences.py", folder, base=str(base), jobs=jobs)
    return Compared(ours, theirs, weights)


@pytest.mark.parametrize("name", CASES)
def test_trl_trains_on_the_same_tokens(compared: Compared, name: str) -> None:
    task = compared.ours.trainer.tasks[name]
    for i, row in enumerate(compared.theirs[name]["tokens"]):
        documents = [tokens.tolist() for tokens, _ in task.train.documents(i)]
        if "chosen_input_ids" in row:
            assert documents == [row["chosen_input_ids"], row["rejected_input_ids"]]
        elif "completion_ids" in row:
            assert documents == [row["prompt_ids"] + row["completion_ids"]]
        else:
            assert documents == [row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("name", CASES)
def test_losses_of_every_step_are_those_of_trl(compared: Compared, name: str) -> None:
    ours, theirs = compared.ours.losses[f"{name}-lora"], compared.theirs[name]["losses"]
    assert len(theirs) == STEPS
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    assert max(ours) - min(ours) > 100 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_final_weights_are_those_of_trl(compared: Compared, name: str) -> None:
    ours = compared.ours.final[f"{name}-lora"]
    theirs = {
        key.removeprefix(f"{name}/"): value
        for key, value in compared.weights.items()
        if key.startswith(f"{name}/")
    }
    assert set(ours) == set(theirs)
    moved = 0.0
    for key, tensor in ours.items():
        np.testing.assert_allclose(tensor.numpy(), theirs[key], rtol=0, atol=TOLERANCE, err_msg=key)
        if "lora_B" in key:
            moved = max(moved, float(np.abs(theirs[key]).max()))
    assert moved > 100 * TOLERANCE  # B began at zero
