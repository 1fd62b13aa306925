"""References: log-probabilities of preferences that are computed before training, and kept on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID, AdapterSpec
from flora_train.config.errors import UserError, user_error
from flora_train.config.json_format import JsonObject
from flora_train.data.batch import Row
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.runtime.atomic import user_cache, write_atomically
from flora_train.runtime.checksum import DamagedError, check_regular, damaged_file, verify, with_checksums
from flora_train.runtime.distributed import on_main_process
from flora_train.runtime.progress import ProgressBar
from flora_train.training.loss import RowLosses
from flora_train.training.preference_rows import CHOSEN, KL, REJECTED, part_of
from flora_train.training.row_nats import compute_nats

if TYPE_CHECKING:
    from flora_train.training.context import TrainingContext

logger = logging.getLogger(__name__)

Values = NDArray[np.float64]
Parts = Mapping[int, Values]
"""Part of a preference (see `part_of`) -> log p of every example; NaN where it was not computed."""
VERSION = 1


class References:
    """The references of all adapters whose reference is not a row of the batch."""

    def __init__(self) -> None:
        self.training: dict[int, Parts] = {}
        """Adapter id -> its reference on training examples."""
        self.validation: dict[int, Parts] = {}

    def logp(self, row: Row) -> float:
        """Of the completion of a training row, for the reference of the row's adapter."""
        return float(self.training[row.adapter][part_of(row)][row.example])

    def heldout(self, adapter: int) -> Parts | None:
        """Part -> log p of every held-out example, for the reference of an adapter; None where its reference
        is the base, whose rows are in the evaluation."""
        return self.validation.get(adapter)


def zero_references(bank: AdapterBank, tasks: Mapping[str, Task]) -> References:
    """References of 0 everywhere, for steps whose cost is measured without training."""
    references = References()
    for adapter, spec in enumerate(bank.specs):
        task = tasks[spec.task]
        if task.preference is not None and task.preference.reads_cache(spec.init_from is not None):
            zeros = np.zeros(len(task.train))
            references.training[adapter] = dict.fromkeys((CHOSEN, REJECTED, KL), zeros)
    return references


@dataclass
class _Source:
    """A reference of one task: the base model, or the initial state of an adapter."""

    task: Task
    adapter: int
    """-1: the base."""
    users: list[int] = field(default_factory=list)
    """Adapters that are compared with it."""
    path: Path = Path()
    facts: JsonObject = field(default_factory=dict)
    """What the numbers depend on."""
    values: dict[str, dict[int, Values]] = field(default_factory=dict)
    """Split -> its parts."""

    def split(self, name: str) -> PreferenceSplit:
        split = getattr(self.task, name)
        assert isinstance(split, PreferenceSplit)
        return split

    def rows(self, name: str, examples: Collection[int]) -> list[Row]:
        """The rows of these examples of a split that were not computed."""
        split, rows = self.split(name), []
        for example in sorted(examples):
            for part, values in self.values[name].items():
                if np.isnan(values[example]):
                    rows.append(self._row(split, example, part))
        return rows

    def _row(self, split: PreferenceSplit, example: int, part: int) -> Row:
        partner = split.partner(example) if part == KL else None
        document = 1 if part == REJECTED else 0
        length = split.size(example, document, partner)
        return Row(self.adapter, self.task.name, example, length, document=document, completion_of=partner)


def prepare_references(
    context: TrainingContext,
    *,
    base_hash: Callable[[], str],
    init_adapters: Callable[[list[int]], None],
    fresh: Collection[int] = (),
    trained_on: Mapping[str, Collection[int]] | None = None,
) -> None:
    """Fill the context's references for all preferences that do not have theirs in the batch: from disk, or
    else by computing and saving them. Collective.

    base_hash: of the base's weights; init_adapters: loads the initial state of adapters with init_from;
    fresh: adapters that are in this state already; trained_on: task -> its training examples that are needed.
    Raises UserError if an initial state is needed and missing, or if a file on disk is of another base.
    """
    sources = _sources(context)
    known = context.references.validation.keys() >= {user for source in sources for user in source.users}
    if not sources or (known and trained_on is None):
        return
    hashed = base_hash()
    for source in sources:
        _identify(source, context, hashed)
        source.values = on_main_process(partial(_read, source)) or _empty(source)
    wanted = trained_on or {}
    missing: dict[str, list[Row]] = {"train": [], "validation": []}
    for source in sources:
        missing["train"] += source.rows("train", wanted.get(source.task.name, ()))
        missing["validation"] += source.rows("validation", range(len(source.task.validation)))
    incomplete = {(row.task, row.adapter) for rows in missing.values() for row in rows}
    stale = sorted(adapter for _, adapter in incomplete if adapter not in (BASE_ID, *fresh))
    if incomplete:
        with _initial_state(context, stale, init_adapters):
            _compute(context, sources, missing)
        for source in sources:
            if (source.task.name, source.adapter) in incomplete:
                on_main_process(partial(_save, source))
    for source in sources:
        for adapter in source.users:
            context.references.training[adapter] = source.values["train"]
            context.references.validation[adapter] = source.values["validation"]


def _sources(context: TrainingContext) -> list[_Source]:
    """The references that are computed before training."""
    sources: dict[tuple[str, int], _Source] = {}
    for adapter, spec in enumerate(context.bank.specs):
        task = context.tasks.get(spec.task)
        if task is None or task.preference is None:
            continue
        has_initial_state = spec.init_from is not None
        if task.preference.reads_cache(has_initial_state):
            of = adapter if has_initial_state else BASE_ID
            sources.setdefault((task.name, of), _Source(task, of)).users.append(adapter)
    return list(sources.values())


def _identify(source: _Source, context: TrainingContext, base: str) -> None:
    """Set the facts of a source and its file: one for all runs of the base, else one of the run."""
    source.facts = {"version": VERSION, "base": base, "examples": source.task.data_hash}
    key = sha256(json.dumps(source.facts).encode()).hexdigest()[:32]
    if source.adapter == BASE_ID:
        source.path = user_cache("references") / f"{key}.safetensors"
        return
    spec: AdapterSpec = context.bank.specs[source.adapter]
    source.facts["init_from"] = str(spec.init_from)
    source.path = context.folder.path / "references" / f"{spec.name}.{key[:12]}.safetensors"


def _empty(source: _Source) -> dict[str, dict[int, Values]]:
    """No value of a source."""
    parts = (CHOSEN, REJECTED)
    if not source.split("train").is_paired:
        parts = (CHOSEN, KL)
    return {
        name: {part: np.full(len(source.split(name)), np.nan) for part in parts}
        for name in ("train", "validation")
    }


def _read(source: _Source) -> dict[str, dict[int, Values]] | None:
    """The values in the file of a source; None if there is no whole file of these examples."""
    try:
        with damaged_file():
            check_regular(source.path)
            with safe_open(source.path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            verify(header, tensors)
            facts = json.loads(header["facts"])
    except DamagedError:
        with suppress(OSError):
            source.path.unlink(missing_ok=True)
        return None
    if facts.get("base") != source.facts["base"]:
        raise user_error(str(source.path), None, "holds a reference of another base model: delete this file")
    values = _empty(source)
    for name, parts in values.items():
        for part, empty in parts.items():
            saved = tensors.get(f"{name}.{part}")
            if facts != source.facts or saved is None or len(saved) != len(empty):
                return None
            parts[part] = saved.numpy().copy()
    return values


def _save(source: _Source) -> None:
    """Write the values of a source. A cache that cannot be written costs time, not the run."""
    tensors = {
        f"{name}.{part}": torch.from_numpy(values)
        for name, parts in source.values.items()
        for part, values in parts.items()
    }
    header = with_checksums(tensors, json.dumps(source.facts))
    try:
        write_atomically(source.path, lambda path: save_file(tensors, path, header))
    except UserError as error:
        logger.warning(f"reference log-probabilities are not kept: {error}")


@contextmanager
def _initial_state(
    context: TrainingContext, adapters: Sequence[int], init_adapters: Callable[[list[int]], None]
) -> Iterator[None]:
    """A context in which these adapters are in the state that init_from names."""
    bank = context.bank
    present = {adapter: bank.row(adapter).detach().clone() for adapter in adapters}
    if adapters:
        init_adapters(list(adapters))
    try:
        yield
    finally:
        for adapter, values in present.items():
            bank.row(adapter).copy_(values)


def _compute(
    context: TrainingContext, sources: Sequence[_Source], missing: Mapping[str, Sequence[Row]]
) -> None:
    """Fill in the values of the missing rows, by split."""
    by_key = {(source.task.name, source.adapter): source for source in sources}
    total = sum(map(len, missing.values()))
    done = 0
    row_losses = RowLosses(context.model)
    with ProgressBar("reference", 1.0) as progress:
        for name, rows in missing.items():
            if not rows:
                continue
            first, share = done / total, len(rows) / total
            nats = compute_nats(
                row_losses,
                context.bank,
                rows,
                partial(_split_of, context.tasks, name),
                max_tokens=2 * context.config.training.tokens_per_microbatch,
                pad_token=context.pad_token,
                collate=context.collate,
                report=partial(_update, progress, first, share),
            )
            for row, value in zip(rows, nats, strict=True):
                by_key[row.task, row.adapter].values[name][part_of(row)][row.example] = -value
            done += len(rows)


def _split_of(tasks: Mapping[str, Task], split: str, task: str) -> TokenSplit:
    tokens: TokenSplit = getattr(tasks[task], split)
    return tokens


def _update(progress: ProgressBar, first: float, share: float, done: float) -> None:
    """Show `done` of a part of the work that is `share` of it all and begins at `first`."""
    progress.update(first + share * done)
