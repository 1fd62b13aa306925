"""The description of a hub data set (README.md), of which the reader gets what one configuration needs.

The `datasets` library parses a description anew for everything that it looks up, which takes seconds each
time where there are hundreds of configurations, as in MultiPL-E.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from flora_train.config.errors import choices, first_line
from flora_train.runtime.hub_snapshot import HubError

HEADER = re.compile(r"\A\s*---\s*\n(.*?)^---\s*$", re.DOTALL | re.MULTILINE)
"""The YAML at the beginning of a README.md."""
OF_A_CONFIGURATION = ("configs", "dataset_info")
"""Keys that hold one entry for each configuration."""


class Description:
    """What README.md and .huggingface.yaml say about a data set. Raises HubError if they are damaged."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._metadata: dict[str, Any] = {}
        for file in files:
            self._metadata |= _parse(file)

    @property
    def configurations(self) -> list[str]:
        """Names of the configurations that it lists; empty if the folders tell them."""
        return [name for entry in self._entries("configs") if (name := _name(entry))]

    def choose(self, subset: str | None, data_dir: str | None) -> str | None:
        """The configuration that is read: subset, or the default. Raises HubError if there is none."""
        names = self.configurations
        if subset is not None or not names or data_dir is not None:
            if subset is not None and names and subset not in names:
                raise HubError(f"has no configuration {subset!r}: set subset to {choices(names)}")
            return subset
        defaults = [_name(entry) for entry in self._entries("configs") if entry.get("default")]
        default = next(iter(defaults), "default" if "default" in names else None)
        if default is None and len(names) > 1:
            raise HubError(f"has several configurations: set subset to {choices(names)}")
        return default or names[0]

    def readme(self, configuration: str | None) -> str:
        """A README.md that describes this configuration only; None: none of those that it lists."""
        metadata = {key: value for key, value in self._metadata.items() if key not in OF_A_CONFIGURATION}
        for key in OF_A_CONFIGURATION:
            entries = [entry for entry in self._entries(key) if _name(entry) == configuration]
            if entries:
                metadata[key] = entries
            elif not self.configurations and key in self._metadata:
                metadata[key] = self._metadata[key]
        return f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)}---\n"

    def _entries(self, key: str) -> list[dict[str, Any]]:
        entries = self._metadata.get(key)
        if not isinstance(entries, list):
            return []
        return [entry for entry in entries if isinstance(entry, dict)]


def _name(entry: dict[str, Any]) -> str | None:
    name = entry.get("config_name")
    return name if isinstance(name, str) else None


@lru_cache(maxsize=8)
def _parse(file: Path) -> dict[str, Any]:
    """The metadata of a file in the hub's cache, whose name there tells its content."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.name.endswith(".yaml"):
            header = text
        else:
            match = HEADER.match(text)
            header = match[1] if match is not None else ""
        metadata = yaml.load(header, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise HubError(f"its description {file.name} cannot be read: {first_line(error)}") from error
    return metadata if isinstance(metadata, dict) else {}
