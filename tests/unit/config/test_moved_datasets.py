"""Data sets that the hub no longer has, or has without contents, are one error that says how to get them."""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.paths import PROJECT_ROOT
from flora_train.config.task_schema import TaskConfig
from flora_train.data.templates import make_formatter
from tests.forked import python
from tests.rows import outline_of
from tests.unit.config.helpers import faults

STACK_V2 = ("", "-dedup", "-train-full-ids", "-train-smol-ids")
COMMON_VOICE = ("common_voice", "common_voice_11_0", "common_voice_17_0", "common_voice_22_0")


@pytest.mark.parametrize("name", [f"bigcode/the-stack-v2{ending}" for ending in STACK_V2])
def test_stack_v2_names_the_script_that_downloads_its_code(name: str) -> None:
    found = faults(tasks__lua__train={"hub": name, "subset": "Lua", "max_rows": 100})
    line = found.pop("tasks.lua.train.hub")
    assert not found
    assert line.startswith(f"tasks.lua.train.hub = '{name}': holds identifiers of files, without their code")
    assert f"python assets/download_stack_v2.py --data-set {name} --language LANGUAGE" in line
    assert (PROJECT_ROOT / "assets" / "download_stack_v2.py").is_file()


@pytest.mark.parametrize("name", COMMON_VOICE)
def test_common_voice_names_its_distributor(name: str) -> None:
    found = faults(tasks__lua__train={"hub": f"mozilla-foundation/{name}", "subset": "cs"})
    line = found.pop("tasks.lua.train.hub")
    assert not found
    assert "no longer on the hub: the Mozilla Data Collective distributes Common Voice" in line
    assert "give common_voice (the file) and locale (cs) in place of hub" in line


@pytest.mark.parametrize("name", ["bigcode/the-stack-dedup", "bigcode/starcoderdata", "me/common_voice_cs"])
def test_data_sets_that_are_on_the_hub_are_accepted(name: str) -> None:
    assert not TaskConfig(train={"hub": name}).train.files


def test_command_answers_before_it_asks_the_hub() -> None:
    words = ["recipe=multipl_e", "tasks.lua.train.hub=bigcode/the-stack-v2"]
    done = python("-m", "flora_train", "train", *words)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: tasks.lua.train.hub = 'bigcode/the-stack-v2': holds identifiers")


FILE = {"blob_id": "0" * 40, "path": "/a.lua", "src_encoding": "UTF-8", "language": "Lua"}


@pytest.mark.parametrize("row", [FILE, {"repo_name": "a/b", "files": [FILE]}], ids=["files", "repositories"])
@pytest.mark.parametrize("options", [{"text": "content"}, {}], ids=["text", "default"])
def test_rows_of_identifiers_are_recognised_wherever_they_come_from(
    row: dict[str, Any], options: dict[str, str]
) -> None:
    with pytest.raises(UserError) as caught:
        make_formatter(TaskConfig(train="rows.parquet", **options), outline_of([row]), "tasks.lua")
    (problem,) = caught.value.problems
    assert "They identify files of The Stack v2: `python assets/download_stack_v2.py --ids`" in str(problem)


def test_other_rows_without_the_column_get_no_such_hint() -> None:
    with pytest.raises(UserError, match="not a column") as caught:
        make_formatter(
            TaskConfig(train="rows.parquet", text="content"), outline_of([{"code": "x"}]), "tasks.lua"
        )
    assert "Stack" not in str(caught.value)
