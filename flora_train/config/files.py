"""Which file does a name in the configuration mean, and what does its YAML say?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flora_train.config.errors import Problem, UserError, choices, did_you_mean, fail, first_line

CHECKOUT = Path(__file__).resolve().parents[2]
IS_CHECKOUT = (CHECKOUT / "recipes").is_dir()
PROJECT_ROOT = CHECKOUT if IS_CHECKOUT else Path(__file__).resolve().parents[1] / "shipped"
"""Recipes, data configs, example data and the scripts beside them: of the source tree, or, installed from a wheel, in the package."""

Layer = dict[str, Any]
"""Nested mappings as read, interpolations not yet resolved."""


def shipped(kind: str) -> dict[str, Path]:
    """Name -> file of the YAML files below `recipes` or `data_configs`, the working directory's before the project's.

    `recipes/speech/nordic.yaml` has the name `speech/nordic`.
    """
    folders = (PROJECT_ROOT / kind, Path(kind))
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path for folder in folders for path in sorted(folder.rglob("*.yaml"))
    }


def find_file(path: str) -> Path:
    """`path` in the working directory, or else in the project's own folder (shipped data)."""
    here = Path(path).expanduser()
    return here if here.exists() or not (PROJECT_ROOT / here).exists() else PROJECT_ROOT / here


def find_config(kind: str, name: str) -> Path:
    """The YAML file of a `recipe` or `data_config` given as shipped name, path, or folder of a finished run.

    Raises UserError if there is none.
    """
    known = shipped(f"{kind}s")
    if name in known:
        return known[name]
    path = find_file(name)
    if path.is_dir() and (path / "config.yaml").is_file():
        return path / "config.yaml"
    if path.is_file():
        return path
    wanted = name.removesuffix(".yaml").removesuffix(".yml")
    hint = did_you_mean(wanted, known) or did_you_mean(Path(wanted).name, known)
    if wanted != name or "/" in name:
        raise fail(kind, name, f"no such file.{hint}")
    if find_file(f"{name}.yaml").is_file():
        raise fail(kind, name, f"no {kind} of that name in {kind}s/. There is a file: {kind}={name}.yaml")
    raise fail(kind, name, f"no {kind} of that name in {kind}s/; there are {choices(known)}.{hint}")


def read_yaml(path: Path) -> Layer:
    """The mapping in a YAML file. Raises UserError with file and line if it is damaged, a key is given twice, or a name
    is not text to YAML (`no` is a boolean)."""
    try:
        text = path.read_text(encoding="utf-8")
        problems = [problem for node in _mappings(yaml.compose(text, yaml.SafeLoader)) for problem in _key_problems(path, node)]
        if problems:
            raise UserError(*problems)
        content = OmegaConf.create(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise fail(str(path), None, f"is not readable YAML: {yaml_reason(error)}") from None
    except AssertionError:  # OmegaConf's answer to a lone number
        content = None
    if not isinstance(content, DictConfig):
        raise fail(str(path), None, "must hold keys and values at the top level")
    return OmegaConf.to_container(content, resolve=False)


def yaml_reason(error: Exception) -> str:
    """One line that says what a YAML reader did not like, with the line number where it knows."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{problem} (line {mark.line + 1})" if problem and mark else first_line(error)


def _mappings(node: yaml.Node | None) -> Iterator[yaml.MappingNode]:
    """All mappings of a YAML document; an alias is followed like the node that it stands for."""
    if isinstance(node, yaml.MappingNode):
        yield node
        for _, value in node.value:
            yield from _mappings(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _mappings(item)


def _key_problems(path: Path, mapping: yaml.MappingNode) -> Iterator[Problem]:
    first_lines: dict[str, int] = {}
    for key, _ in mapping.value:
        line, kind = key.start_mark.line + 1, key.tag.rpartition(":")[2]
        if kind not in ("str", "merge"):
            given = key.value if isinstance(key, yaml.ScalarNode) else None
            yield Problem(f"{path}:{line}", given, f"YAML reads this key as {kind}, not as text: put it in quotes")
        elif kind == "str" and key.value in first_lines:
            yield Problem(
                f"{path}:{line}", key.value, f"this key is given twice (first on line {first_lines[key.value]}): rename one"
            )
        else:
            first_lines[key.value] = line
