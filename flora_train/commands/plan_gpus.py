"""The part of `flora-train plan` about GPUs that this machine does not have: memory, and hours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table
from torch import nn

from flora_train.adapters.pool import Pool, numbers_of
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import UserError
from flora_train.config.language_names import language_key
from flora_train.config.schema import RunConfig
from flora_train.config.terminal_text import shown
from flora_train.data.preferences.split import PreferenceSplit
from flora_train.data.task import Task
from flora_train.evaluation.code.contenders import languages_of
from flora_train.evaluation.code.problems.suites import HUB_PREFIX, load_suite
from flora_train.evaluation.code.programs.languages import load_languages
from flora_train.models.speech_encoder import is_speech_model, is_whisper
from flora_train.runtime.progress import duration
from flora_train.training.capacity import FLOAT, format_size
from flora_train.training.gpu_hours import (
    MEASURED_ON,
    MEASURED_SPEED,
    PROBLEMS_OF_A_LANGUAGE,
    SHORT_TEXT,
    SOURCE,
    Work,
    generation_hours,
    hours,
    work_of,
)
from flora_train.training.gpu_memory import CONTEXT, FRAGMENTATION, GpuPlan, Needs, plan_gpus
from flora_train.training.step_memory import BatchShape, dtype_on_gpu, measure_shapes

CORES = 16
"""Cores that execute programs, in the estimate."""
PROGRAMS_A_SECOND = {"interpreted": 10.8, "compiled": 1.45}
"""Programs that one core executes: Lua and C++ in EXECUTION_SOURCE, on two cores."""
EXECUTION_SOURCE = "benchmarks/results/execution.md"
CLIPS = 1000
"""Clips of a language for which the hours of transcribing are given."""


@dataclass(frozen=True)
class GpuReport:
    """Memory and work of a run."""

    plans: Sequence[GpuPlan]
    work: Work
    programs: Mapping[str, int]
    """Compiled or interpreted -> programs to be executed."""


def report_on_gpus(
    config: RunConfig, model: nn.Module, pools: Sequence[Pool], tasks: Mapping[str, Task]
) -> GpuReport:
    """model: without weights. tasks: with their rows, or with assumed ones."""
    batch = largest_batch(config, tasks)
    step = measure_shapes(config.model, pools, batch)
    adapter_bytes = FLOAT * numbers_of(pools)
    specs = [spec for pool in pools for spec in pool.specs]
    programs = _programs(config, specs)
    gathered_bytes = FLOAT * max(pool.row_size for pool in pools)
    needs = Needs(config, model, adapter_bytes=adapter_bytes, gathered_bytes=gathered_bytes, step=step)
    work = work_of(config, model, specs, tasks=tasks, step=step, completions=sum(programs.values()))
    return GpuReport(plan_gpus(needs), work, programs)


def largest_batch(config: RunConfig, tasks: Mapping[str, Task]) -> BatchShape:
    """The micro-batch of the longest rows."""
    length = window = 0
    for task in tasks.values():
        split = task.train
        if isinstance(split, PreferenceSplit):  # each completion is a row
            if split.longest_row > length:
                length, window = split.longest_row, 0
            continue
        longest = int(split.lengths.argmax())
        if split.lengths[longest] > length:
            length, window = int(split.lengths[longest]), split.window(longest)
    rows = max(1, config.training.tokens_per_microbatch // length)
    return BatchShape(rows, length - window, window)


def _programs(config: RunConfig, specs: Sequence[AdapterSpec]) -> dict[str, int]:
    """Programs of all languages, by how they are run: of the base and of every adapter of the language."""
    programs = {"interpreted": 0, "compiled": 0}
    if not config.evaluation.problems:
        return programs
    evaluation, table = config.evaluation, load_languages(config.evaluation.cpu_seconds)
    of_tasks = languages_of(config)
    for key in sorted(evaluation.languages or set(of_tasks.values())):
        learners = sum(of_tasks.get(spec.task) == key for spec in specs)
        language = table.get(language_key(key))
        is_compiled = language is not None and language.compile is not None
        kind = "compiled" if is_compiled else "interpreted"
        problems = sum(_count_problems(config, source, key) for source in evaluation.problems)
        programs[kind] += problems * evaluation.num_samples * (1 + learners)
    return programs


def _count_problems(config: RunConfig, source: str, language: str) -> int:
    """Problems of a suite in one language: on the hub, as many as MultiPL-E's."""
    count = PROBLEMS_OF_A_LANGUAGE
    if not source.startswith(HUB_PREFIX):
        try:
            count = len(load_suite(source, [language], None).problems[language])
        except UserError:  # the suite has none in this language, or is missing, which the run reports
            count = 0
    return min(count, config.evaluation.max_problems or count)


def print_gpus(console: Console, config: RunConfig, report: GpuReport) -> None:
    """The tables, and where their numbers come from."""
    console.print()
    dtype = str(dtype_on_gpu(config.model)).removeprefix("torch.")
    console.print(f"GPUs, estimated: GB of memory on each, with the base in {dtype}")
    table = _table("", "base", "adapters", "step", "generation", "total", "")
    for plan in report.plans:
        memory = plan.memory
        sizes = (memory.base, memory.adapters, memory.activations, memory.generation, memory.total)
        verdict = "fits" if plan.fits else "too much"
        table.add_row(plan.setup.name, *(f"{size / 1e9:.1f}" for size in sizes), verdict)
    console.print(table)
    for line in (*_advice(config, report.plans), *_on_memory(config, report)):
        console.print(shown(line), soft_wrap=False)
    console.print()
    console.print("Hours, estimated")
    console.print(_hours_table(report))
    for line in _on_hours(report):
        console.print(shown(line), soft_wrap=False)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if number == 0 or not column else "right"
        table.add_column(column, justify=justify)
    return table


def _advice(config: RunConfig, plans: Sequence[GpuPlan]) -> Iterator[str]:
    """For each setup that needs other keys than the recipe's, these keys."""
    for plan in plans:
        if plan.settings is None or plan.fitting is None:
            yield (
                f"{plan.setup.name}: does not fit with the shortest micro-batch and gradient checkpointing; "
                "lower training.max_length or the ranks, or use a smaller model.path"
            )
            continue
        keys = [*plan.setup.overrides(config), *plan.settings.overrides(config)]
        if keys:
            yield f"{plan.setup.name}: {format_size(plan.fitting.total)} with {' '.join(keys)}"


def _on_memory(config: RunConfig, report: GpuReport) -> Iterator[str]:
    generation, larger = "", ""
    if any(plan.memory.generation for plan in report.plans):
        rows = config.evaluation.batch_rows
        generation = f" generation, after training: evaluation.batch_rows={rows} texts at their full length;"
        larger = "the larger of both, "
    tokens = config.training.tokens_per_microbatch
    yield (
        f"step: what training.tokens_per_microbatch={tokens} keeps for the backward, and a layer's backward;"
        f"{generation} total: {larger}with {CONTEXT / 1e9:.0f} GB for CUDA and {FRAGMENTATION:.0%} for the "
        "allocator."
    )


def _hours_table(report: GpuReport) -> Table:
    work = report.work
    columns = ["training", "held-out"]
    if work.completions:
        columns += [f"texts of {tokens} tokens" for tokens in _text_lengths(work)]
    if work.clip:
        columns.append(f"{CLIPS} test clips a language")
    table = _table("", *columns)
    for plan in report.plans:
        size, gpus = plan.setup.gigabytes, plan.setup.gpus
        operations = dict(work.training)
        if plan.settings is not None and plan.settings.checkpointing:
            for method, count in work.recomputing.items():
                operations[method] += count
        times = [hours(operations, size, gpus), hours(work.heldout, size, gpus)]
        if work.completions:
            times += [generation_hours(work, tokens, size, gpus) for tokens in _text_lengths(work)]
        if work.clip:
            times.append(hours({"flora": CLIPS * work.contenders * work.clip}, size, gpus))
        table.add_row(plan.setup.name, *(duration(3600 * time) for time in times))
    return table


def _text_lengths(work: Work) -> list[int]:
    """Of a usual text and of the longest."""
    return sorted({min(SHORT_TEXT, work.max_new_tokens), work.max_new_tokens})


def _on_hours(report: GpuReport) -> Iterator[str]:
    speeds = ", ".join(f"{method} {speed:,}" for method, speed in MEASURED_SPEED.items())
    yield (
        f"From one measurement, by parameters and tokens: a step of StarCoder2-3B on {MEASURED_ON} "
        f"({SOURCE}, tokens/s: {speeds}). 24 GB: by the data sheets of an RTX 4090 and an H100. Several "
        "GPUs: an even share each. Neither was measured."
    )
    if report.work.completions:
        seconds = sum(count / PROGRAMS_A_SECOND[kind] for kind, count in report.programs.items())
        yield (
            f"Problems: {report.work.completions:,} texts are generated (at the speed of the step, "
            "which decoding reaches at best; it was not measured on a GPU), and executed in "
            f"{seconds / 3600:.0f} core hours, {duration(seconds / CORES)} on {CORES} cores (by Lua and C++ "
            f"in {EXECUTION_SOURCE})."
        )
    if report.work.clip:
        yield (
            f"Transcripts: {report.work.contenders} models in all, each of its language's test clips. A "
            "release has more or fewer clips."
        )


def print_report(
    console: Console, config: RunConfig, model: nn.Module, *, pools: Sequence[Pool], tasks: Mapping[str, Task]
) -> None:
    """Plan other GPUs, or say why they cannot be planned."""
    if is_speech_model(model.config) and not is_whisper(model.config):
        return
    try:
        report = report_on_gpus(config, model, pools, tasks)
    except UserError as error:
        for problem in error.problems:
            console.print(shown(f"note: other GPUs: {problem}"))
        return
    print_gpus(console, config, report)
