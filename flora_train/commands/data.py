"""flora-train data: prints what a run will learn, as counts and examples; no weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from rich.console import Console

from flora_train.commands.data_counts import print_counts, print_overview
from flora_train.commands.data_examples import ExamplePrinter, choose_examples
from flora_train.config.base import ConfigModel, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import TaskConfig
from flora_train.config.terminal_text import shown
from flora_train.data.split_by import expand_split_tasks
from flora_train.data.task import Task, notes_on_rows
from flora_train.run_context import load_data, prepare
from flora_train.runtime.environment import default_device

FEW_TASKS = 12
"""Up to this number of tasks, examples of all are printed if no number is asked for."""
DEFAULT_EXAMPLES = 2
SHOWN_KEYS = ("objective", "learn", "chat_template")
"""Keys of a task that its heading names, where they are given."""


class DataOptions(ConfigModel):
    tasks: Annotated[list[Text], Field(min_length=1)] | None = None
    """Tasks that are shown. Default: all."""
    examples: int | None = Field(None, ge=0, le=100_000)
    """Examples of each task. Default: 2, or none where there are many tasks."""
    full: bool = False
    """Print long examples in full."""


def preview_data(config: RunConfig, **values: object) -> None:
    """Read the tasks of a run as its training does, and print counts and examples of each.

    values: DataOptions. Raises UserError as training would for the data, and for an unknown task.
    """
    options = read_options(DataOptions, values)
    config = _chosen_tasks(expand_split_tasks(config), options.tasks)
    device = default_device()
    prepare(config, device)
    tokenizer, tasks, speech_processor = load_data(config)
    if speech_processor is not None:
        speech_processor.store.close()
    console = Console(soft_wrap=True, highlight=False)
    if options.examples is None and len(tasks) > FEW_TASKS:
        print_overview(console, tasks)
        console.print(
            shown(f"\n--task NAME,... prints examples, --examples {DEFAULT_EXAMPLES} those of all tasks")
        )
    else:
        _print_tasks(console, config, tokenizer, tasks=tasks, options=options)
    for note in notes_on_rows(tasks, config):
        console.print(shown(f"\nnote: {note}"))


def _chosen_tasks(config: RunConfig, names: Sequence[str] | None) -> RunConfig:
    """The configuration with these tasks alone. Raises UserError for an unknown one."""
    if names is None:
        return config
    for name in names:
        if name not in config.tasks:
            hint = f"the recipe has no such task; there are {choices(config.tasks)}."
            raise user_error("--task", name, hint + did_you_mean(name, config.tasks))
    return config.model_copy(update={"tasks": {name: config.tasks[name] for name in names}})


def _print_tasks(
    console: Console, config: RunConfig, tokenizer: Any, *, tasks: dict[str, Task], options: DataOptions
) -> None:
    """Counts and examples, task by task."""
    number = DEFAULT_EXAMPLES if options.examples is None else options.examples
    printer = ExamplePrinter(console, tokenizer, full=options.full)
    chosen = {name: choose_examples(task.train, number) for name, task in tasks.items()}
    learnt = [task for task in tasks.values() if task.label is None]
    if number and learnt:
        printer.print_legend((task.train, chosen[task.name]) for task in learnt)
    for name, task in tasks.items():
        console.print(shown(f"\n{_heading(name, config)}", "bold", keep="\n"))
        print_counts(console, task)
        for index in chosen[name]:
            printer.print_example(task, index)


def label_facts(task: TaskConfig) -> str:
    """How a task of labelled texts learns its labels."""
    if task.verbalizer is not None:
        words = ", ".join(
            f"{label} {word.strip()}" for label, word in list(task.verbalizer.items())[:FEW_TASKS]
        )
        return f"words of labels ({words})"
    kind = "one label"
    if task.token_labels is not None:
        kind = "a label of each token"
    elif task.regression:
        kind = "a number"
    elif task.multi_label:
        kind = "any number of labels"
    return f"a head for {kind}"


def _heading(name: str, config: RunConfig) -> str:
    """A task's name, and how its rows are read."""
    task = config.tasks[name]
    facts = [f"{key} {value}" for key in SHOWN_KEYS if (value := getattr(task, key)) is not None]
    if task.speech is not None:
        facts.append(f"speech ({task.speech.language})")
    else:
        facts.append(f"max_length {config.training.max_length:,}")
    if task.is_labelled:
        facts.append(label_facts(task))
    if task.packing:
        facts.append("packing")
    return f"{name}: {', '.join(facts)}"
