"""Damaged, missing or mismatched files of a base model are one clear error; no weight is random."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from flora_train.config.errors import UserError
from flora_train.config.model_schema import ModelConfig
from flora_train.data.tokenization import check_tokenizer
from flora_train.models.loading import (
    count_layers,
    empty_model,
    load_base_model,
    load_feature_extractor,
    load_model_config,
    load_tokenizer,
    shallow_model,
)
from tests.e2e.conftest import save_tiny_checkpoint
from tests.speech import save_tiny_whisper

CPU = torch.device("cpu")
DAMAGES = (b"", b"{}", b"[]", b"null", b"{", b"\xff\xfe\x00", b'["a"]', b'"text"', b"[" * 20000, b"{" * 20000)
VALUES = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**18,
    "",
    "x",
    "../../etc",
    "float99",
    [],
    {},
    [[]],
    {"a": 1},
    [1, 2],
    "\ud800",
)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {"text": save_tiny_checkpoint(folder / "text"), "speech": save_tiny_whisper(folder / "speech")}


def load_all(folder: Path, spoken: bool) -> None:
    """All that any command reads of a base."""
    config = ModelConfig(path=str(folder), dtype="float32")
    check_tokenizer(load_tokenizer(config), config.path)
    load_model_config(config)
    if spoken:
        load_feature_extractor(config)
    empty_model(config)
    count_layers(config)
    shallow_model(config, 1, CPU)
    load_base_model(config, CPU)


def survives(bases: dict[str, Path], kind: str, name: str, content: bytes | None, place: Path) -> None:
    """Whatever a file holds, loading ends in success or a UserError of one line that names the model."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bases[kind], place)
    if content is None:
        (place / name).unlink()
    else:
        (place / name).write_bytes(content)
    try:
        load_all(place, kind == "speech")
    except UserError as error:
        (problem,) = error.problems
        assert problem.key == "model.path"
        assert "\n" not in str(problem)


def files_of(kind: str) -> list[str]:
    shared = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    return [*shared, "preprocessor_config.json"] if kind == "speech" else shared


@pytest.mark.attack
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in ("text", "speech") for name in files_of(kind)]
)
def test_a_damaged_file_of_a_base_is_one_clear_error(
    kind: str, name: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    whole = (bases[kind] / name).read_bytes()
    for content in (None, *DAMAGES, whole[: len(whole) // 2]):
        survives(bases, kind, name, content, tmp_path / "base")


@pytest.mark.attack
@pytest.mark.parametrize("kind", ["text", "speech"])
@settings(max_examples=max(4, settings.default.max_examples // 5))
@given(data=st.data())
def test_a_changed_setting_of_a_base_is_one_clear_error_or_none(
    kind: str, bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    name = data.draw(st.sampled_from([name for name in files_of(kind) if name.endswith(".json")]))
    content: dict[str, Any] = json.loads((bases[kind] / name).read_text(encoding="utf-8"))
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = data.draw(st.sampled_from(VALUES))
    survives(
        bases, kind, name, json.dumps(content).encode(), tmp_path_factory.getbasetemp() / f"changed-{kind}"
    )


def test_weights_that_are_missing_are_not_drawn_at_random(bases: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(bases["text"], tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"has no weights for model\.layers\.1\.mlp\.up_proj\.weight: its files do not belong"
    ):
        load_base_model(ModelConfig(path=str(tmp_path / "base")), CPU)


def test_a_config_of_more_layers_than_there_are_weights_is_refused(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["text"], tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"has no weights for model\.layers\.2\..*, and 8 more: its files do not belong"
    ):
        load_base_model(ModelConfig(path=str(tmp_path / "base")), CPU)
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 2, "intermediate_size": 40})
    )
    with pytest.raises(UserError, match=r"the shapes of its weights do not match its config\.json"):
        load_base_model(ModelConfig(path=str(tmp_path / "base")), CPU)


def test_tied_and_ignored_weights_are_not_missed(bases: dict[str, Path]) -> None:
    for kind in bases:
        load_base_model(ModelConfig(path=str(bases[kind])), CPU)


@pytest.mark.parametrize("missing", [True, False])
def test_an_index_of_weights_that_names_what_is_not_there_is_refused(
    missing: bool, bases: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(bases["text"], tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    half = sorted(tensors)[:4]
    save_file(
        {name: tensors[name] for name in half},
        tmp_path / "base" / "model-00001-of-00002.safetensors",
        {"format": "pt"},
    )
    file.unlink()
    names = {name: f"model-0000{1 if name in half else 2}-of-00002.safetensors" for name in tensors}
    index = {"metadata": {}, "weight_map": names} if missing else {"weight_map": [1]}
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.path = .*: cannot be loaded: "):
        load_base_model(ModelConfig(path=str(tmp_path / "base")), CPU)
