"""flora-train init: writes a commented recipe for a user's own files, and checks it by reading them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flora_train.config.base import ConfigModel, Name, PathText, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import Problem, UserError, user_error
from flora_train.config.load import load_config, validate
from flora_train.config.model_schema import ModelConfig
from flora_train.config.terminal_text import plain, print_plain
from flora_train.data.chat.completeness import writes_tool_calls
from flora_train.data.chat.template import ChatTemplate, suggested_template
from flora_train.data.embeddings.costs import largest_draw
from flora_train.data.guess_task import GuessedTask, guess_tasks
from flora_train.data.preferences.costs import largest_unit, row_costs
from flora_train.models.context_length import max_readable_length
from flora_train.models.loading import load_model_config, load_tokenizer
from flora_train.run_context import load_data, resolve_config
from flora_train.runtime.atomic import write_atomically

TEXT_MODEL, CHAT_MODEL = "HuggingFaceTB/SmolLM2-135M", "HuggingFaceTB/SmolLM2-135M-Instruct"
SPEECH_MODEL = "openai/whisper-base"
EMBEDDING_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
EXAMPLES_PER_DRAW = 4
EMBEDDINGS_PER_DRAW = 16
"""Pairs or triplets of a draw, which are each other's negatives."""
MAX_LENGTH = 512
"""Tokens of an example of text."""
SPEECH_LENGTH = 128
"""Tokens of a transcript."""
EPOCHS = 3
FEWEST_STEPS, MOST_STEPS = 20, 1000
EVALUATIONS = 5
TEXT_FRACTION, LABELLED_FRACTION = 0.05, 0.1
"""Shares of the rows that are held out."""
NOT_STRATIFIED = {"multi_label", "regression", "token_labels"}
"""Keys of labelled texts whose rows have not one label each."""


class InitOptions(ConfigModel):
    model: PathText | None = None
    """The base: a folder, or a name on the hub. Default: SmolLM2-135M; for clips with transcripts
    whisper-base, for embeddings all-MiniLM-L6-v2."""
    out: PathText | None = None
    """The recipe. Default: NAME.yaml here."""
    name: Name | None = None
    """Of the run. Default: that of the recipe's file, or of the first task."""
    language: Text | None = None
    """Of clips, Whisper's code: cs, nl, ... Default: the name of their folder."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run that fit its data."""

    adapters: int
    steps: int
    tokens: int
    """Of one step."""
    microbatch: int = 4096
    """Tokens of one forward pass."""


def init_recipe(sources: Sequence[str], **values: object) -> None:
    """Write a recipe for files or folders. values: InitOptions. Raises UserError, which says what to write
    instead, where a file cannot be a task."""
    options = read_options(InitOptions, values)
    tasks = _guess_all(sources, options.language)
    model = options.model or _default_model(tasks)
    tasks = _with_template(model, tasks)
    name = options.name or _run_name(options.out, tasks)
    out = Path(options.out or f"{name}.yaml")
    if out.exists():
        raise user_error("out", str(out), "exists already: choose another, or delete it")
    sizes = fitting_sizes(raw_recipe(name, model, tasks, Sizes(0, 100, 1 << 20, 1 << 20)))
    text = recipe_text(raw_recipe(name, model, tasks, sizes), tasks, out=out, adapters=sizes.adapters)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"), new=True)
    load_config([f"recipe={out}"])
    for task, guessed in tasks.items():
        print_plain(f"{task:20} {guessed.description}")
    size = f"{sizes.adapters} adapters, {sizes.steps} steps of {sizes.tokens:,} tokens"
    plan, train = (f"flora-train {command} recipe={out}" for command in ("plan", "train"))
    print_plain(
        f"\n{out}: {size}, into outputs/{name}/",
        f"next  {plan}     how long that takes here; training.steps=N makes it shorter",
        f"      {train}    train, evaluate, report, export",
    )


def _guess_all(sources: Sequence[str], language: str | None) -> dict[str, GuessedTask]:
    """Task name -> task of all files and folders. Raises UserError with the faults of all."""
    tasks: dict[str, GuessedTask] = {}
    problems: list[Problem] = []
    for source in sources:
        try:
            guessed = guess_tasks(source, language)
        except UserError as error:
            problems += error.problems
            continue
        for name in guessed.keys() & tasks.keys():
            hint = (
                f"would be a second task {name}: rename the file, or write the recipe by hand (docs/data.md)"
            )
            problems.append(Problem(source, None, hint))
        tasks |= guessed
    if problems:
        raise UserError(*problems)
    return tasks


def _default_model(tasks: Mapping[str, GuessedTask]) -> str:
    if all(task.is_speech for task in tasks.values()):
        return SPEECH_MODEL
    if all(task.embeds for task in tasks.values()):
        return EMBEDDING_MODEL
    if any(task.is_chat for task in tasks.values()):
        return CHAT_MODEL
    return TEXT_MODEL


def _with_template(model: str, tasks: Mapping[str, GuessedTask]) -> dict[str, GuessedTask]:
    """The tasks, those of conversations with a shipped chat template where the base's tokenizer has none, or
    has one that does not write tool calls."""
    if not any(task.is_chat for task in tasks.values()):
        return dict(tasks)
    tokenizer = load_tokenizer(ModelConfig(path=model))
    writes_calls = False
    if tokenizer.chat_template:
        writes_calls = writes_tool_calls(ChatTemplate.of(tokenizer, None, "model"))
    result = {}
    for name, task in tasks.items():
        needs_template = not tokenizer.chat_template or (task.calls_tools and not writes_calls)
        keys = dict(task.keys)
        if task.is_chat and needs_template:
            keys["chat_template"] = suggested_template(tokenizer)
        result[name] = replace(task, keys=keys)
    return result


def _run_name(out: str | None, tasks: Mapping[str, GuessedTask]) -> str:
    """The name of the recipe's file as that of a run, or of the first task."""
    name = next(iter(tasks))
    if out is not None:
        name = Path(out).stem
    return re.sub(r"[^A-Za-z0-9_-]", "_", name).lstrip("_-") or "run"


def raw_recipe(name: str, model: str, tasks: Mapping[str, GuessedTask], sizes: Sizes) -> dict[str, Any]:
    """The recipe as plain mappings."""
    mixture: dict[str, Any] = {}
    if examples := _examples_per_draw(tasks):
        mixture = {"mixture": {"examples_per_draw": examples}}
    max_length = SPEECH_LENGTH
    if not any(task.is_speech for task in tasks.values()):
        max_length = _readable_length(ModelConfig(path=model))
    return {
        "name": name,
        "model": {"path": model},
        "tasks": {
            task: {**guessed.keys, "validation_fraction": _held_out(guessed)}
            for task, guessed in tasks.items()
        },
        "adapters": {
            "flora": {"method": "flora", "rank": 4, "lr": 2e-2, "warmup_ratio": 0.1},
            "lora": {"method": "lora", "rank": 8, "lr": 2e-3, "warmup_ratio": 0.1},
            "ia3": {"method": "ia3", "lr": 2e-2, "warmup_ratio": 0.1},
        },
        **mixture,
        "training": {
            "steps": sizes.steps,
            "tokens_per_step": sizes.tokens,
            "tokens_per_microbatch": min(sizes.tokens, sizes.microbatch),
            "max_length": max_length,
        },
        "evaluation": {"interval": max(1, sizes.steps // EVALUATIONS)},
    }


def _readable_length(model: ModelConfig) -> int:
    """MAX_LENGTH, or the tokens that the base has positions for, if those are fewer."""
    return max_readable_length(model, load_model_config(model), MAX_LENGTH) or MAX_LENGTH


def _examples_per_draw(tasks: Mapping[str, GuessedTask]) -> int | None:
    """How many examples a draw needs, where the loss of a task couples them."""
    if any(task.embeds for task in tasks.values()):
        return EMBEDDINGS_PER_DRAW
    if any(task.keys.get("objective") == "kto" for task in tasks.values()):
        return EXAMPLES_PER_DRAW
    return None


def _held_out(task: GuessedTask) -> float:
    """The share of rows that is held out: at least two pairs of embeddings, which are compared."""
    if task.embeds:
        return max(LABELLED_FRACTION, math.ceil(200 / max(3, task.smallest)) / 100)
    return LABELLED_FRACTION if task.is_labelled else TEXT_FRACTION


def fitting_sizes(raw: dict[str, Any]) -> Sizes:
    """Steps and tokens for the data of a recipe, which is read: a step has room for a draw of every task's
    longest examples, and the run is EPOCHS passes over the data."""
    config = resolve_config(validate(raw))
    _, tasks, speech_processor = load_data(config)
    if speech_processor is not None:
        speech_processor.store.close()
    families, examples = len(config.adapters), EXAMPLES_PER_DRAW
    if any(task.embedding is not None for task in tasks.values()):
        examples = EMBEDDINGS_PER_DRAW
    in_batch = [False] * families
    longest, total, unit = 0, 0, 0
    for task in tasks.values():
        costs = row_costs(task.train, task.preference, in_batch)
        tokens_of_examples = costs.of(families)
        longest = max(longest, int(tokens_of_examples.max()))
        total += int(tokens_of_examples.sum())
        unit = max(unit, largest_unit(task.train, task.preference, in_batch, examples))
        unit = max(unit, largest_draw(task.train, examples))
    tokens = max(4096, _rounded(examples * longest), _rounded(unit))
    steps = min(MOST_STEPS, max(FEWEST_STEPS, EPOCHS * total // tokens))
    return Sizes(families * len(tasks), steps, tokens, max(min(tokens, 4096), _rounded(unit)))


def _rounded(tokens: int) -> int:
    """The next multiple of 1024."""
    return -(-tokens // 1024) * 1024


def recipe_text(raw: Mapping[str, Any], tasks: Mapping[str, GuessedTask], *, out: Path, adapters: int) -> str:
    """The YAML of a recipe, with a comment on every key that is likely to be changed."""
    path, training = plain(out, keep=""), raw["training"]
    keys = "Keys: docs/data.md, docs/configuration.md"
    many = "several GPUs: docs/several_machines.md"
    lines = [
        f"# {adapters} adapters in one run: fLoRA, LoRA and IA3 of each task. {keys}",
        "#",
        f"#   flora-train plan recipe={path}     what it needs of memory, disk and time",
        f"#   flora-train train recipe={path}    train, evaluate, report, export ({many})",
        f"name: {json.dumps(raw['name'])}",
        "model:",
        f"  path: {json.dumps(raw['model']['path'])}",
        "tasks:",
    ]
    for name, task in tasks.items():
        lines += _task_lines(name, task)
    lines.append("adapters: # each learns every task; sweep with lists: lr: [1.0e-2, 2.0e-2]")
    lines += [f"  {family}: {_flow_style(adapter)}" for family, adapter in raw["adapters"].items()]
    if "mixture" in raw:
        draw = raw["mixture"]["examples_per_draw"]
        lines += ["mixture:", f"  examples_per_draw: {draw} # {_coupled(tasks)} of a draw"]
    lines += [
        "training:",
        f"  steps: {training['steps']} # {EPOCHS} times over the data, but {FEWEST_STEPS} to {MOST_STEPS:,}",
        (
            f"  tokens_per_step: {training['tokens_per_step']} # of all adapters; "
            "an example counts once per adapter"
        ),
        f"  tokens_per_microbatch: {training['tokens_per_microbatch']} # what fits in memory",
        f"  max_length: {training['max_length']} # longer examples are cut (or truncation: split, drop)",
        "evaluation:",
        f"  interval: {raw['evaluation']['interval']} # steps; the best state of each adapter is kept",
    ]
    return "\n".join(lines) + "\n"


def _coupled(tasks: Mapping[str, GuessedTask]) -> str:
    """What the loss compares, for a comment."""
    if any(task.embeds for task in tasks.values()):
        return "pairs are compared with the others"
    return "kto compares the examples"


def _task_lines(name: str, task: GuessedTask) -> list[str]:
    advice = "or give validation: FILE, if rows of one origin resemble each other"
    by = ""
    if task.is_labelled and not NOT_STRATIFIED & task.keys.keys():
        by = ", label by label"
    held_out = f"    validation_fraction: {_held_out(task)} # held out by seed{by}; {advice}"
    keys = [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in task.keys.items()]
    return [f"  {name}: # {plain(task.description, keep='')}", *keys, held_out]


def _flow_style(adapter: Mapping[str, Any]) -> str:
    return json.dumps(adapter).replace('"', "")
