"""The encoder of a task's rows, by the format of the rows."""

from __future__ import annotations

from typing import Any

from flora_train.config.errors import user_error
from flora_train.config.task_schema import TaskConfig
from flora_train.data.chat.rows import ChatRowEncoder, chat_columns, check_chat_keys
from flora_train.data.documents import RowEncoder, RowsOutline
from flora_train.data.embeddings.rows import EmbeddingRowEncoder
from flora_train.data.labels.rows import LabelRowEncoder
from flora_train.data.labels.verbalizer import VerbalizerRowEncoder
from flora_train.data.member_rows import MemberRowEncoder
from flora_train.data.preferences.rows import PreferenceRowEncoder, has_pairs
from flora_train.data.text_rows import TextRowEncoder


def make_row_encoder(
    task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
) -> RowEncoder:
    """The encoder of a task. A worker process can make the same one from the same arguments.

    rows: the training rows; max_length: training.max_length; key: the task's configuration key. Raises
    UserError if the rows do not have the columns that the task names, or a template is malformed.
    """
    encoder = _encoder_of_format(task, tokenizer, rows=rows, max_length=max_length, key=key)
    if task.task_id is None:
        return encoder
    if isinstance(encoder, PreferenceRowEncoder):
        hint = "has no meaning for preferences: it belongs to tasks of texts; remove it"
        raise user_error(f"{key}.task_id", task.task_id, hint)
    return MemberRowEncoder(encoder, task, rows=rows, key=key)


def _encoder_of_format(
    task: TaskConfig, tokenizer: Any, *, rows: RowsOutline, max_length: int, key: str
) -> RowEncoder:
    if task.has_head:
        return LabelRowEncoder(task, tokenizer, rows=rows, max_length=max_length, key=key)
    if task.is_labelled:
        return VerbalizerRowEncoder(task, tokenizer, rows=rows, max_length=max_length, key=key)
    if task.embeds:
        return EmbeddingRowEncoder(task, tokenizer, rows=rows, max_length=max_length, key=key)
    if task.prefers or (task.objective == "sft" and has_pairs(task, rows.columns)):
        return PreferenceRowEncoder(task, tokenizer, rows=rows, max_length=max_length, key=key)
    columns = chat_columns(task, rows)
    if columns is not None:
        return ChatRowEncoder(task, tokenizer, columns=columns, rows=rows, max_length=max_length, key=key)
    check_chat_keys(task, rows, key)
    return TextRowEncoder(task, tokenizer, rows=rows, max_length=max_length, key=key)
