"""What does a run look like on the hub? One repository with a folder for each adapter, or a repository for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.config.json_object import parse_object, read_object
from flora_train.export.model_card import KINDS, in_code, in_line, write_card
from flora_train.export.model_card_results import benchmarks
from flora_train.runtime.atomic import disk_errors, write_atomically
from flora_train.runtime.manifest import PEFT_FILES, PEFT_WARNING
from flora_train.runtime.run_folder import RunFolder

MANIFEST = "flora_train.json"
"""What a repository tells of its adapters: what another push may replace, and what its table says of them."""
TEMPLATE = Path(__file__).with_name("hub_repository.md.jinja")

Entries = Mapping[str, Mapping[str, Any]]
"""Adapter -> its `run` (an identity), base, task, kind, rank, and bits_per_byte and difference_to_base if it was judged."""


@dataclass(frozen=True)
class Repository:
    """name: ORG/NAME; files: path in it -> file here; adapters: those whose folders they are; base: their base model; table: whether it
    is described by a table of its adapters, else it holds one with a card of its own."""

    name: str
    files: Mapping[str, Path]
    adapters: Entries
    base: str
    table: bool

    def overview(self, theirs: Entries) -> dict[str, bytes]:
        """Path -> content of what tells of these adapters and of those that are there already."""
        together = {**theirs, **self.adapters}
        files = {MANIFEST: (json.dumps({"adapters": together}, indent=2) + "\n").encode()}
        if self.table:
            files["README.md"] = _table(self.name, self.base, together, "report.html" in self.files).encode()
        return files


def read_entries(manifest: bytes) -> Entries:
    """The adapters that a MANIFEST names. Raises ValueError or RecursionError if it is not one of ours."""
    entries = parse_object(manifest).get("adapters")
    if not isinstance(entries, dict):
        raise ValueError("no adapters")
    for name, entry in entries.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("run", "task", "kind")):
            raise ValueError(f"{name} is not described")
        if not isinstance(entry.get("base", ""), str) or not isinstance(entry.get("rank"), int | None):
            raise ValueError(f"{name} has another base or rank")
        if "bits_per_byte" in entry and not _are_numbers(entry, "bits_per_byte", ("value",)):
            raise ValueError(f"{name} has no bits per byte")
        if "bits_per_byte" in entry and not _are_numbers(entry, "difference_to_base", ("value", "low", "high")):
            raise ValueError(f"{name} has no difference to the base")
    return entries


def _are_numbers(entry: Mapping[str, Any], key: str, names: Sequence[str]) -> bool:
    numbers = entry.get(key)
    return isinstance(numbers, dict) and all(isinstance(numbers.get(name), int | float) for name in names)


def stage(
    run: RunFolder,
    specs: Sequence[AdapterSpec],
    report: Mapping[str, Any],
    repo: str,
    base: str | None,
    apart: bool,
    place: Path,
    origin: str = "",
) -> list[Repository]:
    """Write what is pushed below `place`: adapters with cards that load them from the hub.

    base: what the adapters' configurations call their base, instead of what the run's recipe did; apart: a repository for each adapter;
    origin: a sentence for every card.
    """
    identity = sha256(run.config.read_bytes()).hexdigest()
    results = {row["name"]: row for result in report.get("results", ()) for row in result["contenders"]}
    folders = {spec.name: _adapter(run, spec, report, repo, base, apart, place, origin) for spec in specs}
    named = base or _base_of(next(iter(folders.values())))
    entries = {spec.name: {"run": identity, "base": named, **_entry(spec, results.get(spec.name, {}))} for spec in specs}
    shown = run.evaluation / "report.html"
    extra = {"report.html": shown} if shown.exists() else {}
    if apart:
        return [
            Repository(
                f"{repo}-{name}",
                {**_files(folder), **extra, **_scores(report, name, place)},
                {name: entries[name]},
                named,
                table=False,
            )
            for name, folder in folders.items()
        ]
    files = {f"{name}/{path}": file for name, folder in folders.items() for path, file in _files(folder).items()}
    return [Repository(repo, {**files, **extra}, entries, named, table=True)]


def _entry(spec: AdapterSpec, result: Mapping[str, Any]) -> dict[str, Any]:
    judged = {
        what: {key: round(value, 6) for key, value in result[what].items()}
        for what in ("bits_per_byte", "difference_to_base")
        if result
    }
    return {"task": spec.task, "kind": KINDS[spec.method], "rank": spec.rank, **judged}


def _adapter(
    run: RunFolder,
    spec: AdapterSpec,
    report: Mapping[str, Any],
    repo: str,
    base: str | None,
    apart: bool,
    place: Path,
    origin: str,
) -> Path:
    folder = place / "adapters" / spec.name
    folder.mkdir(parents=True)
    for name in PEFT_FILES:  # whatever else lies there is not meant for the hub
        source = run.adapters / spec.name / name
        if name in ("README.md", PEFT_WARNING) and not source.exists():
            continue
        if not source.is_file():
            raise user_error("run", str(run.path), f"lacks {source}: flora-train export {run.path} writes it")
        with disk_errors(folder / name):
            shutil.copyfile(source, folder / name)
    _adapter_config(run, spec.name)
    if base is not None:
        file = folder / "adapter_config.json"
        content = {**_adapter_config(run, spec.name), "base_model_name_or_path": base}
        write_atomically(file, lambda path: path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
    pushed_as = f'"{repo}-{spec.name}"' if apart else f'"{repo}", subfolder="{spec.name}"'
    return write_card(report, spec, folder, origin=origin, source=pushed_as)


def _adapter_config(run: RunFolder, name: str) -> dict[str, Any]:
    """The adapter's PEFT configuration. Raises UserError if it is damaged."""
    again = f"flora-train export {run.path} writes it again"
    path = run.adapters / name / "adapter_config.json"
    content = read_object(path, again)
    if not isinstance(content.get("base_model_name_or_path"), str) or not isinstance(content.get("peft_type"), str):
        raise user_error(str(path), None, f"is damaged: {again}")
    return {"task_type": None, **content}


def _files(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(folder.iterdir())}


def _scores(report: Mapping[str, Any], name: str, place: Path) -> dict[str, Path]:
    """What the hub lists on a model's page and in the benchmark's table. Not where a repository holds several: it would call them one model's."""
    scores = benchmarks(report, name)
    if not scores:
        return {}
    file = place / f"{name}.yaml"
    write_atomically(file, lambda path: path.write_text(yaml.safe_dump(scores, sort_keys=False), encoding="utf-8"))
    return {".eval_results/flora_train.yaml": file}


def _base_of(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def _table(repo: str, base: str, adapters: Entries, has_report: bool) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    known = base if not Path(base).exists() else None
    card = ModelCard.from_template(
        ModelCardData(base_model=known, library_name="peft", tags=["flora_train"]),
        template_path=str(TEMPLATE),
        repo=repo,
        base=in_code(base),
        base_literal=json.dumps(base),
        adapters={
            in_line(name): {key: in_line(value) if isinstance(value, str) else value for key, value in entry.items()}
            for name, entry in adapters.items()
        },
        runs=len({entry["run"] for entry in adapters.values()}),
        has_report=has_report,
    )
    return str(card).rstrip() + "\n"
