"""Checks between the section `federated` and the others: what cannot be run in rounds is refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from flora_train.config.adapter_schema import AdapterConfig
from flora_train.config.base import ConfigModel
from flora_train.config.errors import Problem, choices, did_you_mean
from flora_train.config.federated_schema import GLOBAL_TASK, FederatedConfig, StrategyConfig
from flora_train.config.model_schema import ModelConfig
from flora_train.config.task_schema import TaskConfig

METHODS: Mapping[str, tuple[str, ...]] = {
    "product_mean": ("lora", "flora", "ia3", "head"),
    "factor_mean": ("lora", "flora", "ia3", "head"),
    "fedex": ("lora",),
    "slora": ("lora", "flora"),
    "full": ("head",),
}
"""Algorithm -> the methods of adapters that it averages."""
CHANGES_BASE = ("fedex", "full")
"""Algorithms that change the weights of the base."""
WITH_RANKS = ("lora", "flora")
USED: Mapping[str, tuple[str, ...]] = {
    "evaluation": ("bootstrap_samples", "confidence"),
    "training": (
        "steps",
        "tokens_per_microbatch",
        "max_length",
        "optimizer",
        "betas",
        "eps",
    ),
}
"""Section -> its keys that rounds use; of other sections none."""
UNUSED_OF_ADAPTERS: Mapping[str, str] = {
    "tasks": "every client trains the adapter: remove it",
    "init_from": "the first round begins with the initial values of federated.seeds: remove it",
    "seed": "use federated.seeds, which repeat the whole run",
    "sweep": "a list of values is not compared in rounds: use one strategy for each value",
    "seeds_of": "use federated.seeds, which repeat the whole run",
    "patience": "has no effect in rounds: remove it",
    "min_delta": "has no effect in rounds: remove it",
    "max_steps": "clients train training.steps steps in a round: remove it",
    "ema_decay": "a client begins every round anew: remove it",
}
"""Keys of an adapter that rounds do not use -> what to do instead."""


def federated_problems(
    federated: FederatedConfig,
    tasks: Mapping[str, TaskConfig],
    adapters: Mapping[str, AdapterConfig],
    sections: Mapping[str, ConfigModel],
    *,
    model: ModelConfig,
) -> list[Problem]:
    """Contradictions between federated rounds and the rest of a configuration.

    Args:
        federated: The section.
        tasks: Of the run.
        adapters: Of the run.
        sections: Sections of which rounds use no key, or those of USED, by name.
        model: Of the run.

    Returns:
        One problem for each contradiction.
    """
    problems = [*_of_tasks(federated, tasks), *_of_adapters(federated, adapters)]
    for name, strategy in federated.strategies.items():
        problems += _of_strategy(f"federated.strategies.{name}", strategy, adapters, federated)
        if strategy.algorithm in CHANGES_BASE and model.quantization != "none":
            hint = f"cannot be changed, as algorithm={strategy.algorithm} would: use quantization=none"
            problems.append(Problem("model.quantization", model.quantization, hint))
    if model.fsdp:
        hint = "divides the base among processes, and federated rounds run in one: remove it"
        problems.append(Problem("model.fsdp", True, hint))
    for section, given in sections.items():
        for key, field in type(given).model_fields.items():
            value = getattr(given, key)
            if key in USED.get(section, ()) or value == field.get_default(call_default_factory=True):
                continue
            problems.append(
                Problem(f"{section}.{key}", value, "has no effect on federated rounds: remove it")
            )
    return problems


def _of_tasks(federated: FederatedConfig, tasks: Mapping[str, TaskConfig]) -> Iterator[Problem]:
    if federated.split == "dirichlet":
        if len(tasks) > 1:
            hint = (
                f"are {len(tasks)}, and federated.split=dirichlet divides one: leave one, or use "
                "federated.split=tasks, where every task is a client"
            )
            yield Problem("tasks", None, hint)
        for name, task in tasks.items():
            if not _has_single_label(task):
                hint = (
                    "has no single label for each text, by which federated.split=dirichlet divides: use "
                    "federated.split=tasks"
                )
                yield Problem(f"tasks.{name}", None, hint)
    for name, task in tasks.items():
        if name.lower() == GLOBAL_TASK:
            yield Problem(f"tasks.{name}", None, "is what the global adapter is called: rename it")
        if task.weight != 1.0:
            hint = "has no effect on federated rounds, where examples are the weights of clients: remove it"
            yield Problem(f"tasks.{name}.weight", task.weight, hint)
        if not _is_trainable(task):
            hint = "is of a kind that federated rounds do not train: labelled texts and texts are possible"
            yield Problem(f"tasks.{name}", None, hint)
        elif task.has_head and not _has_single_label(task):
            hint = "federated rounds train heads of one label for each text: remove the task"
            yield Problem(f"tasks.{name}", None, hint)
        if federated.split == "tasks" and task.has_head and not task.labels:
            hint = "is required, so that the heads of all clients have the same outputs: list the labels"
            yield Problem(f"tasks.{name}.labels", None, hint)


def _is_trainable(task: TaskConfig) -> bool:
    """Whether it has labelled texts, or texts whose tokens are learnt."""
    others = (
        task.speech is not None,
        task.objective not in (None, "sft"),
        task.embeds,
        task.task_id is not None,
    )
    return not any(others)


def _has_single_label(task: TaskConfig) -> bool:
    return task.has_head and not (task.regression or task.multi_label or task.token_labels is not None)


def _of_adapters(federated: FederatedConfig, adapters: Mapping[str, AdapterConfig]) -> Iterator[Problem]:
    used = {strategy.adapter for strategy in federated.strategies.values()}
    for name, adapter in adapters.items():
        if name not in used:
            hint = "is trained by no strategy: name it in federated.strategies, or remove it"
            yield Problem(f"adapters.{name}", None, hint)
        for key, hint in UNUSED_OF_ADAPTERS.items():
            value = getattr(adapter, key)
            if value is not None and value != AdapterConfig.model_fields[key].default:
                yield Problem(f"adapters.{name}.{key}", value, hint)
        varies = adapter.lr_schedule != "constant" or adapter.warmup_steps or adapter.warmup_ratio
        if federated.local_epochs is not None and varies:
            hint = (
                "must be constant, without warmup, with federated.local_epochs: the clients take different "
                "numbers of steps"
            )
            yield Problem(f"adapters.{name}.lr_schedule", adapter.lr_schedule, hint)


def _of_strategy(
    key: str, strategy: StrategyConfig, adapters: Mapping[str, AdapterConfig], federated: FederatedConfig
) -> Iterator[Problem]:
    adapter = adapters.get(strategy.adapter)
    if adapter is None:
        hint = (
            f"is no entry of adapters; they are {choices(adapters)}."
            f"{did_you_mean(strategy.adapter, adapters)}"
        )
        yield Problem(f"{key}.adapter", strategy.adapter, hint)
        return
    able = METHODS[strategy.algorithm]
    if adapter.method not in able:
        hint = f"cannot average {adapter.method}: it is for adapters of method {choices(able)}"
        yield Problem(f"{key}.algorithm", strategy.algorithm, hint)
        return
    if federated.client_ranks is None or adapter.method not in WITH_RANKS or strategy.central:
        return
    largest = max(federated.client_ranks)
    if adapter.rank is not None and largest > adapter.rank:
        hint = f"has {largest}, above adapters.{strategy.adapter}.rank = {adapter.rank}, the global rank"
        yield Problem("federated.client_ranks", federated.client_ranks, hint)
    if strategy.algorithm == "fedex" and set(federated.client_ranks) != {adapter.rank}:
        hint = f"differ, which {key}.algorithm = fedex cannot average: use product_mean"
        yield Problem("federated.client_ranks", federated.client_ranks, hint)
