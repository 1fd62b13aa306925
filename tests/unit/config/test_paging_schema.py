"""Where are slots given, and what is refused?"""

from __future__ import annotations

from typing import Any

import pytest

from flora_train.config.errors import UserError
from flora_train.config.load import validate

RAW: dict[str, Any] = {
    "name": "run",
    "model": {"path": "unused"},
    "tasks": {"a": {"train": "a.jsonl"}},
    "adapters": {"lora": {"method": "lora", "lr": 1e-3}},
    "training": {"steps": 4},
}


def test_slots_are_given_beside_the_adapters() -> None:
    config = validate({**RAW, "adapters": {**RAW["adapters"], "device_slots": 4}})
    assert config.paging.device_slots == 4
    assert list(config.adapters) == ["lora"]
    with pytest.raises(UserError, match=r"device_slots = 0: must be at least 1, or must be auto"):
        validate({**RAW, "adapters": {**RAW["adapters"], "device_slots": 0}})
    with pytest.raises(UserError, match=r"adapters\.device_slots = 4.*one setting"):
        validate({**RAW, "adapters": {**RAW["adapters"], "device_slots": 4}, "paging": {"device_slots": 5}})
