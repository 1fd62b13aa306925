"""How a run differs from the set-up of published results, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from flora_train.config.language_names import language_key
from flora_train.evaluation.report.formatting import count, listed
from flora_train.evaluation.report.published import PublishedTable, Setup
from flora_train.evaluation.report.published_parts import Contender, Measured, MeasuredPart
from flora_train.evaluation.report.types import Report
from flora_train.runtime.config_changes import flat

TOLERANCE = 0.1
"""Relative difference of sizes up to which they count as equal, as papers round them."""
COUNT_TOLERANCE = 0.25
"""Of the examples of a step, whose lengths vary."""
MOST_NAMES = 6


def same_model(model: str | None, published: str | None) -> bool:
    """Whether two names of a model end alike: a local copy has the name of its folder."""
    if model is None or published is None:
        return False
    return model.rstrip("/").rpartition("/")[2].lower() == published.rpartition("/")[2].lower()


def setup_differences(
    report: Report,
    config: Mapping[str, Any],
    table: PublishedTable,
    measured: Measured,
    *,
    shown: Mapping[str, Sequence[Contender]],
) -> list[str]:
    """What differs from the published set-up, such as `20 steps instead of 1,500`.

    config: the run's configuration; shown: language -> the adapters that stand in the table. Only what is
    published is compared.
    """
    setup = table.setup
    settings = flat(dict(config))
    parts = measured.common(table)
    return [
        *_of_model(report, setup, settings),
        *_of_data(config, setup, parts),
        *_of_steps(report, config, setup, steps=settings.get("training.steps"), parts=parts),
        *_of_adapters(table, shown),
        *_of_problems(table, parts),
        *_number("samples per problem", _least_samples(parts), setup.num_samples),
        *_value("temperature", measured.temperature, setup.temperature),
    ]


def setup_sentence(setup: Setup, differs: Sequence[str]) -> str:
    """The sentence that stands before a table."""
    if setup == Setup():
        return "The published set-up is not described, so that nothing was compared with it."
    if not differs:
        return "No recorded setting of this run differs from the published set-up."
    return f"Not a replication of the published results. In this run: {'; '.join(differs)}."


def task_languages(config: Mapping[str, Any]) -> dict[str, str]:
    """Task -> language of its programs or speech, as published tables name it."""
    languages = {}
    for name, task in _tasks(config).items():
        speech = task.get("speech")
        if isinstance(speech, dict) and isinstance(speech.get("language"), str):
            languages[name] = speech["language"].lower()
        elif isinstance(task.get("language"), str):
            languages[name] = language_key(task["language"])
    return languages


def _tasks(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    tasks = config.get("tasks")
    if not isinstance(tasks, dict):
        return {}
    return {name: task for name, task in tasks.items() if isinstance(task, dict)}


def _of_model(report: Report, setup: Setup, settings: Mapping[str, Any]) -> Iterator[str]:
    model, parameters = report.facts.model, report.facts.base_parameters
    if setup.model is not None and not same_model(model, setup.model):
        yield f"model {model or 'not recorded'} instead of {setup.model}"
    if setup.parameters is not None:
        if parameters is None:
            yield f"an unknown number of parameters instead of {_size(setup.parameters)}"
        elif not _close(parameters, setup.parameters):
            yield f"{_size(parameters)} parameters instead of {_size(setup.parameters)}"
    if setup.quantization is not None:
        yield from _value("quantization", settings.get("model.quantization"), setup.quantization)


def _of_data(config: Mapping[str, Any], setup: Setup, parts: Sequence[MeasuredPart]) -> Iterator[str]:
    """Training data, by name: of the tasks whose languages are compared."""
    if setup.data is None:
        return
    wanted, others = _letters(setup.data), []
    languages = {part.language for part in parts}
    tasks = _tasks(config)
    for name, language in task_languages(config).items():
        source = _source(tasks[name].get("train"))
        if language in languages and wanted not in _letters(source):
            others.append(source)
    if others:
        yield f"training data {listed(list(dict.fromkeys(others)), 2)} instead of {setup.data}"


def _of_steps(
    report: Report, config: Mapping[str, Any], setup: Setup, *, steps: Any, parts: Sequence[MeasuredPart]
) -> Iterator[str]:
    """The number of steps, and the examples in them on average: a step has as many as its tokens hold."""
    yield from _number("steps", steps, setup.steps)
    languages = {part.language for part in parts}
    of_task = task_languages(config)
    per_step = []
    for task in report.tasks:
        if of_task.get(task.name) in languages and isinstance(steps, int) and steps > 0:
            per_step.append(task.epochs * task.train.examples / steps)
    if per_step and setup.examples_per_step is not None:
        mean = float(f"{fmean(per_step):.2g}")
        if not _close(mean, setup.examples_per_step, COUNT_TOLERANCE):
            yield from _number("examples per step and adapter", mean, setup.examples_per_step)


def _source(train: Any) -> str:
    """The source of a task's training rows, for readers."""
    if not isinstance(train, dict):
        return str(train)
    if train.get("hub"):
        return str(train["hub"])
    if train.get("common_voice"):
        return f"Common Voice ({train['common_voice']})"
    files = train.get("files")
    if isinstance(files, list) and files:
        return str(files[0])
    return str(train.get("folder") or files or "not recorded")


def _of_adapters(table: PublishedTable, shown: Mapping[str, Sequence[Contender]]) -> Iterator[str]:
    """Learning rates, variants and ranks: the value of the run and the published one -> methods."""
    rates: dict[tuple[str, str], dict[str, None]] = {}
    variants: dict[tuple[str, str], dict[str, None]] = {}
    ranks: dict[tuple[str, str], dict[str, None]] = {}
    for language, contenders in shown.items():
        for adapter in (contender.adapter for contender in contenders):
            if adapter is None:
                continue
            published_rate, published_rank = (
                table.setup.learning_rates.get(adapter.method),
                table.rank(language),
            )
            if published_rate is not None and not _close(adapter.lr, published_rate, 1e-6):
                pair = f"{adapter.lr:g}", f"{published_rate:g}"
                rates.setdefault(pair, {})[adapter.method] = None
            if table.setup.variant and adapter.variant and adapter.variant != table.setup.variant:
                variants.setdefault((adapter.variant, table.setup.variant), {})[adapter.method] = None
            if published_rank is not None and adapter.rank not in (None, published_rank):
                ranks.setdefault((str(adapter.rank), str(published_rank)), {})[adapter.method] = None
    for what, pairs in (("variant", variants), ("rank", ranks), ("learning rate", rates)):
        for (own, published), methods in pairs.items():
            yield f"{what} {own} of {listed(list(methods))} instead of {published}"


def _of_problems(table: PublishedTable, parts: Sequence[MeasuredPart]) -> Iterator[str]:
    """Languages in which only a part of the problems or clips was evaluated."""
    expected = table.setup.num_problems
    noun = "problems" if table.k is not None else "test clips"
    cut: dict[tuple[int, int], list[str]] = {}
    for part in parts:
        available = part.available
        if expected is not None and part.used < (1 - TOLERANCE) * expected:
            available = max(available, int(expected))
        if part.used < available:
            cut.setdefault((part.used, available), []).append(part.name)
    if cut:
        phrases = []
        for (used, available), names in cut.items():
            phrases.append(f"{count(used)} of {count(available)} {noun} in {listed(names, MOST_NAMES)}")
        yield listed(phrases, MOST_NAMES)


def _least_samples(parts: Sequence[MeasuredPart]) -> int | None:
    return min((part.samples for part in parts if part.samples is not None), default=None)


def _number(noun: str, own: Any, published: float | None) -> Iterator[str]:
    """`20 steps instead of 1,500`."""
    if published is None or not isinstance(own, (int, float)) or own == published:
        return
    if own == 1:
        noun = re.sub(r"^(\w+)s\b", r"\1", noun)
    yield f"{own:,g} {noun} instead of {published:,g}"


def _value(noun: str, own: Any, published: Any) -> Iterator[str]:
    """`temperature 0.2 instead of 0.1`."""
    if published is None or own is None or own == published:
        return
    yield f"{noun} {_written(own)} instead of {_written(published)}"


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _close(own: float, published: float, tolerance: float = TOLERANCE) -> bool:
    return abs(own - published) <= tolerance * published


def _size(parameters: float) -> str:
    """`15.5 billion`, `135 million`, `820 thousand`."""
    for size, noun in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if parameters >= size:
            return f"{parameters / size:.3g} {noun}"
    return f"{parameters:g}"


def _letters(text: str) -> str:
    """Letters and digits alone: `the-stack-dedup` contains `The Stack`."""
    return re.sub(r"[\W_]+", "", text.lower())
