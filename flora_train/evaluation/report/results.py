"""The report of a run, built from its metrics, held-out losses and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.spec import BASE_ID
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.data.array_file import blocks
from flora_train.data.splits import seed_of
from flora_train.data.task import Task
from flora_train.data.token_split import TokenSplit
from flora_train.evaluation.bootstrap import Comparison, compare, compared_pairs, finite
from flora_train.evaluation.code.score_types import CodeSuite
from flora_train.evaluation.preferences.scores import preference_results
from flora_train.evaluation.report.sweeps import swept_settings
from flora_train.evaluation.report.types import (
    AdapterFacts,
    BaseResult,
    ContenderResult,
    Curves,
    Difference,
    Quarantine,
    Report,
    Retirement,
    RunFacts,
    SampleCompletion,
    SplitSummary,
    SweepMember,
    SweepResult,
    TaskObjective,
    TaskResult,
    TaskSummary,
    UnusableClips,
)
from flora_train.evaluation.speech.score_types import SpeechResults
from flora_train.runtime.metric_records import Record
from flora_train.runtime.run_folder import RunFolder
from flora_train.training.best_adapters import BestCheckpoint
from flora_train.training.heldout import HeldOut
from flora_train.training.step_plan import make_mixture

MAX_DRAWN_POINTS = 40
"""Points of the curve of tokens drawn."""
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
        results=[_task_result(config, bank, heldout) for heldout in evaluation.heldout.values()],
        sweeps=sweep_results(
            bank, evaluation.heldout, record.retired, settings=swept_settings(config.adapters)
        ),
        curves=_curves(config, folder, evaluation.heldout),
        completions=evaluation.completions,
        code=evaluation.code,
        speech=evaluation.speech,
        preferences=preferences,
        not_measured=[*limits, *facts.origin_differences],
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
    if not executed:
        items.append("Whether completions are correct: no program was executed. Held-out loss is not pass@k.")
    items.append(
        "Variation between seeds: every adapter was trained once. "
        "Intervals cover the choice of held-out examples only."
    )
    if any(adapter.sweep for adapter in config.adapters.values()):
        items.append(
            "An untouched test set for sweeps: winners were chosen on the same held-out examples, "
            "which favours them."
        )
    else:
        items.append("Other learning rates: every method was trained at the recipe's learning rate only.")
    if config.evaluation.select_best and config.evaluation.interval:
        first = config.evaluation.max_examples
        subset = f" (the first {first} of each task)" if first else ""
        items.append(
            f"An untouched test set: checkpoints were selected on the same held-out examples{subset}, "
            "which favours all adapters slightly over the base model."
        )
    return items


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
    """SHA-256 of a split's examples: sound and sentences of clips, tokens of text.

    It does not depend on the task's other splits, so that runs with the same held-out rows have the same
    hash.
    """
    digest = sha256()
    names: tuple[str, ...] = ("tokens", "offsets", "spans", "span_offsets", "label_bytes", "pack_offsets")
    if hasattr(split, "shas"):
        names = ("shas", "samples", "sentences")
    for name in names:
        values = getattr(split, name)
        digest.update(f"{name}\x1f{values.shape}\x1f".encode())
        if values.dtype.kind == "U":
            digest.update("\x1f".join(values.tolist()).encode())
        else:
            for block in blocks(values):
                digest.update(block.astype(np.int64).tobytes())
    return digest.hexdigest()


def sweep_results(
    bank: AdapterBank,
    heldout: Mapping[str, HeldOut],
    retired: Mapping[str, Retirement],
    *,
    settings: Mapping[str, Mapping[str, float | str]],
) -> list[SweepResult]:
    """A result for every sweep and task.

    retired: adapter name -> its retirement; settings: family -> values of the swept keys.
    """
    results = []
    for sweep, task in dict.fromkeys(
        (spec.sweep, spec.task) for spec in bank.specs if spec.sweep is not None
    ):
        specs = [spec for spec in bank.specs if (spec.sweep, spec.task) == (sweep, task)]
        members = []
        for spec in specs:
            adapter = bank.ids[spec.name]
            preference_loss = None
            if heldout[task].preferences is not None:
                preference_loss = finite(_mean_loss(heldout[task], adapter))
            member = SweepMember(
                family=spec.family,
                settings=dict(settings.get(spec.family, {})),
                bits_per_byte=finite(heldout[task].bits_per_byte(adapter)),
                preference_loss=preference_loss,
                retired=retired.get(spec.name),
            )
            members.append(member)
        losses = {spec.family: _mean_loss(heldout[task], bank.ids[spec.name]) for spec in specs}
        measured = [family for family, loss in losses.items() if math.isfinite(loss)]
        winner = min(measured, key=lambda family: losses[family], default=None)
        objective = _objective(heldout[task])
        results.append(
            SweepResult(sweep=sweep, task=task, objective=objective, winner=winner, members=members)
        )
    return results


def _objective(heldout: HeldOut) -> TaskObjective:
    return "sft" if heldout.preferences is None else heldout.preferences.objective


def _mean_loss(heldout: HeldOut, adapter: int) -> float:
    """The loss that adapters of a task are compared by: of the objective, or bits per byte."""
    if heldout.preferences is None:
        return heldout.bits_per_byte(adapter)
    return float(heldout.preferences.losses[adapter].mean())


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


def _task_result(config: RunConfig, bank: AdapterBank, heldout: HeldOut) -> TaskResult:
    options, seed = config.evaluation, seed_of(config.seed, heldout.task)
    comparison = compare(heldout, samples=options.bootstrap_samples, confidence=options.confidence, seed=seed)
    adapters = [adapter for adapter in heldout.nats if adapter != BASE_ID]
    losses = {adapter: _mean_loss(heldout, adapter) for adapter in adapters}
    measured = [adapter for adapter, loss in losses.items() if math.isfinite(loss)]
    best = min(measured, key=lambda adapter: losses[adapter], default=None)
    contenders = []
    for adapter in adapters:
        spec = bank.specs[adapter]
        contenders.append(
            ContenderResult(
                name=spec.name,
                family=spec.family,
                bits_per_byte=comparison.contenders[adapter].interval(),
                loss=finite(heldout.loss(adapter)),
                perplexity=_perplexity(heldout.loss(adapter)),
                difference_to_base=comparison.differences[adapter, BASE_ID].interval(),
                best=adapter == best,
            )
        )
    base = BaseResult(
        bits_per_byte=comparison.contenders[BASE_ID].interval(),
        loss=finite(heldout.loss(BASE_ID)),
        perplexity=_perplexity(heldout.loss(BASE_ID)),
    )
    return TaskResult(
        task=heldout.task,
        objective=_objective(heldout),
        examples=len(heldout.label_bytes),
        label_tokens=int(heldout.label_tokens.sum()),
        label_bytes=int(heldout.label_bytes.sum()),
        confidence=options.confidence,
        base=base,
        contenders=contenders,
        differences=_differences(bank, adapters, best, comparison),
    )


def _perplexity(loss: float) -> float | None:
    """exp(loss), limited to what a float can hold."""
    return finite(math.exp(min(loss, 700.0)))


def _differences(
    bank: AdapterBank, adapters: Sequence[int], best: int | None, comparison: Comparison
) -> list[Difference]:
    differences = []
    for a, b in compared_pairs(adapters, best):
        bits = comparison.differences[a, b].interval()
        differences.append(
            Difference(first=bank.specs[a].family, second=bank.specs[b].family, bits_per_byte=bits)
        )
    return differences


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
        base={name: finite(_curve_loss(losses, first)) for name, losses in heldout.items()},
        heldout_examples=first,
    )


def _curve_loss(heldout: HeldOut, first: int | None) -> float:
    """The base's loss on the first examples, as training logs it of adapters."""
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
