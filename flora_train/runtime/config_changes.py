"""Compares the configuration of a run with the one that it began with: which keys may change when it is
resumed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

from flora_train.config.errors import Problem
from flora_train.config.json_format import JsonObject, JsonValue
from flora_train.config.schema import RunConfig


def comparable(config: RunConfig, without: Collection[str] = (), with_evaluation: bool = False) -> JsonObject:
    """Dotted key -> value, of every key that decides what a run trains and selects.

    without: tasks that are excluded, with the adapters that learn no others. with_evaluation: include keys
    that only decide the final evaluation.
    """
    without = frozenset(without)
    tasks = {name: task for name, task in config.tasks.items() if name not in without}
    adapters = {}
    for name, adapter in config.adapters.items():
        chosen = None if adapter.tasks is None else [task for task in adapter.tasks if task not in without]
        if chosen != []:
            adapters[name] = adapter.model_copy(update={"tasks": chosen})
    rest = config.model_copy(update={"tasks": tasks, "adapters": adapters})
    values = flat(rest.model_dump(mode="json", exclude=RUNTIME_KEYS))
    if with_evaluation:
        return values
    return {key: value for key, value in values.items() if not only_evaluates(key)}


IncludedKeys: TypeAlias = dict[str, bool | set[str]]

RUNTIME_KEYS: IncludedKeys = {
    **dict.fromkeys(
        ("output_dir", "overwrite", "resume", "num_processes", "num_threads", "tracking", "paging"), True
    ),
    "audio": {"workers", "cache_gigabytes"},
    "training": {"keep_checkpoints", "compare_separate", "compare_separate_seconds", "allow_slow"},
}
"""Keys that may change when a run is resumed. Other processes or threads change sums in their last digits."""

FINAL_EVALUATION_KEYS = frozenset(
    [
        "bootstrap_samples",
        "confidence",
        "max_new_tokens",
        "problems",
        "languages",
        "max_problems",
        "num_samples",
        "pass_at_k",
        "temperature",
        "top_p",
        "beams",
        "embedded_clips",
        "batch_rows",
        "sandbox",
        "cpu_seconds",
        "workers",
    ]
)
"""Keys of `evaluation` that have no effect before the end of training. The others select or retire adapters.
"""
TASK_EVALUATION_KEYS = frozenset(
    {
        "language",
        "license",
        "max_metric_examples",
        "max_new_tokens",
        "metrics",
        "sample_prompts",
        "speech.normalizer",
        "speech.metric",
    }
)
"""Keys of a task that have no effect before the end of training."""


def only_evaluates(key: str) -> bool:
    """Whether a dotted key may change in a run that is interrupted: training does not depend on it."""
    section, _, rest = key.partition(".")
    return (section == "evaluation" and rest in FINAL_EVALUATION_KEYS) or (
        section == "tasks" and rest.partition(".")[2] in TASK_EVALUATION_KEYS
    )


def differences(then: Mapping[str, JsonValue], now: Mapping[str, JsonValue], when: str) -> list[Problem]:
    """A problem for every key whose value has changed. when: completes the sentence `was 12 ...`."""
    problems = []
    for key in dict.fromkeys([*then, *now]):
        if key not in now and only_evaluates(key):
            continue  # older versions compared it
        if then.get(key) != now.get(key):
            was = repr(then[key]) if key in then else "not set"
            hint = f"was {was} {when}: set it back, or choose another output_dir"
            problems.append(Problem(key, now.get(key, "not set"), hint))
    return problems


def flat(nested: Mapping[str, JsonValue], prefix: str = "") -> JsonObject:
    """Dotted key -> value, for all values that are not mappings."""
    values: JsonObject = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[f"{prefix}{key}"] = value
    return values
