"""Checks between sections: values that are each valid but contradict each other, and names that files cannot
tell apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flora_train.config.adapter_schema import AdapterConfig, adapter_name, warmup_hint
from flora_train.config.base import LONGEST_NAME
from flora_train.config.errors import MOST_PROBLEMS, Problem, choices, did_you_mean
from flora_train.config.task_schema import TaskConfig

MOST_ADAPTERS = 100_000
"""Adapters of one run: entries of `adapters` times their tasks."""
RESERVED = "is what reports call the base model: rename it"


class Contradictions(ValueError):
    """Values of several sections that are each valid but do not go together."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("; ".join(str(problem) for problem in problems))


@dataclass(frozen=True)
class AdapterOutline:
    """The keys of an entry of `adapters` that other sections are compared with."""

    tasks: Sequence[str] | None
    """None: all tasks."""
    warmup_steps: int = 0


def disagreements(
    tasks: Collection[str],
    adapters: Mapping[str, AdapterOutline],
    steps: int | None,
    *,
    split_tasks: Collection[str] = (),
) -> list[Problem]:
    """The contradictions between sections.

    tasks: their names; steps: of the run, None if not known; split_tasks: tasks from which split_by makes
    others, whose names are not known yet.
    """
    count = 0
    for outline in adapters.values():
        count += len(tasks if outline.tasks is None else outline.tasks)
    if count > MOST_ADAPTERS:
        hint = (
            f"are {count:,} with all their tasks: at most {MOST_ADAPTERS:,} fit into a run; use several runs"
        )
        return [Problem("adapters", None, hint)]
    problems = [*_reserved_names("tasks", tasks), *_reserved_names("adapters", adapters)]
    known = frozenset(tasks)
    prefixes = tuple(f"{name}_" for name in split_tasks)
    for name, outline in adapters.items():
        for task in outline.tasks or ():
            if task not in known and not task.startswith(prefixes):
                hint = f"is not a task; tasks are {choices(tasks)}.{did_you_mean(task, tasks)}"
                problems.append(Problem(f"adapters.{name}.tasks", task, hint))
        if warmup := warmup_hint(outline.warmup_steps, "training.steps", steps):
            problems.append(Problem(f"adapters.{name}.warmup_steps", outline.warmup_steps, warmup))
        if len(problems) >= MOST_PROBLEMS:
            return problems
    names = [
        adapter_name(task, name) for name, outline in adapters.items() for task in outline.tasks or tasks
    ]
    return problems + _unusable_names(names)


def _reserved_names(section: str, names: Iterable[str]) -> list[Problem]:
    return [Problem(f"{section}.{name}", None, RESERVED) for name in names if name.lower() == "base"]


def _unusable_names(names: Sequence[str]) -> list[Problem]:
    """Every adapter has files of its own, so that its name must be unique on every file system."""
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    hint = "two adapters (task-adapter) would have this name: rename a task or adapter"
    problems = [Problem("adapters", name, hint) for name in twice]
    first: dict[str, str] = {}
    for name in names:
        if len(name) > LONGEST_NAME:
            hint = (
                f"is the name of an adapter (task-adapter) and has more than {LONGEST_NAME} characters: "
                "rename the task or adapter"
            )
            problems.append(Problem("adapters", name, hint))
        elif (other := first.setdefault(name.lower(), name)) != name:
            hint = (
                f"and {other} are adapters (task-adapter) whose names differ in case only, "
                "which some file systems do not tell apart: rename one"
            )
            problems.append(Problem("adapters", name, hint))
    return problems[:MOST_PROBLEMS]


def mixed_task_types(tasks: Mapping[str, TaskConfig]) -> Problem | None:
    """A base model reads either text or speech."""
    speech = [name for name, task in tasks.items() if task.speech is not None]
    if not speech or len(speech) == len(tasks):
        return None
    text = next(name for name in tasks if name not in speech)
    hint = (
        f"is missing, and tasks.{speech[0]} is a speech task: a base model is for text or for speech; "
        "make two runs"
    )
    return Problem(f"tasks.{text}.speech", None, hint)


def heads_without_labels(
    tasks: Mapping[str, TaskConfig], adapters: Mapping[str, AdapterConfig]
) -> Problem | None:
    """A head is learnt from labels: method head needs them in all tasks, head_lr in one."""
    for name, adapter in adapters.items():
        of_adapter = [task for task in adapter.tasks or tasks if task in tasks]
        without = [task for task in of_adapter if not tasks[task].has_head]
        if adapter.method == "head" and without:
            hint = (
                f"is for tasks with labels, and tasks.{without[0]} has none that a head learns: give it "
                f"label (or token_labels), or list other tasks in adapters.{name}.tasks"
            )
            return Problem(f"adapters.{name}.method", "head", hint)
        if adapter.head_lr is not None and of_adapter and len(without) == len(of_adapter):
            hint = "is not used, because no task of this adapter has labels that a head learns: remove it"
            return Problem(f"adapters.{name}.head_lr", adapter.head_lr, hint)
    return None


def idle_seed(tasks: Mapping[str, TaskConfig], adapters: Mapping[str, AdapterConfig]) -> Problem | None:
    """A seed of an adapter that draws no random number."""
    for name, adapter in adapters.items():
        begins_with_head = adapter.init_from is None and any(
            tasks[task].has_head for task in adapter.tasks or tasks if task in tasks
        )
        if adapter.seed is not None and not (adapter.is_random or begins_with_head):
            hint = (
                "has no effect: this adapter begins at fixed values, and has neither dropout nor "
                "neftune_noise_alpha: remove it"
            )
            return Problem(f"adapters.{name}.seed", adapter.seed, hint)
    return None


def gates_without_ids(
    tasks: Mapping[str, TaskConfig], adapters: Mapping[str, AdapterConfig]
) -> Problem | None:
    """A gate's loss needs the column that says which member a row belongs to, and the column a gate."""
    gated: set[str] = set()
    for name, adapter in adapters.items():
        if adapter.method != "meteora":
            continue
        of_adapter = [task for task in adapter.tasks or tasks if task in tasks]
        gated.update(adapter.tasks or tasks)
        if adapter.gate_loss is not None and of_adapter and not any(tasks[t].task_id for t in of_adapter):
            hint = (
                f"requires tasks.{of_adapter[0]}.task_id, the column that says which member a row belongs "
                "to: set it, or remove this key"
            )
            return Problem(f"adapters.{name}.gate_loss", adapter.gate_loss, hint)
    for name, task in tasks.items():
        is_used = name in gated or (task.is_split and any(used.startswith(f"{name}_") for used in gated))
        if task.task_id is not None and not is_used:
            hint = "is not used, because no adapter of method meteora learns this task: add one, or remove it"
            return Problem(f"tasks.{name}.task_id", task.task_id, hint)
    return None


def small_draws(tasks: Mapping[str, TaskConfig], examples_per_draw: int) -> Problem | None:
    """KTO compares every completion with the others of its draw; the loss of embeddings, every pair."""
    pairs = [name for name, task in tasks.items() if needs_other_pairs(task)]
    if pairs and examples_per_draw < 2:
        hint = (
            f"is too small for the embeddings of tasks.{pairs[0]}, whose negatives are the other texts of a "
            "draw: set it to at least 2; 16 to 64 are usual"
        )
        return Problem("mixture.examples_per_draw", examples_per_draw, hint)
    kto = [name for name, task in tasks.items() if task.objective == "kto"]
    if not kto or examples_per_draw > 1:
        return None
    hint = (
        f"is too small for the objective kto of tasks.{kto[0]}, whose KL term is computed within a draw: "
        "set it to at least 2; 4 to 16 are usual"
    )
    return Problem("mixture.examples_per_draw", examples_per_draw, hint)


def needs_other_pairs(task: TaskConfig) -> bool:
    """Whether a row of the task has no negative but the texts of other rows of its draw."""
    return task.embeds and (task.negative is None or bool(task.symmetric))
