"""What does a run look like on the hub? One repository with a folder for each adapter, or a repository for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from flora_train.adapters.spec import AdapterSpec
from flora_train.export.card import KINDS, write_card
from flora_train.training.run_folder import RunFolder

MANIFEST = "flora_train.json"
"""Which adapter of a repository is of which run: what another push may replace."""
TEMPLATE = Path(__file__).with_name("repository.md.jinja")


@dataclass(frozen=True)
class Repository:
    """name: ORG/NAME; files: path in it -> file here; adapters: whose folders they are; run: identifies the run they are of."""

    name: str
    files: Mapping[str, Path]
    adapters: tuple[str, ...]
    run: str

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(file.stat().st_size for file in self.files.values())


def stage(
    run: RunFolder, specs: Sequence[AdapterSpec], report: Mapping[str, Any], repo: str, base: str | None, apart: bool, place: Path
) -> list[Repository]:
    """Write what is pushed below `place`: adapters with cards that load them from the hub, the report, a table of all.

    base: what the adapters' configurations call their base, instead of what the run's recipe did; apart: a repository for each adapter.
    """
    identity, found = sha256(run.config.read_bytes()).hexdigest(), []
    folders = {spec.name: _adapter(run, spec, report, repo, base, apart, place) for spec in specs}
    shown = run.evaluation / "report.html"
    extra = {"report.html": shown} if shown.exists() else {}
    if apart:
        for name, folder in folders.items():
            manifest = _manifest(place / name, identity, [name])
            found.append(Repository(f"{repo}-{name}", {**_files(folder), **extra, MANIFEST: manifest}, (name,), identity))
        return found
    files = {f"{name}/{path}": file for name, folder in folders.items() for path, file in _files(folder).items()}
    card = _table(specs, report, repo, base or _base_of(next(iter(folders.values()))), place / "README.md")
    manifest = _manifest(place, identity, list(folders))
    return [Repository(repo, {**files, **extra, "README.md": card, MANIFEST: manifest}, tuple(folders), identity)]


def _adapter(
    run: RunFolder, spec: AdapterSpec, report: Mapping[str, Any], repo: str, base: str | None, apart: bool, place: Path
) -> Path:
    folder = place / "adapters" / spec.name
    shutil.copytree(run.adapters / spec.name, folder)
    if base is not None:
        file = folder / "adapter_config.json"
        content = {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": base}
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    source = f'"{repo}-{spec.name}"' if apart else f'"{repo}", subfolder="{spec.name}"'
    return write_card(report, spec, folder, source=source)


def _files(folder: Path) -> dict[str, Path]:
    return {file.name: file for file in sorted(folder.iterdir())}


def _base_of(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


def _manifest(place: Path, identity: str, names: Sequence[str]) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    (place / MANIFEST).write_text(json.dumps({"adapters": dict.fromkeys(names, identity)}, indent=2) + "\n", encoding="utf-8")
    return place / MANIFEST


def _table(specs: Sequence[AdapterSpec], report: Mapping[str, Any], repo: str, base: str, file: Path) -> Path:
    from huggingface_hub import ModelCard, ModelCardData

    results = {row["name"]: row for result in report.get("results", ()) for row in result["contenders"]}
    known = base if not Path(base).exists() else None
    card = ModelCard.from_template(
        ModelCardData(base_model=known, library_name="peft", tags=["flora_train"]),
        template_path=str(TEMPLATE),
        repo=repo,
        base=base,
        rows=[(spec, KINDS[spec.method], results.get(spec.name)) for spec in specs],
        has_report=bool(report),
    )
    file.write_text(str(card).rstrip() + "\n", encoding="utf-8")
    return file
