"""The manifest of the files that a run writes into its folder. Only those are deleted when the run is
replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

PEFT_WARNING = "NOT_FOR_PLAIN_PEFT.txt"
"""Written beside an adapter that plain PEFT does not load; it states the reason."""

BASE_RECORD = "flora_train_base.json"
"""Written beside an adapter: the SHA-256 of the base model that it was trained on. PEFT ignores it."""

POOLING_FILE = "1_Pooling/config.json"
"""Beside an adapter that learnt embeddings: how sentence-transformers makes them."""

EMBEDDING_FILES = (
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    POOLING_FILE,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""What is written beside an adapter that learnt embeddings, for sentence-transformers. A tokenizer has some
of its files."""

LABELS = "labels.json"
"""Written beside an adapter with a head: the names of its outputs. PEFT ignores it."""

PEFT_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    BASE_RECORD,
    LABELS,
    PEFT_WARNING,
    "README.md",
)

ROUTED_FILES = (
    "routing.json",
    "router.safetensors",
    "head.safetensors",
    "expert_{n}/adapter_config.json",
    "expert_{n}/adapter_model.safetensors",
    "expert_{n}/NOT_FOR_PLAIN_PEFT.txt",
    "shared/adapter_config.json",
    "shared/adapter_model.safetensors",
    "shared/NOT_FOR_PLAIN_PEFT.txt",
)
"""What is written of a routed adapter, beside BASE_RECORD, LABELS and its card."""

MIXLORA_FILES = ("adapter_config.json", "adapter_model.bin", BASE_RECORD, "README.md")
"""What is written of an adapter in the published layout of MixLoRA."""

RUN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "clips_left_out.tsv",
    "checkpoints/step-{n}.safetensors",
    "checkpoints/best/{adapter}.safetensors",
    "references/{adapter}.{part}.safetensors",
    *(f"adapters/{{adapter}}/{file}" for file in (*PEFT_FILES, *EMBEDDING_FILES, *ROUTED_FILES)),
    "eval/report.json",
    "eval/report.html",
    "eval/predictions/{adapter}.jsonl",
    "eval/answers/settings.json",
    "eval/answers/answers-{n}.jsonl",
    "eval/heldout/settings.json",
    "eval/heldout/pieces-{n}.jsonl",
    "eval/heldout/{part}/settings.json",
    "eval/heldout/{part}/pieces-{n}.jsonl",
    "eval/speech/settings.json",
    "eval/speech/transcripts-{n}.jsonl",
    "eval/speech/error_rates.json",
)
"""What every run may write. {adapter}: one of its adapters; {n}: a number; {part}: any text without a slash;
{rest}: any text.
"""

TOKENS = {"n": r"\d+", "adapter": r"(?P<adapter>[^/]+)", "part": r"[^/]+", "rest": r".+"}
TEMPORARY = re.compile(r"^\.(.+)\.\d+\.tmp$")
"""What a killed write leaves; the name of the file or folder is inside."""


def suite_files(suites: Iterable[str]) -> list[str]:
    """The files that a run writes for suites of programming problems."""
    files = ("settings.json", "completions-{n}.jsonl", "verdicts.jsonl", "scores.json")
    return [f"eval/{suite}/{file}" for suite in suites for file in files]


@dataclass(frozen=True)
class Manifest:
    """The files of a run."""

    names: tuple[str, ...]
    """Paths below the run folder, with the placeholders of RUN_FILES."""
    adapters: frozenset[str]
    """The names that {adapter} stands for."""

    @classmethod
    def of(cls, adapters: Iterable[str], names: Iterable[str] = RUN_FILES) -> Manifest:
        return cls(tuple(dict.fromkeys(names)), frozenset(adapters))

    @classmethod
    def read(cls, content: Any) -> Manifest | None:
        """The manifest in run.json; None if there is none, or if it names files outside of the folder."""
        if not isinstance(content, Mapping):
            return None
        names, adapters = _texts(content.get("names")), _texts(content.get("adapters"))
        if names is None or adapters is None:
            return None
        if not all(map(_is_below, (*names, *adapters))) or any("/" in name for name in adapters):
            return None
        if any(name.count(token) > 1 for name in names for token in ("{adapter}", "{rest}")):
            return None
        return cls.of(adapters, names)

    def to_json(self) -> dict[str, list[str]]:
        return {"names": list(self.names), "adapters": sorted(self.adapters)}

    def __or__(self, other: Manifest) -> Manifest:
        return Manifest.of(self.adapters | other.adapters, (*self.names, *other.names))

    def files(self, folder: Path) -> list[Path]:
        """The files below `folder` that it names, and what killed writes of them left."""
        patterns, named = [_pattern(name) for name in self.names], []
        for parent, _, files in os.walk(folder):
            for file in files:
                path = Path(parent, file)
                if self._names(patterns, _final_path(path.relative_to(folder).as_posix())):
                    named.append(path)
        return sorted(named)

    def leftovers(self, folder: Path) -> list[Path]:
        """What killed writes of its files left below `folder`."""
        files = self.files(folder)
        return [file for file in files if any(map(TEMPORARY.match, file.relative_to(folder).parts))]

    def links(self, folder: Path) -> list[Path]:
        """Links below `folder` that replace folders of the run: files behind them may belong to others."""
        parents = {str(parent) for name in self.names for parent in PurePosixPath(name).parents} - {"."}
        patterns = [_pattern(parent) for parent in sorted(parents)]
        subfolders = [Path(parent, name) for parent, folders, _ in os.walk(folder) for name in folders]
        links = [path for path in subfolders if path.is_symlink()]
        return [path for path in links if self._names(patterns, path.relative_to(folder).as_posix())]

    def _names(self, patterns: Sequence[re.Pattern[str]], path: str) -> bool:
        for pattern in patterns:
            match = pattern.match(path)
            if match is not None:
                adapter = match.groupdict().get("adapter")
                if adapter is None or adapter in self.adapters:
                    return True
        return False


def delete(files: Sequence[Path], folder: Path, keep: Collection[Path] = ()) -> None:
    """Delete these files below `folder` and folders that become empty, except those to `keep`. Raises
    OSError.
    """
    to_keep, parents = set(keep), set()
    for file in files:
        if file not in to_keep:
            file.unlink(missing_ok=True)
            parents.add(file.parent)
    for parent in sorted(parents, key=lambda path: len(path.parts), reverse=True):
        while parent != folder and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
            parent = parent.parent


def delete_leftovers(manifest: Manifest, folder: Path) -> None:
    """Delete what killed writes of the manifest's files left below `folder`. Raises OSError."""
    delete(manifest.leftovers(folder), folder)
    for parent, folders, _ in os.walk(folder, topdown=False):
        for name in folders:
            path = Path(parent, name)
            match = TEMPORARY.match(name)
            if match is not None and match[1] in manifest.adapters and not any(path.iterdir()):
                path.rmdir()


def _pattern(name: str) -> re.Pattern[str]:
    expression = ""
    for i, part in enumerate(re.split(r"\{(n|adapter|part|rest)\}", name)):
        is_placeholder = i % 2 == 1
        expression += TOKENS[part] if is_placeholder else re.escape(part)
    return re.compile(expression + r"\Z")


def _final_path(path: str) -> str:
    """The path that a temporary file or folder was to get."""
    return "/".join(TEMPORARY.sub(r"\1", part) for part in path.split("/"))


def _texts(value: Any) -> list[str] | None:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        return None
    return value


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name
