"""Content of the hub repositories that `flora-train push` writes: one per run, or one per adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import yaml

from flora_train.adapters.routed.expert_names import SHARED
from flora_train.adapters.routed.folder import HEAD, ROUTERS, ROUTING
from flora_train.adapters.spec import AdapterSpec, rank_text
from flora_train.config.errors import user_error
from flora_train.config.json_format import parse_object
from flora_train.config.schema import RunConfig
from flora_train.evaluation.report.formatting import estimate, number
from flora_train.evaluation.report.types import Report, TaskResult
from flora_train.evaluation.result_model import Count, Interval, ResultModel, Text
from flora_train.export.adapter_description import config_files, description_of
from flora_train.export.label_names import read_labels
from flora_train.export.model_card import METHOD_TITLES, in_code, in_line, write_card
from flora_train.export.model_card_results import benchmarks
from flora_train.export.usage_snippet import GenerationExample, generation_example, usage_snippet
from flora_train.runtime.atomic import disk_errors, write_atomically
from flora_train.runtime.manifest import BASE_RECORD, EMBEDDING_FILES, LABELS, PEFT_FILES, PEFT_WARNING
from flora_train.runtime.run_folder import RunFolder

MANIFEST = "flora_train.json"
"""Describes the adapters of a repository: those a later push may replace, and the rows of its table."""
TEMPLATE = Path(__file__).with_name("hub_repository.md.jinja")


class HubEntry(ResultModel):
    """One adapter of a repository."""

    run: Text
    """Identity of the run: SHA-256 of its configuration."""
    base: Text
    """The base model."""
    task: Text
    method: Text
    rank: Count | None = None
    """The largest rank of its layers."""
    smallest_rank: Count | None = None
    """Where the ranks of its layers differ."""
    bits_per_byte: Interval | None = None
    """On held-out text. None: not evaluated."""
    difference_to_base: Interval | None = None


class HubManifest(ResultModel):
    """The content of MANIFEST."""

    adapters: dict[Text, HubEntry]


Entries = Mapping[str, HubEntry]
"""Adapter -> its entry."""


@dataclass(frozen=True)
class Repository:
    """One repository on the hub."""

    name: str
    """ORG/NAME."""
    files: Mapping[str, Path]
    """Path in the repository -> local file."""
    adapters: Entries
    """The adapters whose folders it holds."""
    base: str
    """Their base model."""
    snippet: str | None = None
    """Python source that uses the first adapter, for a README.md with a table of all adapters. None:
    README.md is the card of the only adapter."""

    def overview(self, existing: Entries) -> dict[str, bytes]:
        """Path -> content of the files that describe these adapters and the existing ones."""
        together = {**existing, **self.adapters}
        manifest = HubManifest(adapters=together).model_dump(mode="json", exclude_none=True)
        files = {MANIFEST: (json.dumps(manifest, indent=2) + "\n").encode()}
        if self.snippet is not None:
            files["README.md"] = self._readme(together).encode()
        return files

    def _readme(self, adapters: Entries) -> str:
        from huggingface_hub import ModelCard, ModelCardData

        rows = {in_line(name): _table_row(entry) for name, entry in adapters.items()}
        base_model = None if Path(self.base).exists() else self.base
        card = ModelCard.from_template(
            ModelCardData(base_model=base_model, library_name="peft", tags=["flora_train"]),
            template_path=str(TEMPLATE),
            repo=self.name,
            base=in_code(self.base),
            snippet=self.snippet,
            adapters=rows,
            runs=len({entry.run for entry in adapters.values()}),
            has_report="report.html" in self.files,
        )
        return str(card).rstrip() + "\n"


def _table_row(entry: HubEntry) -> dict[str, str]:
    """Cells of the table of adapters, as Markdown."""
    method = entry.method
    if entry.rank is not None:
        method += f", rank {rank_text(entry.rank, entry.smallest_rank)}"
    bits = change = ""
    if entry.bits_per_byte is not None and entry.difference_to_base is not None:
        bits, change = number(entry.bits_per_byte.value), estimate(entry.difference_to_base)
    return {"task": in_line(entry.task), "method": in_line(method), "bits_per_byte": bits, "change": change}


def read_entries(manifest: bytes) -> Entries:
    """The adapters that a MANIFEST describes. Raises ValueError or RecursionError for content of another
    form."""
    return HubManifest.model_validate(parse_object(manifest)).adapters


@dataclass(frozen=True)
class Staging:
    """The settings of a push."""

    repo: str
    """ORG/NAME."""
    folder: Path
    """Temporary folder for the staged files."""
    base: str | None = None
    """The base model that adapter_config.json names instead of the run's."""
    repo_per_adapter: bool = False
    origin: str = ""
    """A sentence for every card."""
    report: Report | None = None
    """The report of the run, if it was evaluated."""


def stage(
    run: RunFolder, config: RunConfig, specs: Sequence[AdapterSpec], staging: Staging
) -> list[Repository]:
    """Write the files of the repositories below `staging.folder`, with cards that load the adapters from the
    hub.

    Raises UserError for an adapter whose folder is incomplete or damaged.
    """
    run_id = sha256(run.config.read_bytes()).hexdigest()
    folders: dict[str, Path] = {}
    for spec in specs:
        example = generation_example(config, spec.task)
        folders[spec.name] = _stage_adapter(run, spec, example, staging=staging)
    first_folder = next(iter(folders.values()))
    base = staging.base or str(description_of(first_folder)["base_model_name_or_path"])
    entries = {spec.name: _entry(spec, staging.report, run=run_id, base=base) for spec in specs}
    page = run.evaluation / "report.html"
    report_file = {"report.html": page} if page.exists() else {}
    if staging.repo_per_adapter:
        repositories = []
        for name, folder in folders.items():
            files = {**_files(folder), **report_file, **_scores(name, staging)}
            repositories.append(Repository(f"{staging.repo}-{name}", files, {name: entries[name]}, base))
        return repositories
    files = dict(report_file)
    for name, folder in folders.items():
        files |= {f"{name}/{path}": file for path, file in _files(folder).items()}
    example = generation_example(config, specs[0].task)
    snippet = usage_snippet(
        description_of(first_folder),
        example,
        source=staging.repo,
        subfolder=specs[0].name,
        labels=read_labels(first_folder),
    )
    return [Repository(staging.repo, files, entries, base, snippet)]


def _entry(spec: AdapterSpec, report: Report | None, *, run: str, base: str) -> HubEntry:
    bits = change = smallest_rank = None
    rank = spec.rank or None
    results: Sequence[TaskResult] = ()
    if report is not None:
        results = report.results
        for facts in report.adapters:
            if facts.name == spec.name:
                rank, smallest_rank = facts.rank, facts.smallest_rank
    for result in results:
        for contender in result.contenders:
            if contender.name == spec.name:
                bits, change = contender.bits_per_byte, contender.difference_to_base
    return HubEntry(
        run=run,
        base=base,
        task=spec.task,
        method=METHOD_TITLES[spec.method],
        rank=rank,
        smallest_rank=smallest_rank,
        bits_per_byte=bits,
        difference_to_base=change,
    )


def _stage_adapter(
    run: RunFolder, spec: AdapterSpec, example: GenerationExample, *, staging: Staging
) -> Path:
    folder = staging.folder / "adapters" / spec.name
    folder.mkdir(parents=True)
    required, optional = _files_of(run, spec)
    for name in (*required, *optional):  # other files in the adapter's folder are not published
        file = run.adapters / spec.name / name
        if name in optional and not file.exists():
            continue
        if name == BASE_RECORD and staging.base is not None:
            continue  # the hash is that of the run's own base model
        if not file.is_file():
            raise user_error("run", str(run.path), f"lacks {file}: flora-train export {run.path} writes it")
        with disk_errors(folder / name):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, folder / name)
    described = description_of(run.adapters / spec.name, f"flora-train export {run.path} writes it again")
    if spec.is_routed and described["task_type"] != "CAUSAL_LM":
        hint = f"is {spec.method} and continues no texts: its card could not say how to load it"
        raise user_error("adapter", spec.name, hint)
    if staging.base is not None:
        for file in config_files(folder):
            _name_base(file, staging.base)
    source, subfolder = staging.repo, None
    if staging.repo_per_adapter:
        source = f"{staging.repo}-{spec.name}"
    else:
        subfolder = spec.name
    return write_card(
        staging.report,
        spec,
        folder,
        example=example,
        origin=staging.origin,
        source=source,
        subfolder=subfolder,
    )


def _files_of(run: RunFolder, spec: AdapterSpec) -> tuple[list[str], list[str]]:
    """The files of an exported adapter that are published: those that it must have, and others."""
    optional = ["README.md", BASE_RECORD, LABELS, PEFT_WARNING, *EMBEDDING_FILES]
    if not spec.is_routed:
        return [name for name in PEFT_FILES if name not in optional], optional
    folder = run.adapters / spec.name
    parts = [path.name for path in sorted(folder.glob("expert_*")) if path.is_dir()]
    if (folder / SHARED).is_dir():
        parts.append(SHARED)
    files = [f"{part}/{name}" for part in parts for name in PEFT_FILES[:2]]
    warnings = [f"{part}/{PEFT_WARNING}" for part in parts]
    return [ROUTING, ROUTERS, *files], [*optional, HEAD, *warnings]


def _name_base(file: Path, base: str) -> None:
    """Name another base model in a file. The recipe's revision belongs to another repository."""
    content = {**json.loads(file.read_text(encoding="utf-8")), "base_model_name_or_path": base}
    text = json.dumps({**content, "revision": None}, indent=2) + "\n"
    write_atomically(file, lambda path: path.write_text(text, encoding="utf-8"))


def _files(folder: Path) -> dict[str, Path]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {file.relative_to(folder).as_posix(): file for file in files}


def _scores(name: str, staging: Staging) -> dict[str, Path]:
    """The file of evaluation results that the hub shows on a model's page and in the benchmark's table.

    Only for a repository with one adapter: the hub attributes all results to one model.
    """
    scores = benchmarks(staging.report, name)
    if not scores:
        return {}
    file = staging.folder / f"{name}.yaml"
    write_atomically(
        file, lambda path: path.write_text(yaml.safe_dump(scores, sort_keys=False), encoding="utf-8")
    )
    return {".eval_results/flora_train.yaml": file}
