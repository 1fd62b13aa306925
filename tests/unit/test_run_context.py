"""What a run that has begun keeps of the machine that it began on."""

from __future__ import annotations

from pathlib import Path

import pytest

from flora_train.config.load import validate
from flora_train.run_context import as_it_began
from flora_train.runtime.run_folder import RunFolder
from tests.unit.config.helpers import small


@pytest.mark.parametrize("began", ["float32", "bfloat16"])
def test_a_base_of_type_auto_is_loaded_as_the_run_began(tmp_path: Path, began: str) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run_json({"finished": False, "base_dtype": began})
    auto = validate(small())
    assert auto.model.dtype == "auto"
    assert as_it_began(auto, folder).model.dtype == began


def test_dtype_of_the_recipe_precedes_the_recorded_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run_json({"finished": False, "base_dtype": "bfloat16"})
    raw = small()
    raw["model"] = {**raw["model"], "dtype": "float32"}
    assert as_it_began(validate(raw), folder).model.dtype == "float32"


def test_a_run_without_a_note_of_its_type_is_loaded_as_configured(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_run_json({"finished": True, "base_dtype": "int4"})
    assert as_it_began(validate(small()), folder).model.dtype == "auto"
