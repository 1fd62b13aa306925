"""The tasks that a file or a folder of a user is for, guessed from its columns, for a first recipe."""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import ValidationError

from flora_train.config.errors import UserError, choices, user_error
from flora_train.config.json_format import JsonValue
from flora_train.config.task_schema import SourceConfig
from flora_train.data.chat.messages import CALLS, is_message_list
from flora_train.data.chat.rows import MESSAGE_COLUMNS, SYSTEM, TOOL_COLUMNS
from flora_train.data.file_rows import Row
from flora_train.data.guess_embeddings import guess_embeddings
from flora_train.data.guess_labels import guess_labels
from flora_train.data.guess_preferences import guess_preferences
from flora_train.data.sources import read_rows
from flora_train.data.templates import cell_text
from flora_train.runtime.atomic import real_path

PAIRS = (
    ("prompt", "completion"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("input", "output"),
    ("source", "target"),
)
"""Columns of a prompt and of its completion."""
WHOLE_TEXTS = ("text", "content", "code")
"""Columns that are learnt whole."""
AUDIO, SENTENCE = ("path", "audio", "file"), ("sentence", "text", "transcription", "transcript")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus")
TABLES = (".tsv", ".csv", ".jsonl")
LABELS = (
    "task",
    "label",
    "labels",
    "language",
    "lang",
    "category",
    "class",
    "intent",
    "topic",
    "domain",
    "customer",
    "tenant",
    "dataset",
    "subset",
)
"""Names of columns of labels, the likeliest first. A column of another name is only mentioned."""
MOST_LABELS, ROWS_PER_LABEL = 20, 10
"""A column of labels has at most this many values, each in at least this many rows."""
SHOWN_COLUMNS = 8
"""Columns that a note names."""


@dataclass(frozen=True)
class GuessedTask:
    """One task of a recipe."""

    keys: Mapping[str, JsonValue]
    """Its keys, as in the recipe."""
    description: str
    """What was seen, in one line."""
    is_speech: bool = False
    is_chat: bool = False
    calls_tools: bool = False
    """Whether the assistant of its conversations calls tools."""
    is_labelled: bool = False
    """Whether its adapters learn a head that predicts labels."""
    embeds: bool = False
    """Whether its adapters learn embeddings."""
    smallest: int = 0
    """Of a task of embeddings: rows of the smallest task that it is divided into."""


def guess_tasks(source: str, language: str | None) -> dict[str, GuessedTask]:
    """Task name -> task of a file or folder.

    A folder of clips (LANGUAGE/clips.tsv) makes a task for each language. language: of clips, instead of the
    name of their folder. Raises UserError where the kind of task cannot be determined.
    """
    path = Path(source)
    name = _task_name(path)
    if not path.is_dir():
        return {name: _guess_file(source, language)}
    tables = _tables_of_clips(path)
    if not tables:
        return {name: _guess_folder(source)}
    tasks = {}
    for folder, table in tables.items():
        spoken = (
            language if language is not None and len(tables) == 1 else _language_code(real_path(folder).name)
        )
        tasks[_task_name(folder)] = _guess_file(str(table), spoken)
    return tasks


def _task_name(path: Path) -> str:
    stem = path.stem or real_path(path).stem
    return stem.replace(".", "_").replace(" ", "_")


def _tables_of_clips(folder: Path) -> dict[Path, Path]:
    """Folder -> its table of clips: `folder` itself, or else its subfolders."""
    for folders in ([folder], sorted(child for child in folder.iterdir() if child.is_dir())):
        tables = {child: table for child in folders if (table := _table_of_clips(child)) is not None}
        if tables:
            return tables
    return {}


def _table_of_clips(folder: Path) -> Path | None:
    """clips.tsv of a folder, or its only table, if that names clips and transcripts."""
    tables = sorted(file for file in folder.iterdir() if file.suffix.lower() in TABLES and file.is_file())
    named = [table for table in tables if table.stem == "clips"]
    if len(named) != 1 and len(tables) != 1:
        return None
    table = named[0] if len(named) == 1 else tables[0]
    try:
        rows = _rows(str(table))
    except UserError:
        if named:
            raise
        return None
    return table if _clip_columns(rows) is not None else None


def _language_code(name: str) -> str | None:
    """The code of a language by the name of a folder: `cs`, `cs_CZ` or `czech`."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    first_part = re.split(r"[-_]", name.lower())[0]
    if first_part in TO_LANGUAGE_CODE.values():
        return first_part
    return TO_LANGUAGE_CODE.get(name.lower())


def _guess_folder(source: str) -> GuessedTask:
    """A folder of source code or text: all files of its most common ending."""
    files = [file for file in Path(source).rglob("*") if file.is_file() and file.suffix]
    endings = Counter(file.suffix for file in files)
    if not endings:
        raise user_error(source, None, "holds no files: give a folder of source code or text")
    ending, count = endings.most_common(1)[0]
    train = {"folder": source, "glob": f"**/*{glob.escape(ending)}"}
    return GuessedTask({"train": train, "truncation": "split"}, f"{count:,} files {ending}, learnt whole")


def _guess_file(source: str, language: str | None) -> GuessedTask:
    rows = _rows(source)
    columns = _columns(rows)
    clips = _clip_columns(rows)
    if clips is not None:
        return _speech_task(source, rows, clips, language)
    chat = _guess_chat(source, rows)
    if chat is not None:
        return chat
    preferences = guess_preferences(rows)
    if preferences is not None:
        keys = {"train": source, **preferences.keys}
        task = _with_labels(keys, preferences.description, rows, used=preferences.used)
        return replace(task, is_chat=preferences.holds_messages)
    for prompt, completion in PAIRS:
        if prompt in columns and completion in columns:
            return _pair_task(source, rows, prompt, completion)
    labels = guess_labels(rows)
    if labels is not None:
        description = f"{labels.description}{_unused(rows, labels.used)}"
        return GuessedTask({"train": source, **labels.keys}, description, is_labelled=True)
    embeddings = guess_embeddings(rows)
    if embeddings is not None:
        keys = {"train": source, **embeddings.keys}
        task = _with_labels(keys, embeddings.description, rows, used=embeddings.used)
        smallest = len(rows)
        if "split_by" in task.keys:
            smallest = min(Counter(cell_text(row.get(str(task.keys["split_by"]))) for row in rows).values())
        return replace(task, embeds=True, smallest=smallest)
    text = next((column for column in WHOLE_TEXTS if column in columns), None)
    if text is None:
        hint = (
            f"has the columns {choices(columns)}, of which none is known as a prompt or a completion: write "
            "tasks.NAME.prompt and tasks.NAME.completion by hand (docs/data.md), or text and label "
            "(docs/labels.md), or anchor and positive (docs/embeddings.md)"
        )
        raise user_error(source, None, hint)
    keys = {"train": source, "text": text}
    return _with_labels(keys, f"{len(rows):,} rows, {text} is learnt whole", rows, used=[text])


def _guess_chat(source: str, rows: Sequence[Row]) -> GuessedTask | None:
    """A task of conversations, if a column has lists of messages, or a prompt and its completion do."""
    chats = [column for column in _columns(rows) if _holds_messages(rows, column)]
    prompt, completion = PAIRS[0]
    keys: dict[str, JsonValue] = {"train": source}
    if {prompt, completion} <= set(chats):
        keys |= {"prompt": prompt, "completion": completion}
        learnt = f"the assistant's turns of {completion} are learnt after {prompt}"
    elif {"chosen", "rejected"} & set(chats) or not chats:
        return None
    else:
        messages = next((column for column in MESSAGE_COLUMNS if column in chats), chats[0])
        keys |= {"messages": messages}
        learnt = f"the assistant's turns of {messages} are learnt"
    description = f"{len(rows):,} conversations, {learnt}"
    tools = next((column for column in TOOL_COLUMNS if any(row.get(column) for row in rows)), None)
    if tools is not None:
        keys["tools"] = tools
        description += f", with {tools}"
    used = [str(keys[key]) for key in ("messages", "prompt", "completion", "tools") if key in keys]
    if any(row.get(SYSTEM) for row in rows):
        used.append(SYSTEM)
    calls = any(_calls_tools(row.get(column)) for row in rows for column in chats)
    return replace(_with_labels(keys, description, rows, used=used), is_chat=True, calls_tools=calls)


def _calls_tools(cell: object) -> bool:
    if isinstance(cell, str):
        return '"tool_calls"' in cell or '"function_call"' in cell
    messages = cell if isinstance(cell, list) else []
    return any(
        message.get("tool_calls") or message.get("function_call") or message.get("from") in CALLS
        for message in messages
        if isinstance(message, dict)
    )


def _holds_messages(rows: Sequence[Row], column: str) -> bool:
    first = next((row[column] for row in rows if row.get(column) is not None), None)
    return is_message_list(first)


def _rows(source: str) -> list[Row]:
    try:
        config = SourceConfig.model_validate({"files": [source]})
    except ValidationError as error:
        raise user_error(source, None, str(error.errors()[0]["msg"])) from error
    return read_rows(config, "source")


def _columns(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def _clip_columns(rows: Sequence[Row]) -> tuple[str, str] | None:
    """The columns of clips and of transcripts; None if the rows have none."""
    columns = _columns(rows)
    audio = next((column for column in AUDIO if column in columns and _is_sound(rows[0].get(column))), None)
    sentence = next((column for column in SENTENCE if column in columns), None)
    return None if audio is None or sentence is None else (audio, sentence)


def _is_sound(cell: object) -> bool:
    return str(cell).lower().endswith(SOUNDS)


def _speech_task(
    source: str, rows: Sequence[Row], clips: tuple[str, str], language: str | None
) -> GuessedTask:
    audio, sentence = clips
    if language is None:
        hint = (
            f"holds clips ({audio}) with transcripts ({sentence}), and their language is not known: give "
            "--language cs, for example, or a folder that is named by the language"
        )
        raise user_error(source, None, hint)
    speech = {"language": language, "audio": audio, "sentence": sentence}
    description = f"{len(rows):,} clips in {language}{_unused(rows, clips)}"
    return GuessedTask({"speech": speech, "train": source}, description, is_speech=True)


def _pair_task(source: str, rows: Sequence[Row], prompt: str, completion: str) -> GuessedTask:
    keys = {"train": source, "prompt": f"{{{prompt}}}", "completion": f"\n{{{completion}}}"}
    if (prompt, completion) == PAIRS[0]:
        keys = {"train": source, "prompt": prompt, "completion": completion}
    description = f"{len(rows):,} rows, {completion} is learnt after {prompt}"
    return _with_labels(keys, description, rows, used=[prompt, completion])


def _with_labels(
    keys: Mapping[str, JsonValue], description: str, rows: Sequence[Row], *, used: Sequence[str]
) -> GuessedTask:
    """A task of text, divided by a column whose name says that it holds labels, if it has one."""
    labels = {
        column: counts
        for column in _columns(rows)
        if (counts := _label_counts(rows, column)) and column not in used
    }
    if not labels:
        return GuessedTask(keys, f"{description}{_unused(rows, used)}")
    named = [column for column in labels if column.lower() in LABELS]
    if not named:
        column = min(labels, key=lambda name: len(labels[name]))
        note = (
            f"; split_by: {cell_text(column)} would make a task of each of its {len(labels[column])} values"
        )
        return GuessedTask(keys, f"{description}{_unused(rows, used)}{note}")
    column = min(named, key=lambda name: LABELS.index(name.lower()))
    values = ", ".join(
        f"{' '.join(value.split())} {count:,}" for value, count in labels[column].most_common()
    )
    note = f"; one task for each {cell_text(column)}: {values}"
    return GuessedTask({**keys, "split_by": column}, f"{description}{note}{_unused(rows, [*used, column])}")


def _label_counts(rows: Sequence[Row], column: str) -> Counter[str] | None:
    """Value -> rows of a column of labels; None for other columns."""
    cells = [row.get(column) for row in rows]
    if any(cell is None or not isinstance(cell, str | int) or not str(cell).strip() for cell in cells):
        return None
    counts = Counter(cell_text(cell) for cell in cells)
    is_label = 2 <= len(counts) <= MOST_LABELS and min(counts.values()) >= ROWS_PER_LABEL
    return counts if is_label else None


def _unused(rows: Sequence[Row], used: Sequence[str]) -> str:
    """A note on the columns that the recipe does not use."""
    rest = [" ".join(cell_text(column).split()) for column in _columns(rows) if column not in used]
    more = f" and {len(rest) - SHOWN_COLUMNS} more" if len(rest) > SHOWN_COLUMNS else ""
    return f"; not used: {', '.join(rest[:SHOWN_COLUMNS])}{more}" if rest else ""
