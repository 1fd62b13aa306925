"""References that are computed before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flora_train.adapters.paging import Paging
from flora_train.data.preferences.preference import Preference
from flora_train.training.references import Parts
from flora_train.training.trainer import Trainer
from tests.conftest import spec
from tests.unit.training.harness import make_trainer

OBJECTIVES = {"b": Preference("dpo", 0.5), "c": Preference("kto", 0.5)}


def prepared(folder: Path, paging: Paging | None) -> Trainer:
    """A trainer whose adapters have references of their own, but are elsewhere by now."""
    adapters = [spec("lora", task, family, rank=4) for task in OBJECTIVES for family in ("one", "two")]
    specs = [replace(adapter, init_from="somewhere") for adapter in adapters]
    trainer = make_trainer(
        specs,
        folder,
        preferences=OBJECTIVES,
        paging=paging,
        examples_per_draw=2,
        tokens_per_step=130,
        steps=10,
    )

    def init_adapters(adapters: list[int]) -> None:
        for adapter in adapters:
            values = trainer.bank.row(adapter)
            values.copy_(values.new_tensor(np.random.default_rng(adapter).normal(0, 0.1, len(values))))

    trainer.prepare_references(init_adapters)
    return trainer


def test_references_of_paged_adapters_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where fewer adapters fit on the device than have a reference. Afterwards they are as they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    resident, paged = prepared(tmp_path / "a", None), prepared(tmp_path / "b", Paging(2, None))
    ours, theirs = paged.context.references, resident.context.references
    assert len(theirs.training) == 4
    for split, expected in ((ours.training, theirs.training), (ours.validation, theirs.validation)):
        assert split.keys() == expected.keys()
        for adapter, parts in expected.items():
            assert_close(split[adapter], parts)
    for adapter in range(len(resident.bank.specs)):
        assert paged.bank.digest(adapter) == resident.bank.digest(adapter)


def assert_close(values: Parts, expected: Parts) -> None:
    assert values.keys() == expected.keys()
    for part in expected:
        assert np.isfinite(expected[part]).any()
        np.testing.assert_allclose(values[part], expected[part], atol=1e-5)
