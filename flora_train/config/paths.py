"""Finds and reads the YAML files, data files and folders that a configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from flora_train.config import yaml_reader
from flora_train.config.errors import Problem, UserError, choices, did_you_mean, user_error
from flora_train.config.json_format import JsonObject

CHECKOUT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (CHECKOUT / "recipes").is_dir()
PROJECT_ROOT = CHECKOUT if IS_CHECKOUT else Path(__file__).resolve().parents[1] / "shipped"
"""Folder of the recipes, data configs, example data and scripts: the source tree, or, in an installed wheel,
the package."""

RawConfig: TypeAlias = JsonObject
"""Nested mappings as they are read, before references are resolved."""


def shipped(kind: str) -> dict[str, Path]:
    """Name -> file of the YAML files in `recipes` or `data_configs`; files of the working directory precede
    the project's.

    `recipes/speech/nordic.yaml` has the name `speech/nordic`.
    """
    folders = (PROJECT_ROOT / kind, Path(kind))
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for folder in folders
        for path in sorted(folder.rglob("*.yaml"))
    }


def at_home(path: str) -> Path:
    """`path` with `~` replaced by the home folder. An unknown `~user` is left as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def find_file(path: str) -> Path:
    """`path` in the working directory, or else in the project folder."""
    here = at_home(path)
    if not exists(here) and exists(PROJECT_ROOT / here):
        return PROJECT_ROOT / here
    return here


def exists(path: Path) -> bool:
    """Whether a path exists. False for names that no file can have."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def find_config(kind: str, name: str) -> Path:
    """The YAML file of a `recipe` or `data_config`, given by name, path, or folder of a run.

    Raises UserError if there is none.
    """
    known = shipped(f"{kind}s")
    if name in known:
        return known[name]
    path = find_file(name)
    if exists(path) and path.is_dir():
        if not (path / "config.yaml").is_file():
            raise user_error(
                kind, name, "is a folder without a config.yaml: give a YAML file, or the folder of a run"
            )
        return path / "config.yaml"
    if exists(path):
        if not path.is_file():
            raise user_error(kind, name, "is not a regular file: give a YAML file, or the folder of a run")
        return path
    wanted = name.removesuffix(".yaml").removesuffix(".yml")
    hint = did_you_mean(wanted, known) or did_you_mean(Path(wanted).name, known)
    if wanted != name or "/" in name:
        raise user_error(kind, name, f"no such file.{hint}")
    if exists(find_file(f"{name}.yaml")):
        raise user_error(
            kind, name, f"no {kind} of that name in {kind}s/. There is a file: {kind}={name}.yaml"
        )
    raise user_error(kind, name, f"no {kind} of that name in {kind}s/; there are {choices(known)}.{hint}")


def read_yaml(path: Path) -> RawConfig:
    """The mapping in a YAML file.

    Raises UserError with file and line if the file is damaged, a key occurs twice, or a name is not text in
    YAML (`no` is a boolean).
    """
    if exists(path) and not path.is_file() and not path.is_dir():
        raise user_error(str(path), None, "is not a regular file: give a YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise user_error(
            str(path), None, "is not readable YAML: it is not UTF-8 text; save it as UTF-8"
        ) from None
    except OSError as error:
        raise user_error(str(path), None, f"cannot be read: {error.strerror}") from None
    return read_mapping(text, str(path))


def read_mapping(text: str, source: str) -> RawConfig:
    """The mapping in a YAML text. source: its name in errors."""
    try:
        content = yaml_reader.read(text)
    except yaml_reader.YamlFaults as error:
        raise UserError(*(_problem(source, fault) for fault in error.faults)) from None
    if not isinstance(content, dict):
        raise user_error(source, None, "must hold keys and values at the top level")
    return content


def check_texts(raw: Mapping[str, object]) -> None:
    """Raises UserError for keys and values with characters that no file can contain (lone surrogates, null
    characters)."""
    seen: set[int] = set()
    rest: list[tuple[str, object]] = [("", raw)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, str):
            if fault := yaml_reader.unwritable(value):
                raise user_error(key.encode(errors="replace").decode() or "configuration", None, fault)
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else enumerate(value)
            for name, item in items:
                below = f"{key}.{name}" if key else str(name)
                rest.append((below, item))
                if isinstance(name, str):
                    rest.append((below, name))


def _problem(source: str, fault: yaml_reader.Fault) -> Problem:
    if fault.line is None:
        return Problem(source, fault.given, fault.hint)
    if fault.hint.startswith(yaml_reader.UNREADABLE):
        given = ""
        if fault.given:
            given = f" {fault.given}"
        return Problem(source, None, f"{fault.hint}{given} (line {fault.line})")
    return Problem(f"{source}:{fault.line}", fault.given, fault.hint)
