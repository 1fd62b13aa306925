"""Damages of an adapter's folder, with what the refusal says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.unit.serving.adapter_folders import CONFIG, WEIGHTS


def empty_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def half_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def text_file(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def pipe_for_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def dangling_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "nowhere")


def no_config(folder: Path) -> None:
    (folder / CONFIG).unlink()


def half_config(folder: Path) -> None:
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:40])


def list_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def deep_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000)


def binary_config(folder: Path) -> None:
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00")


def vanished(folder: Path) -> None:
    shutil.rmtree(folder)


def file_in_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def looping_link(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (empty_file, "tensors cannot be read"),
    (half_file, "tensors cannot be read"),
    (text_file, "tensors cannot be read"),
    (no_weights, "lacks adapter_model.safetensors"),
    (pipe_for_weights, "lacks adapter_model.safetensors"),
    (dangling_weights, "lacks adapter_model.safetensors"),
    (no_config, "no adapter_config.json"),
    (half_config, "is not a PEFT adapter"),
    (list_config, "has no peft_type"),
    (deep_config, "nested too deeply"),
    (binary_config, "is not a PEFT adapter"),
    (vanished, "no such folder"),
    (file_in_place, "is not a folder"),
    (looping_link, "no such folder|cannot be read"),
]
