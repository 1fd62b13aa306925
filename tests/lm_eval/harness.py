"""Tables of lm_eval itself and of `flora-train lm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flora_train.cli import main

ADAPTERS = ["letters-flora", "letters-lora", "letters-ia3"]
CONTENDERS = ["base", *ADAPTERS]


def results_of_lm_eval(
    checkpoint: Path, adapter: Path | None, tasks: list[str], folder: Path, **options: Any
) -> Any:
    """What `lm_eval --model hf --model_args pretrained=...,peft=...` computes."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    model_args = {"pretrained": str(checkpoint), "dtype": "float32"}
    if adapter is not None:
        model_args["peft"] = str(adapter)
    evaluator.add_env_info = lambda results: None  # asks pip and others for versions, for many seconds
    return evaluator.simple_evaluate(
        "hf",
        model_args=model_args,
        tasks=tasks,
        device="cpu",
        batch_size=1,
        log_samples=False,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        **options,
    )


def tables_of_lm_eval(
    checkpoint: Path, run: Path, tasks: list[str], folder: Path, **options: Any
) -> dict[str, str]:
    """Contender -> the tables of tasks and groups that lm_eval prints."""
    from lm_eval.utils import make_table

    tables = {}
    for name in CONTENDERS:
        adapter = None if name == "base" else run / "adapters" / name
        results = results_of_lm_eval(checkpoint, adapter, tasks, folder, **options)
        tables[name] = str(make_table(results))
        if "groups" in results:
            tables[name] += str(make_table(results, "groups"))
    return tables


def our_tables(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """Contender -> the tables that `flora-train lm-eval` prints."""
    capsys.readouterr()
    assert main(["lm-eval", *words]) == 0, capsys.readouterr().err
    tables: dict[str, str] = {}
    name = ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith("(base in float32)"):
            name = line.removesuffix(" (base in float32)")
            tables[name] = ""
        elif line.startswith("|"):
            tables[name] += line + "\n"
    return tables


def assert_equal(ours: dict[str, str], theirs: dict[str, str]) -> None:
    """The tables are the same in every digit."""
    assert list(ours) == list(theirs)
    for name, table in theirs.items():
        assert ours[name].splitlines() == table.splitlines(), name
