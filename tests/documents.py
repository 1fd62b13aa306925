"""The commands and code blocks of README and docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "assets" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
PROGRAMS = (
    "ACCELERATE_USE_CPU=true accelerate",
    ".venv/bin/pre-commit",
    "accelerate",
    "conda",
    "cp",
    "docker",
    "eval/install_toolchains.sh",
    "flora-train",
    "git",
    "hf",
    "launch/supervise.sh",
    "make",
    "mkdocs",
    "npm",
    "pip",
    "podman",
    "pytest",
    "python",
    "sbatch",
    "source",
    "sudo",
    "sysctl",
    "tensorboard",
    "uv",
    "vllm",
    "wandb",
)
"""What a line or a code span begins with that is a command."""
SYNOPSIS = re.compile(r" \[|\.\.\.|\w\|\w")
"""Marks the description of a command's arguments, which is not a command."""


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    document: Path
    language: str
    text: str


def blocks(document: Path, *languages: str) -> list[Block]:
    """The code blocks of a document in these languages; "" is a block without one."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", prose(document), re.DOTALL | re.MULTILINE)
    return [Block(document, language, text) for language, text in fences if language in languages]


def prose(document: Path) -> str:
    """The text of a document without the figures that come from committed results."""
    text = document.read_text(encoding="utf-8")
    text = re.sub(r"<!-- figures.*?<!-- end -->", "", text, flags=re.DOTALL)
    return re.sub(r"^~~~$.*?^~~~$", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(document: Path) -> set[str]:
    """Every command of a document, without comments and with single spaces."""
    return {line for line in _lines(document) if not SYNOPSIS.search(line)}


def synopses(document: Path) -> set[str]:
    """Every description of a command's arguments, as in `flora-train report RUN [RUN ...]`."""
    return {line for line in _lines(document) if SYNOPSIS.search(line)}


def _lines(document: Path) -> Iterator[str]:
    for block in blocks(document, "bash", "console", ""):
        for line in block.text.replace("\\\n", " ").splitlines():
            yield from _command_of_line(line, block.language)
    inline = re.sub(r"^```.*?^```$", "", prose(document), flags=re.DOTALL | re.MULTILINE)
    for span in re.findall(r"`([^`\n]+)`", inline):
        text = span.replace("\\|", "|")
        if starts_with_program(text):
            yield normalised(text)


def _command_of_line(line: str, language: str) -> Iterator[str]:
    """In a bash block every line is a command; in a console block after `$ `; elsewhere by its program."""
    text = normalised(re.sub(r"(^|\s+)#(\s.*)?$", "", line))
    if language == "console":
        text = text.removeprefix("$ ") if text.startswith("$ ") else ""
    if text and (language != "" or starts_with_program(text)):
        yield text


def starts_with_program(text: str) -> bool:
    """Whether a text is a program with at least one argument."""
    return any(text.startswith(f"{program} ") for program in PROGRAMS)


def normalised(text: str) -> str:
    """A text with single spaces."""
    return " ".join(text.split())


def all_commands() -> dict[str, list[Path]]:
    """Command -> the documents that contain it."""
    found: dict[str, list[Path]] = {}
    for document in DOCUMENTS:
        for command in sorted(commands(document)):
            found.setdefault(command, []).append(document)
    return found
