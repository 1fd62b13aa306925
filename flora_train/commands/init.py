"""flora-train init: write a commented recipe for somebody's own files, and check it by reading them."""

from __future__ import annotations

import glob
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flora_train.config.base import ConfigModel, Name, PathText, Text
from flora_train.config.command_options import read_options
from flora_train.config.errors import Problem, UserError, choices, user_error
from flora_train.config.load import load_config, validate
from flora_train.config.schema import RunConfig
from flora_train.config.task_schema import SourceConfig
from flora_train.config.terminal_text import plain, print_plain
from flora_train.data.sources import read_rows
from flora_train.data.templates import cell_text
from flora_train.run_context import load_data
from flora_train.runtime.atomic import real_path, write_atomically

PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
)
"""Columns that are asked and answered."""
WHOLE = ("text", "content", "code")
"""Columns that are learnt whole."""
AUDIO, SENTENCE = ("path", "audio", "file"), ("sentence", "text", "transcription", "transcript")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
PER_DRAW = 4
LONGEST = 512
"""Tokens of an example."""
EPOCHS = 3


class InitOptions(ConfigModel):
    model: PathText = "HuggingFaceTB/SmolLM2-135M"
    """The base: a folder, or a name on the hub. Of clips with transcripts: a Whisper."""
    out: PathText | None = None
    """The recipe. Default: NAME.yaml here."""
    name: Name | None = None
    """Of the run. Default: that of the first task."""
    language: Text | None = None
    """Of clips, Whisper's code: cs, nl, ..."""


@dataclass(frozen=True)
class Found:
    """One task: its keys as they stand in the recipe, and what was seen."""

    keys: Mapping[str, Any]
    seen: str
    spoken: bool = False


def init_recipe(sources: Sequence[str], **values: object) -> None:
    """words: files or folders, a task each, and InitOptions. Raises UserError, naming what to write instead, where a file cannot be a task."""
    options = read_options(InitOptions, values)
    found: dict[str, Found] = {}
    problems: list[Problem] = []
    for source in sources:
        name = (Path(source).stem or real_path(Path(source)).stem).replace(".", "_").replace(" ", "_")
        try:
            if name in found:
                raise user_error(
                    source, None, f"would be a second task {name}: rename the file, or write the recipe by hand (docs/tasks.md)"
                )
            found[name] = check_clip(source, options.language)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    name = options.name or next(iter(found))
    out = Path(options.out or f"{name}.yaml")
    if out.exists():
        raise user_error("out", str(out), "exists already: choose another, or delete it")
    steps, tokens = sizes(validate(raw_recipe(name, options.model, found, 100, 1 << 20)))
    text = recipe_text(name, options.model, found, steps, tokens, out)
    write_atomically(out, lambda path: path.write_text(text, encoding="utf-8"), new=True)
    load_config([f"recipe={out}"])
    for task, facts in found.items():
        print_plain(f"{task:20} {facts.seen}")
    print_plain(
        f"\n{out}: {3 * len(found)} adapters, {steps} steps of {tokens:,} tokens, into outputs/{name}/\n"
        f"next  flora-train plan recipe={out}     how long that takes here; training.steps=N makes it shorter\n"
        f"      flora-train train recipe={out}    train, evaluate, report, export"
    )


def check_clip(source: str, language: str | None) -> Found:
    """What kind of task a file or folder is. Raises UserError where that cannot be told."""
    path = Path(source)
    if path.is_dir():
        endings = Counter(file.suffix for file in path.rglob("*") if file.is_file() and file.suffix)
        if not endings:
            raise user_error(source, None, "holds no files: give a folder of source code or text")
        ending, count = endings.most_common(1)[0]
        train = {"folder": source, "glob": f"**/*{glob.escape(ending)}"}
        return Found({"train": train, "truncation": "split"}, f"{count:,} files {ending}, learnt whole")
    try:
        config = SourceConfig.model_validate({"files": [source]})
    except ValidationError as error:
        raise user_error(source, None, str(error.errors()[0]["msg"])) from error
    rows = read_rows(config, "source")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    sound = next((c for c in AUDIO if c in columns and str(rows[0].get(c)).lower().endswith(SOUNDS)), None)
    sentence = next((c for c in SENTENCE if c in columns), None)
    if sound is not None and sentence is not None:
        if language is None:
            raise user_error(
                source, None, f"holds clips ({sound}) with transcripts ({sentence}): say in which language, --language cs"
            )
        speech = {"language": language, "audio": sound, "sentence": sentence}
        return Found(
            {"speech": speech, "train": source},
            f"{len(rows):,} clips in {language}{_rest(columns, sound, sentence)}",
            spoken=True,
        )
    for asked, answered in PAIRS:
        if asked in columns and answered in columns:
            plain = (asked, answered) == PAIRS[0]
            keys = (
                {"prompt": asked, "completion": answered}
                if plain
                else {"prompt": f"{{{asked}}}", "completion": f"\n{{{answered}}}"}
            )
            return Found(
                {"train": source, **keys},
                f"{len(rows):,} rows, {answered} is learnt after {asked}{_rest(columns, asked, answered)}",
            )
    whole = next((c for c in WHOLE if c in columns), None)
    if whole is not None:
        return Found({"train": source, "text": whole}, f"{len(rows):,} rows, {whole} is learnt whole{_rest(columns, whole)}")
    hint = f"has the columns {choices(columns)}: which is asked and which is learnt cannot be told; write tasks.NAME.prompt and completion by hand (docs/tasks.md)"
    raise user_error(source, None, hint)


def _rest(columns: Sequence[str], *used: str) -> str:
    """The columns that the recipe does not use."""
    rest = [" ".join(cell_text(column).split()) for column in columns if column not in used]
    more = f" and {len(rest) - SHOWN} more" if len(rest) > SHOWN else ""
    return f"; not used: {', '.join(rest[:SHOWN])}{more}" if rest else ""


SHOWN = 8
"""Columns that are named."""


def raw_recipe(name: str, model: str, found: Mapping[str, Found], steps: int, tokens: int) -> dict[str, Any]:
    """The recipe as plain mappings."""
    return {
        "name": name,
        "model": {"path": model},
        "tasks": {task: dict(facts.keys) for task, facts in found.items()},
        "adapters": {
            "flora": {"method": "flora", "rank": 4, "lr": 2e-2, "warmup_steps": 4},
            "lora": {"method": "lora", "rank": 8, "lr": 2e-3, "warmup_steps": 4},
            "ia3": {"method": "ia3", "lr": 2e-2, "warmup_steps": 4},
        },
        "training": {
            "steps": steps,
            "tokens_per_step": tokens,
            "tokens_per_microbatch": min(tokens, 4096),
            "max_length": LONGEST,
        },
        "evaluation": {"interval": max(1, steps // 5)},
    }


def sizes(config: RunConfig) -> tuple[int, int]:
    """Steps and tokens of a step: room for a draw of every task's longest examples, EPOCHS times over the data, 20 to 1,000 steps. Reads it."""
    _, tasks, speech_processor = load_data(config)
    if speech_processor is not None:
        speech_processor.store.close()
    adapters = len(config.adapters)
    draw = max(PER_DRAW * adapters * int(task.train.lengths.max()) for task in tasks.values())
    tokens = max(4096, -(-draw // 1024) * 1024)
    total = sum(int(task.train.lengths.sum()) for task in tasks.values())
    return min(1000, max(20, EPOCHS * total * adapters // tokens)), tokens


def recipe_text(name: str, model: str, found: Mapping[str, Found], steps: int, tokens: int, out: Path) -> str:
    """YAML with a word on every key that one is likely to change."""
    raw, place = raw_recipe(name, model, found, steps, tokens), plain(out, keep="")
    lines = [
        f"# {len(found)} task{'s' if len(found) > 1 else ''} x fLoRA, LoRA and IA3 in one run. Keys: docs/tasks.md; every one: docs/api.md",
        "#",
        f"#   flora-train plan recipe={place}     what it takes of memory, disk and time",
        f"#   flora-train train recipe={place}    train, evaluate, report, export (several GPUs: docs/cluster.md)",
        f"name: {json.dumps(name)}",
        "model:",
        f"  path: {json.dumps(model)}",
        "tasks:",
    ]
    for task, facts in found.items():
        lines.append(f"  {task}: # {plain(facts.seen, keep='')}")
        lines += [f"    {key}: {json.dumps(value, ensure_ascii=False)}" for key, value in facts.keys.items()]
        lines.append(
            "    validation_fraction: 0.05 # held out by seed; give validation: FILE where rows of one origin resemble each other"
        )
    lines.append("adapters: # each learns every task; sweep with lists: lr: [1.0e-2, 2.0e-2]")
    lines += [f"  {family}: {json.dumps(adapter).replace(chr(34), '')}" for family, adapter in raw["adapters"].items()]
    lines += [
        "training:",
        f"  steps: {steps} # {EPOCHS} times over the data, but 20 to 1,000",
        f"  tokens_per_step: {tokens} # of all adapters together; an example counts once for each that learns it",
        f"  tokens_per_microbatch: {raw['training']['tokens_per_microbatch']} # what fits in memory",
        f"  max_length: {LONGEST} # longer examples are cut (or truncation: split, drop)",
        "evaluation:",
        f"  interval: {raw['evaluation']['interval']} # steps; the best state of each adapter is kept",
    ]
    return "\n".join(lines) + "\n"
