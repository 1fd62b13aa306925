"""The report of a run, built from its metrics, held-out losses and scores."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.array_file import blocks
from flora_train.data.labels.choices import ChoiceSplit
from flora_train.data.labels.split import LabelSplit
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.evaluation.bootstrap import finite
from flora_train.evaluation.code.score_types import CodeSuite
from flora_train.evaluation.figures.result_types import ConfusionMatrix, FigureResult
from flora_train.evaluation.preferences.scores import preference_results
from flora_train.evaluation.report.formatting import listed
from flora_train.evaluation.report.heldout_results import sweep_results, task_result
from flora_train.evaluation.report.sweeps import swept_settings
from flora_train.evaluation.report.types import (
    AdapterFacts,
    Curves,
    Quarantine,
    Report,
    Retirement,
    RunFacts,
    SampleCompletion,
    SplitSummary,
    TaskSummary,
    UnusableClips,
)
from flora_train.evaluation.routing.load_types import ExpertLoad
from flora_train.evaluation.speech.score_types import SpeechResults
from flora_train.runtime.metric_records import Record
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import BestCheckpoint
from flora_train.training.heldout import HeldOut
from flora_train.training.step_plan import make_mixture

MAX_DRAWN_POINTS = 40
"""Points of the curve of tokens drawn."""
MAX_FAMILIES = 8
"""Families that a sentence names."""
MAX_PATHS = 5
"""Paths of clips that were left out, for each reason."""


@dataclass(frozen=True)
class Evaluation:
    """Everything that was evaluated at the end of a run."""

    heldout: Mapping[str, HeldOut]
    """Task -> held-out losses of the base and of the task's adapters."""
    best: Mapping[int, BestCheckpoint]
    """Adapter id -> its best checkpoint."""
    completions: Sequence[SampleCompletion] = ()
    code: Sequence[CodeSuite] = ()
    speech: SpeechResults | None = None
    figures: Sequence[FigureResult] = ()
    confusions: Sequence[ConfusionMatrix] = ()
    experts: Sequence[ExpertLoad] = ()
    notes: Sequence[str] = ()
    """Sentences on what could not be measured."""


@dataclass(frozen=True)
class AdapterCounts:
    """Counts of an adapter since the run began."""

    tokens: int = 0
    skipped_steps: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class TrainingRecord:
    """The last of each adapter's records in metrics.jsonl."""

    task_tokens: Mapping[str, int]
    adapters: Mapping[str, AdapterCounts]
    """Adapter -> counts of the last step that logged it."""
    quarantined: Mapping[str, Quarantine]
    retired: Mapping[str, Retirement]


def build_results(
    config: RunConfig,
    folder: RunFolder,
    tasks: Mapping[str, Task],
    bank: AdapterBank,
    *,
    evaluation: Evaluation,
    facts: RunFacts,
) -> Report:
    """The report of a run. The training curves are read from the run folder's metrics."""
    record = read_training_record(folder)
    shares = make_mixture(tasks, bank.specs, config, joined=facts.joined or None).token_shares()
    summaries = []
    for name, task in tasks.items():
        tokens = record.task_tokens.get(name, 0)
        summaries.append(
            _task_summary(task, config.tasks[name], tokens=tokens, target_share=shares.get(name, 0.0))
        )
    preferences = preference_results(config, bank, evaluation.heldout)
    executed = bool(evaluation.code) or evaluation.speech is not None
    limits = not_measured(config, executed=executed, preferences=bool(preferences))
    return Report(
        name=config.name,
        facts=facts,
        tasks=summaries,
        adapters=[_adapter_facts(bank, i, evaluation.best, record) for i in range(len(bank.specs))],
        results=[task_result(config, bank, part) for part in evaluation.heldout.values() if part.has_text],
        sweeps=sweep_results(
            bank, evaluation.heldout, record.retired, settings=swept_settings(config.adapters)
        ),
        curves=_curves(config, folder, evaluation.heldout),
        completions=evaluation.completions,
        code=evaluation.code,
        speech=evaluation.speech,
        preferences=preferences,
        figures=evaluation.figures,
        confusions=evaluation.confusions,
        experts=evaluation.experts,
        not_measured=[*limits, *evaluation.notes, *facts.origin_differences],
    )


def not_measured(config: RunConfig, *, executed: bool, preferences: bool) -> list[str]:
    """What a reader might take for granted and the report does not show.

    executed: whether programs were executed or clips transcribed; preferences: whether rewards are shown.
    """
    items = []
    if preferences:
        items.append(
            "Whether what the adapters write is preferred: rewards are those of the given completions of "
            "held-out preferences. Nothing was generated for them, and no judge compared it."
        )
    writes = [name for name, task in config.tasks.items() if not (task.embeds or task.is_labelled)]
    if not executed and writes:
        items.append("Whether completions are correct: no program was executed. Held-out loss is not pass@k.")
    if note := _not_measured_between_seeds(config):
        items.append(note)
    if any(adapter.sweep for adapter in config.adapters.values()):
        items.append(
            "An untouched test set for sweeps: winners were chosen on the same held-out examples, "
            "which favours them."
        )
    else:
        items.append("Other learning rates: every method was trained at the recipe's learning rate only.")
    if config.evaluation.select_best and config.evaluation.interval:
        untested = [name for name, task in config.tasks.items() if not _has_test_rows(task)]
        if untested:
            first = config.evaluation.max_examples
            subset = f" (the first {first} of each task)" if first else ""
            scope = "" if len(untested) == len(config.tasks) else f" of {listed(untested, MAX_FAMILIES)}"
            items.append(
                f"An untouched test set{scope}: checkpoints were selected on the same held-out "
                f"examples{subset}, which favours all adapters slightly over the base model."
            )
    return items


def _has_test_rows(task: TaskConfig) -> bool:
    """Whether the results of a task are those of test rows."""
    return task.is_labelled and (task.test is not None or task.test_fraction is not None)


def _not_measured_between_seeds(config: RunConfig) -> str | None:
    """The sentence on what was trained with one seed only; None if nothing was."""
    seeds = Counter(adapter.seeds_of or name for name, adapter in config.adapters.items())
    single = [name for name, count in seeds.items() if count == 1]
    if not single:
        return None
    if len(single) == len(seeds):
        return (
            "Variation between seeds: every adapter was trained once. "
            "Intervals cover the choice of held-out examples only."
        )
    return (
        f"Variation between seeds of {listed(single, MAX_FAMILIES)}: trained with one seed only. "
        "Intervals cover the choice of held-out examples only."
    )


def read_training_record(folder: RunFolder) -> TrainingRecord:
    """The last state of each adapter in metrics.jsonl."""
    steps = folder.read_metrics("step")
    adapters: dict[str, AdapterCounts] = {}
    for record in steps:
        for name, counts in record["adapters"].items():
            adapters[name] = AdapterCounts(
                tokens=int(counts["tokens"] or 0),
                skipped_steps=int(counts.get("skipped_steps") or 0),
                rollbacks=int(counts.get("rollbacks") or 0),
            )
    task_tokens: dict[str, int] = {}
    quarantined = {}
    if steps:
        task_tokens = steps[-1]["task_tokens"]
        for name, stopped in steps[-1].get("quarantined", {}).items():
            quarantined[name] = Quarantine(step=stopped["step"], reason=stopped["why"])
    retired = {}
    for evaluation in folder.read_metrics("evaluation"):
        for name, entry in evaluation.get("left", {}).items():
            retired[name] = Retirement(step=entry["step"], reason=entry["why"])
    return TrainingRecord(task_tokens, adapters, quarantined, retired)


def examples_hash(split: TokenSplit) -> str:
    """SHA-256 of a split's examples: sound and sentences of clips, tokens and labels of text.

    It does not depend on the task's other splits, so that runs with the same held-out rows have the same
    hash.
    """
    digest = sha256()
    names: tuple[str, ...] = ("tokens", "offsets", "spans", "span_offsets", "label_bytes", "pack_offsets")
    if hasattr(split, "shas"):
        names = ("shas", "samples", "sentences")
    elif len(split.labels):
        names = (*names, "labels")
    for text in _target_texts(split):
        digest.update(f"\x1f{text}".encode())
    for name in names:
        values = getattr(split, name)
        digest.update(f"{name}\x1f{values.shape}\x1f".encode())
        if values.dtype.kind == "U":
            digest.update("\x1f".join(values.tolist()).encode())
        else:
            for block in blocks(values):
                digest.update(block.astype(np.int64).tobytes())
    return digest.hexdigest()


def _target_texts(split: TokenSplit) -> Iterator[str]:
    """What each example of labelled texts is labelled with, whatever the order of the labels."""
    if isinstance(split, LabelSplit):
        yield from (split.target_text(i) for i in range(len(split)))
    elif isinstance(split, ChoiceSplit):
        yield from (split.label_names[label] for label in split.references)


def _task_summary(task: Task, task_config: TaskConfig, *, tokens: int, target_share: float) -> TaskSummary:
    test = spoken_language = None
    if task.test is not None:
        test = _split_summary(task.test)
    if task_config.speech is not None:
        spoken_language = task_config.speech.language
    return TaskSummary(
        name=task.name,
        weight=task.weight,
        origin=task.origin or None,
        hub=task_config.train.hub,
        license=task_config.license,
        spoken_language=spoken_language,
        train=_split_summary(task.train),
        validation=_split_summary(task.validation),
        test=test,
        tokens_drawn=tokens,
        target_share=target_share,
        epochs=tokens / max(1, int(task.train.lengths.sum())),
        data_hash=task.data_hash,
        heldout_hash=examples_hash(task.validation),
        test_hash=examples_hash(task.validation if task.test is None else task.test),
    )


def _split_summary(split: TokenSplit) -> SplitSummary:
    """Counts of a split. clips_left_out.tsv has the paths of all clips that were left out."""
    counts = split.counts
    unusable = {}
    for reason, paths in counts.unusable.items():
        unusable[reason] = UnusableClips(
            clips=len(paths), first=[_relative(path) for path in paths[:MAX_PATHS]]
        )
    return SplitSummary(
        rows=counts.rows,
        unsampled=counts.unsampled,
        empty=counts.empty,
        over_long_truncated=counts.over_long_truncated,
        over_long_split=counts.over_long_split,
        over_long_dropped=counts.over_long_dropped,
        prompt_too_long=counts.prompt_too_long,
        documents=counts.documents,
        examples=counts.examples,
        tokens=counts.tokens,
        label_tokens=counts.label_tokens,
        unusable=unusable,
        seconds=counts.seconds,
        special_tokens=dict(counts.special_tokens),
    )


def _relative(path: str) -> str:
    """Relative to the working directory where it is inside: reports are shared and name no local folders."""
    if Path(path).is_relative_to(Path.cwd()):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _adapter_facts(
    bank: AdapterBank, adapter: int, best: Mapping[int, BestCheckpoint], record: TrainingRecord
) -> AdapterFacts:
    spec = bank.specs[adapter]
    pool, _ = bank.location[adapter]
    counts = record.adapters.get(spec.name, AdapterCounts())
    smallest, largest = pool.ranks
    selected = variant = smallest_rank = None
    if smallest != largest:
        smallest_rank = smallest
    if adapter in best:
        selected = best[adapter].step
    if spec.method == "flora":
        variant = "residual" if spec.offset else "pure"
    return AdapterFacts(
        name=spec.name,
        task=spec.task,
        family=spec.family,
        seed=spec.seed,
        seeds_of=spec.seeds_of,
        method=spec.method,
        rank=largest or None,
        smallest_rank=smallest_rank,
        variant=variant,
        lr=spec.lr,
        parameters=pool.row_size,
        tokens=counts.tokens,
        skipped_steps=counts.skipped_steps,
        selected_step=selected,
        rollbacks=counts.rollbacks,
        quarantined=record.quarantined.get(spec.name),
        retired=record.retired.get(spec.name),
    )


def _curves(config: RunConfig, folder: RunFolder, heldout: Mapping[str, HeldOut]) -> Curves:
    first = config.evaluation.max_examples
    steps = folder.read_metrics("step")
    last = len(steps) - 1
    sampled = []
    if steps:
        indices = {round(i * last / MAX_DRAWN_POINTS) for i in range(MAX_DRAWN_POINTS + 1)}
        sampled = [steps[i] for i in sorted(indices)]
    drawn = {}
    for name in heldout:
        drawn[name] = [(record["step"], record["task_tokens"].get(name, 0)) for record in sampled]
    return Curves(
        training=_loss_curves(steps),
        heldout=_loss_curves(folder.read_metrics("evaluation")),
        drawn=drawn,
        base={
            name: finite(_curve_loss(losses, first))
            for name, losses in heldout.items()
            if BASE_ID in losses.nats
        },
        heldout_examples=first,
    )


def _curve_loss(heldout: HeldOut, first: int | None) -> float:
    """The base's loss on the first examples, as training logs it of adapters; NaN where it is not known."""
    examples = len(heldout.nats[BASE_ID])
    if heldout.embeddings is not None and first is not None and first < examples:
        return math.nan  # of fewer examples, the groups in which they are compared are others
    if heldout.preferences is None:
        return heldout.loss(BASE_ID, first)
    return float(heldout.preferences.losses[BASE_ID][:first].mean())


def _loss_curves(records: Sequence[Record]) -> dict[str, list[tuple[int, float | None]]]:
    """Adapter -> (step, loss) of every record that has it."""
    curves: dict[str, list[tuple[int, float | None]]] = {}
    for record in records:
        for name, counts in record["adapters"].items():
            curves.setdefault(name, []).append((record["step"], finite(counts["loss"])))
    return curves
