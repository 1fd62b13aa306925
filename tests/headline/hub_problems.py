"""Programming problems in the layout of nuprl/MultiPL-E on the hub: a configuration per benchmark and
language."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from flora_train.config.language_names import language_key
from flora_train.evaluation.code.problems.starter import STARTER_LANGUAGES, load_starter_problems

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures" / "multipl_e_problems"
NOT_ON_THE_HUB = ("py", "luau")
"""Languages of prompt files that version 3 of the data set on the hub does not have."""
NAMES_THERE = {"ada": "adb"}
"""Key of a language -> its name in the data set's configurations."""
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("language", pa.string()),
        ("prompt", pa.string()),
        ("doctests", pa.string()),
        ("original", pa.string()),
        ("prompt_terminology", pa.string()),
        ("tests", pa.string()),
        ("stop_tokens", pa.list_(pa.string())),
    ]
)


def write_problems(folder: Path, prompts: Path | None) -> dict[str, str]:
    """Write humaneval-* and mbpp-* configurations and the card that lists them.

    prompts: folder of MultiPL-E's prompt files; None: those of the tests. Returns language -> origin.
    """
    rows, origins = (_rows_of_folder(prompts), {}) if prompts else _rows_of_tests()
    if prompts:
        origins = dict.fromkeys(rows, "MultiPL-E")
    configurations = []
    for key in sorted(rows):
        language = NAMES_THERE.get(key, key)
        benchmarks = {"humaneval": rows[key]}
        if key != "dart":  # of which the data set has no MBPP
            benchmarks["mbpp"] = [_as_mbpp(row) for row in rows[key]]
        for benchmark, members in benchmarks.items():
            name = f"{benchmark}-{language}"
            _write(folder / name, members)
            configurations.append(name)
    (folder / "README.md").write_text(_card(sorted(configurations)), encoding="utf-8")
    return origins


def _rows_of_folder(folder: Path) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(folder.glob("humaneval-*.jsonl")):
        key = language_key(file.stem)
        if key not in NOT_ON_THE_HUB:
            lines = file.read_text(encoding="utf-8").split("\n")
            rows[key] = [json.loads(line) for line in lines if line.strip()]
    return rows


def _rows_of_tests() -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """MultiPL-E's problems that the tests have, and starter problems or our own in the other languages."""
    rows = _rows_of_folder(FIXTURES)
    origins = dict.fromkeys(rows, "MultiPL-E")
    for key in STARTER_LANGUAGES:
        if key in rows or key in NOT_ON_THE_HUB:
            continue
        origins[key] = "starter problems"
        rows[key] = [asdict(problem) for problem in load_starter_problems(key).values()]
    own = yaml.safe_load((HERE / "own_problems.yaml").read_text(encoding="utf-8"))
    for key, members in own.items():
        origins[key] = "own problems"
        rows[key] = [{"language": key, **row} for row in members]
    return rows, origins


def _as_mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same problem under a name of MBPP's, so that a run that read the wrong benchmark would show it."""
    return {**row, "name": re.sub(r"^[A-Za-z]+_", "mbpp_", row["name"])}


def _write(folder: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    filled = []
    for row in rows:
        texts = {name: row.get(name, "") for name in SCHEMA.names if name != "stop_tokens"}
        filled.append({**texts, "stop_tokens": list(row["stop_tokens"])})
    table = pa.Table.from_pylist(filled, schema=SCHEMA)
    pq.write_table(table, folder / "test-00000-of-00001.parquet")


def _card(configurations: Sequence[str]) -> str:
    """The card: its head tells `datasets` which files each configuration has."""
    head = {
        "license": "mit",
        "configs": [
            {"config_name": name, "data_files": [{"split": "test", "path": f"{name}/test-*"}]}
            for name in configurations
        ],
    }
    return f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\nProblems for tests of flora_train.\n"
