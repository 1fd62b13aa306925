"""An adapter of another base model is refused where its folder records a hash, else a warning."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import HiraConfig

from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.models import base_identity as identity_module
from flora_train.models.base_identity import base_identity
from flora_train.runtime.manifest import BASE_RECORD
from flora_train.serving.base_match import ALLOW_VARIABLE, ServedBase, check_base, same_model
from tests.architectures import tiny_model
from tests.unit.serving.adapter_folders import change_config, saved_by_peft


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model's folder."""
    tiny_model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """A folder of an adapter that names the base."""
    folder = saved_by_peft(HiraConfig(r=2, target_modules=["q_proj"]), tmp_path / "adapter")
    change_config(folder, base_model_name_or_path=str(base))
    return folder


def record(adapter: Path, base: Path) -> None:
    identity = base_identity(ModelConfig(path=str(base)))
    (adapter / BASE_RECORD).write_text(json.dumps({"base": identity}))


def test_the_own_base_is_accepted_and_a_copy_of_it(adapter: Path, base: Path, tmp_path: Path) -> None:
    assert check_base(adapter, ServedBase(str(base)), "a") is None
    record(adapter, base)
    assert check_base(adapter, ServedBase(str(base)), "a") is None
    copy = shutil.copytree(base, tmp_path / "copy")
    assert check_base(adapter, ServedBase(str(copy)), "a") is None


def test_other_weights_under_the_same_name_are_refused(adapter: Path, base: Path) -> None:
    record(adapter, base)
    other = tiny_model()
    other.lm_head.weight.data += 1  # type: ignore[union-attr,operator]
    other.save_pretrained(base)  # type: ignore[operator]
    with pytest.raises(
        UserError,
        match=r"adapter = 'a': was trained on other weights .*set FLORA_TRAIN_ALLOW_DIFFERENT_BASE=1",
    ):
        check_base(adapter, ServedBase(str(base)), "a")


def test_other_weights_can_be_allowed(adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (adapter / BASE_RECORD).write_text(json.dumps({"base": {"weights": "0" * 64}}))
    monkeypatch.setenv(ALLOW_VARIABLE, "1")
    assert "was trained on other weights" in (check_base(adapter, ServedBase(str(base)), "a") or "")


def test_without_a_hash_another_name_is_a_warning(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "copy")
    warning = check_base(adapter, ServedBase(str(copy)), "a")
    assert warning == f"a was trained on {base}, and the served base model is {copy}"
    (tmp_path / "link").symlink_to(base)
    assert check_base(adapter, ServedBase(str(tmp_path / "link")), "a") is None
    assert check_base(adapter, ServedBase(f"{base}/"), "a") is None
    change_config(adapter, base_model_name_or_path=None)
    assert check_base(adapter, ServedBase(str(copy)), "a") is None


def test_a_hash_is_not_compared_where_the_files_of_the_served_base_are_unknown(
    adapter: Path, base: Path
) -> None:
    record(adapter, base)
    assert "someone/model" in (check_base(adapter, ServedBase("someone/model"), "a") or "")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("Qwen/Qwen3-8B", "qwen/qwen3-8b", True),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B/", True),
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", False),
        ("x" * 5000, "Qwen/Qwen3-8B", False),
        ("a\0b", "Qwen/Qwen3-8B", False),
        ("/nowhere/at/all", "/nowhere/else", False),
    ],
)
def test_names_of_models(first: str, second: str, same: bool) -> None:
    assert same_model(first, second) == same


@pytest.mark.parametrize("content", ["", "[]", "{", '{"base": 3}', '{"base": {"weights": 3}}', "x" * 100_000])
def test_damaged_records_are_refused(content: str, adapter: Path, base: Path) -> None:
    (adapter / BASE_RECORD).write_text(content)
    with pytest.raises(UserError, match=r"has a damaged flora_train_base\.json"):
        check_base(adapter, ServedBase(str(base)), "a")


def test_a_record_without_a_base_is_no_obstacle(adapter: Path, base: Path) -> None:
    (adapter / BASE_RECORD).write_text('{"version": 1}')
    assert check_base(adapter, ServedBase(str(base)), "a") is None


def test_the_served_base_is_hashed_once(adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(adapter, base)
    hashed: list[Path] = []
    original = identity_module._hash

    def counted(file: Path) -> str:
        hashed.append(file)
        return original(file)

    monkeypatch.setattr(identity_module, "_hash", counted)
    for _ in range(3):
        check_base(adapter, ServedBase(str(base)), "a")
    assert hashed == []
    os.utime(base / "model.safetensors", ns=(1, 1))
    for _ in range(3):
        check_base(adapter, ServedBase(str(base)), "a")
    assert hashed == [base / "model.safetensors"]
