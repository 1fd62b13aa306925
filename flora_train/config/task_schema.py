"""A task: the source of its rows, and which columns are read and learnt."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from flora_train.config.base import MOST_ROWS, ConfigModel, PathText, Revision, Text
from flora_train.config.chat_schema import CHAT_KEYS, ChatKeys, chat_key_of
from flora_train.config.embedding_schema import EMBEDDING_KEYS, EmbeddingKeys
from flora_train.config.label_schema import LABEL_KEYS, LabelKeys
from flora_train.config.language_names import ProgrammingLanguage
from flora_train.config.metric_names import (
    OF_EMBEDDINGS,
    OF_LABELS,
    OF_LOSS,
    Metrics,
    SelectionFigure,
    functions_of,
    is_function,
)
from flora_train.config.moved_datasets import moved_hint
from flora_train.config.preference_schema import PAIRED
from flora_train.config.sample_prompts import SamplePrompt
from flora_train.config.speech_schema import SpeechConfig


class SourceConfig(ConfigModel):
    """The source of rows: exactly one of `hub`, `files`, `common_voice` or `folder`. A string or list means
    `files`."""

    hub: PathText | None = None
    """Name of a data set on the Hugging Face hub."""
    subset: str | None = None
    """Configuration name of the hub data set. Default: its default configuration."""
    split: str = "train"
    """Split of the hub data set, or of the Common Voice release."""
    data_dir: str | None = None
    """Folder of the hub data set that is read, for data sets with a folder per language (data/lua). Default:
    all of it."""
    revision: Revision = None
    """Branch, tag or commit of the hub data set. Default: its main branch."""
    max_rows: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Number of rows of the hub data set that are read from its beginning, for data sets that are larger than
    the disk: no more of its files are downloaded than hold these rows. Default: all rows."""
    fallback_hint: str | None = None
    """Local source that can replace the hub data set, for the error message when the hub cannot be
    reached."""
    files: list[PathText] | None = Field(None, min_length=1)
    """Paths or globs of .jsonl, .json, .parquet, .csv, .tsv or .txt files."""
    common_voice: PathText | None = None
    """A Common Voice release as it is downloaded: its folder (cv-corpus-<version>/), the .tar.gz of a
    language, or a folder of these."""
    locale: Text | None = Field(None, validate_default=True)
    """Language of the Common Voice release (cs, mr, ...), which is the name of its folder there."""
    folder: PathText | None = Field(None, validate_default=True)
    """A folder of source code: one row per file, with the columns text and path."""
    glob: Text = "**/*"
    """Pattern of the files in folder. Hidden files (.git) are left out."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """How a .txt file is divided into rows, as in the datasets library. Blank lines separate paragraphs."""

    @field_validator("hub")
    @classmethod
    def _is_on_the_hub(cls, hub: str | None) -> str | None:
        if hub is not None and (hint := moved_hint(hub)):
            raise ValueError(hint)
        return hub

    @field_validator("locale")
    @classmethod
    def _a_release_has_languages(cls, locale: str | None, info: ValidationInfo) -> str | None:
        if "common_voice" in info.data and (locale is None) != (info.data["common_voice"] is None):
            raise ValueError(
                "common_voice and locale (its language: cs, mr, ...) go together: give both or neither"
            )
        return locale

    @field_validator("folder")
    @classmethod
    def _exactly_one_kind(cls, folder: str | None, info: ValidationInfo) -> str | None:
        kinds = {"hub", "files", "common_voice"}
        given = sorted(kind for kind in kinds if info.data.get(kind) is not None) + ["folder"] * (
            folder is not None
        )
        if kinds <= info.data.keys() and len(given) != 1:
            raise ValueError(
                f"give exactly one of hub, files, common_voice or folder, not {' and '.join(given) or 'none'}"
            )
        return folder


LEAST_WEIGHT = 1e-6


def _source_shorthand(value: Any) -> Any:
    """`train: a.jsonl`, `train: [a.jsonl, b.jsonl]` and `files: a.jsonl` are the common cases."""
    if isinstance(value, str):
        return {"files": [value]}
    if isinstance(value, list):
        return {"files": value}
    if isinstance(value, dict) and isinstance(value.get("files"), str):
        return {**value, "files": [value["files"]]}
    return value


Source = Annotated[SourceConfig, BeforeValidator(_source_shorthand)]


NOT_OF_EMBEDDINGS = {
    "prompt": "has no meaning for embeddings, whose texts are anchor, positive and negative: remove it",
    "completion": "has no meaning for embeddings, whose texts are anchor, positive and negative: remove it",
    "text": "has no meaning for embeddings, whose texts are anchor, positive and negative: remove it",
    "packing": "has no meaning for embeddings, of which each text is a row of its own: remove it",
    "language": "needs adapters that write programs, and those of this task learn embeddings: remove it",
    "sample_prompts": "needs adapters that write text, and those of this task learn embeddings: remove it",
}
"""Keys that a task of embeddings cannot have -> the reason."""


class TaskConfig(EmbeddingKeys, LabelKeys, ChatKeys):
    train: Source
    """Rows to learn from: a file, a list of files, or a source with hub, files, common_voice or folder. Test
    splits are refused."""
    validation: Source | None = None
    """Held-out rows. Default: validation_fraction of the training rows, chosen by split_seed."""
    test: Source | None = None
    """Speech and labelled texts: rows that results are measured on, which are used neither for training nor
    for selection. Default: test_fraction of the training rows if that is given, else the validation rows."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the training rows that is held out if there is no validation source."""
    split_by: Text | None = None
    """Column whose values make tasks: one task for each distinct value, named NAME_VALUE, with the rows of
    that value and all other keys of this task. In names, + is written p, # sharp, and other characters that a
    name cannot have _. {value} in language, speech.language and speech.token stands for the value. Default:
    one task of all rows."""
    split_value: Text | None = Field(None, validate_default=True)
    """With split_by: the value whose rows belong to this task, instead of one task for each value. Set by the
    program for the tasks that it makes. Default: all values."""
    split_seed: int | None = Field(None, ge=0, le=2**63 - 1)
    """Seed that chooses held-out and used rows (validation_fraction, max_examples and similar keys), so that
    runs with other seeds can use the same rows. Default: seed."""
    prompt: Text | None = None
    """Column, or template with {columns}, that is read but not learnt."""
    completion: Text | None = Field(None, validate_default=True)
    """Column, or template with {columns}, that is learnt after the prompt."""
    text: Text | list[Text] | None = Field(None, validate_default=True)
    """Column, or template with {columns}, that is learnt as a whole, instead of prompt and completion.
    Default: the columns prompt and completion if the rows have them, else text. Of labelled texts: what is
    labelled, which can be a list of two, a pair of texts that the tokenizer joins; with token_labels the
    column of lists of tokens, by default tokens."""
    max_examples: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Largest number of training rows, a random sample by split_seed. Default: all."""
    max_validation_examples: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Largest number of held-out rows, a random sample by split_seed. Default: all."""
    max_test_examples: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Speech and labelled texts: largest number of test rows, a random sample by split_seed. Default:
    all."""
    truncation: Literal["truncate", "split", "drop"] = "truncate"
    """What happens to examples of more than training.max_length tokens; the report counts each. truncate: the
    end is cut off. split: they are divided into equal parts (examples with a prompt are truncated). drop:
    they are left out."""
    packing: bool = False
    """Pack short training examples into sequences of up to training.max_length tokens, which need less
    padding. Examples of a sequence do not attend to each other, which is checked on the model before
    training."""
    special_tokens: bool = False
    """Read special tokens of the base model (<|im_end|>, </s>, <think>) that are written in rows as tokens,
    for text that was rendered with a chat template. false: they are ordinary text in rows, and tokens in the
    recipe's own templates."""
    language: ProgrammingLanguage | None = None
    """Programming language in which completions are evaluated: a key of eval/languages.yaml (lua, pl, rb,
    ...), or MultiPL-E's other name for it (perl, ruby, ...). Default: the task is not evaluated on
    programming problems."""
    speech: SpeechConfig | None = None
    """Makes this a speech task. Default: a task of text."""
    task_id: Text | None = None
    """Column that names, for each row, the adapter in adapters.*.over that the row belongs to: adapters of
    method meteora learn to choose it (gate_loss). Only training reads it. Default: their gates learn from the
    loss of the texts alone."""
    task_members: list[Text] | None = None
    """With task_id: the names that the column may hold. Set by the program: those of the adapters in over."""
    license: Text | None = None
    """License of the rows, for the model cards of its adapters: an identifier of the hub (mit, cc0-1.0,
    other, ...)."""
    weight: float = Field(1.0, gt=0, le=1e6)
    """Share in the mixture, relative to the other tasks."""
    sample_prompts: list[SamplePrompt] = []
    """Prompts that the base model and every adapter complete at the end of the run: texts, which are
    continued as they are, or lists of messages with role and content, which are answered."""

    metrics: Metrics = []
    """Metrics of the held-out rows at the end of the run, beside the loss. perplexity: of the learnt tokens.
    exact_match, rouge_l, chrf, bleu (the last two need the extra text-metrics): the base model and every
    adapter answer the held-out prompts greedily, and the answers are compared with the completions.
    MODULE:FUNCTION: a function of your own, which is called with the lists of answers and of completions and
    returns a number, such as my_metrics:score; of labelled texts, with the lists of predicted labels and of
    labels."""
    select_by: SelectionFigure = None
    """Figure of the held-out rows that the best state of an adapter is selected by (evaluation.select_best),
    and that patience and halving go by. Of labels: accuracy, balanced_accuracy, macro_f1, weighted_f1, mcc or
    auroc; of several labels micro_f1, macro_f1, subset_accuracy or auroc; of numbers mse, mae, r2, pearson or
    spearman; of tokens token_accuracy, token_macro_f1 or entity_f1; or a function of your own as in metrics.
    Of embeddings: recall_at_1 or mrr. Default: the held-out loss (loss)."""
    max_metric_examples: int | None = Field(None, ge=1, le=MOST_ROWS)
    """Largest number of held-out prompts that are answered for metrics, the first ones. Default: all."""
    max_new_tokens: int | None = Field(None, ge=1, le=1_000_000)
    """Largest number of tokens of an answer for metrics. Default: evaluation.max_new_tokens."""

    @field_validator("weight")
    @classmethod
    def _is_drawn_at_all(cls, weight: float) -> float:
        if weight < LEAST_WEIGHT:
            raise ValueError(f"must be at least {LEAST_WEIGHT:g}: the task would not be drawn")
        return weight

    @field_validator("label", "token_labels")
    @classmethod
    def _conversations_have_no_labels(cls, column: str | None, info: ValidationInfo) -> str | None:
        if column is not None and info.data.get("objective") is None and (key := chat_key_of(info)):
            raise ValueError(f"is of labelled texts, and {key} belongs to conversations: remove one of them")
        return column

    @field_validator("prompt")
    @classmethod
    def _words_follow_a_prompt(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        if prompt is not None and has_head(info):
            raise ValueError("has no meaning for labelled texts without verbalizer: give text instead")
        return prompt

    @field_validator("split_value")
    @classmethod
    def _requires_split_by(cls, split_value: str | None, info: ValidationInfo) -> str | None:
        if split_value is not None and "split_by" in info.data and info.data["split_by"] is None:
            raise ValueError("requires split_by: set it to a column, or remove this key")
        return split_value

    @field_validator("completion")
    @classmethod
    def _both_or_neither(cls, completion: str | None, info: ValidationInfo) -> str | None:
        if is_labelled(info):
            if completion is not None:
                raise ValueError("has no meaning for labelled texts: what is learnt is the label; remove it")
            return completion
        objective = info.data.get("objective")
        if objective in PAIRED and completion is not None:
            raise ValueError(f"has no meaning for objective {objective}, which learns chosen: remove it")
        if objective in PAIRED or objective == "kto" or info.data.get("chosen") is not None:
            return completion
        if "prompt" in info.data and (completion is None) != (info.data["prompt"] is None):
            raise ValueError("prompt and completion belong together: give both, or text for a single column")
        if completion is not None and info.data.get("messages") is not None:
            raise ValueError("give messages, or prompt and completion, not both")
        return completion

    @field_validator("text")
    @classmethod
    def _one_format(cls, text: str | list[str] | None, info: ValidationInfo) -> str | list[str] | None:
        if is_labelled(info):
            _check_labelled_text(text, info)
            return text
        if isinstance(text, list):
            raise ValueError("is a list, which only labelled texts can be: name one column, or set label")
        if text is not None and (
            info.data.get("prompt") is not None or info.data.get("completion") is not None
        ):
            raise ValueError("give text, or prompt and completion, not both")
        if text is not None and (info.data.get("objective") not in (None, "sft") or info.data.get("chosen")):
            raise ValueError("has no meaning for preferences, which compare completions: remove it")
        if text is not None and (key := chat_key_of(info)) is not None:
            raise ValueError(f"is learnt as a whole, and {key} belongs to conversations: remove one of them")
        return text

    @field_validator("truncation")
    @classmethod
    def _pairs_are_whole(cls, truncation: str, info: ValidationInfo) -> str:
        if truncation == "split" and info.data.get("objective") not in (None, "sft"):
            raise ValueError("cannot divide the completions of a preference: use truncate or drop")
        if truncation == "split" and is_labelled(info):
            raise ValueError("cannot divide a text that is labelled as a whole: use truncate or drop")
        if truncation == "split" and info.data.get("anchor") is not None:
            raise ValueError("cannot divide texts whose embeddings are learnt: use truncate or drop")
        return truncation

    @field_validator("packing")
    @classmethod
    def _pairs_are_not_packed(cls, packing: bool, info: ValidationInfo) -> bool:
        if packing and info.data.get("objective") not in (None, "sft"):
            raise ValueError("has no meaning for preferences, whose completions are separate rows: remove it")
        if packing and has_head(info):
            raise ValueError(
                "has no meaning for labelled texts: encoders read in both directions, so that the texts of a "
                "sequence would see each other; remove it"
            )
        return packing

    @field_validator("language", "sample_prompts")
    @classmethod
    def _heads_write_no_text(cls, value: Any, info: ValidationInfo) -> Any:
        if value and has_head(info):
            raise ValueError(
                "needs an adapter that writes text, and those of this task predict labels: remove it"
            )
        return value

    @field_validator("anchor")
    @classmethod
    def _embeddings_have_texts_of_their_own(cls, anchor: str | None, info: ValidationInfo) -> str | None:
        names = ("objective", "chosen", "rejected", "label", "token_labels", *CHAT_KEYS)
        other = next((name for name in names if info.data.get(name) is not None), None)
        if anchor is not None and other is not None:
            raise ValueError(f"makes this a task of embeddings, and {other} one of another kind: remove one")
        return anchor

    @field_validator(*NOT_OF_EMBEDDINGS)
    @classmethod
    def _embeddings_are_no_text_to_write(cls, value: Any, info: ValidationInfo) -> Any:
        if value and value != "truncate" and info.data.get("anchor") is not None:
            raise ValueError(NOT_OF_EMBEDDINGS[str(info.field_name)])
        return value

    @field_validator("train")
    @classmethod
    def _never_train_on_a_test_split(cls, train: SourceConfig) -> SourceConfig:
        split = train.split if train.hub or train.common_voice else ""
        if re.search(r"\btest\b", split) or any(
            re.fullmatch(r"(.*\.)?test", _stem(file)) for file in train.files or ()
        ):
            raise ValueError("names a test split as training data: train on another one")
        return train

    @field_validator("speech")
    @classmethod
    def _text_is_not_speech(cls, speech: SpeechConfig | None, info: ValidationInfo) -> SpeechConfig | None:
        text_keys = [key for key in TEXT_ONLY if info.data.get(key) not in (None, False)]
        if speech is not None and text_keys:
            raise ValueError(
                f"belongs to a task of clips, {text_keys[0]} to a task of text: remove one of them"
            )
        return speech

    @field_validator("task_id")
    @classmethod
    def _texts_belong_to_members(cls, column: str | None, info: ValidationInfo) -> str | None:
        if column is None:
            return None
        kinds = {
            "labels": is_labelled(info),
            "preferences": info.data.get("objective") not in (None, "sft"),
            "embeddings": info.data.get("anchor") is not None,
            "speech": info.data.get("speech") is not None,
        }
        for kind, is_kind in kinds.items():
            if is_kind:
                raise ValueError(f"has no meaning for {kind}: it belongs to tasks of texts; remove it")
        return column

    @property
    def label_metrics(self) -> list[str]:
        """The metrics that are computed from predicted labels: functions of the user's own."""
        return functions_of(self.metrics) if self.is_labelled else []

    @property
    def label_functions(self) -> list[tuple[str, str]]:
        """(key, function) of the user's own functions of predicted labels."""
        functions = [("metrics", metric) for metric in self.label_metrics]
        if self.is_labelled and self.select_by is not None and is_function(self.select_by):
            functions.append(("select_by", self.select_by))
        return functions

    @property
    def selectable(self) -> tuple[str, ...]:
        """The figures that best states can be selected by, beside the loss and functions."""
        if self.embeds:
            return OF_EMBEDDINGS
        if self.token_labels is not None:
            return OF_LABELS["tokens"]
        if not self.is_labelled:
            return ()
        kinds = {"multi": self.multi_label, "regression": self.regression}
        return OF_LABELS[next((kind for kind, has_kind in kinds.items() if has_kind), "single")]

    @property
    def answer_metrics(self) -> list[str]:
        """The metrics for which texts have to be generated."""
        if self.is_labelled:
            return []
        return [metric for metric in self.metrics if metric not in OF_LOSS]

    @property
    def is_split(self) -> bool:
        """Whether this task stands for the tasks that are made of the values of a column."""
        return self.split_by is not None and self.split_value is None


TEXT_ONLY = (
    *CHAT_KEYS,
    "prompt",
    "completion",
    "text",
    "packing",
    "language",
    "objective",
    "label",
    *LABEL_KEYS,
    *EMBEDDING_KEYS,
)


def is_labelled(info: ValidationInfo) -> bool:
    """Whether the keys above this one make a task of labelled texts."""
    names_label = info.data.get("label") is not None and info.data.get("objective") is None
    return names_label or info.data.get("token_labels") is not None


def has_head(info: ValidationInfo) -> bool:
    """Whether the keys above this one make a task whose adapters learn a head."""
    is_valid = "verbalizer" in info.data  # else its own error is enough
    return is_valid and is_labelled(info) and info.data["verbalizer"] is None


def _check_labelled_text(text: str | list[str] | None, info: ValidationInfo) -> None:
    """Raises ValueError for a list that is no pair, and for a second text of what has one."""
    if text is not None and info.data.get("prompt") is not None:
        raise ValueError("give text or prompt, which are the same for a verbalizer, not both")
    if not isinstance(text, list):
        return
    if len(text) != 2:
        raise ValueError(f"has {len(text)} columns: give one, or a list of two for pairs of texts")
    if text[0] == text[1]:
        raise ValueError(f"names {text[0]!r} twice: a pair has two texts")
    if info.data.get("token_labels") is not None:
        raise ValueError("is a pair, and token_labels labels the tokens of one text: name one column")
    if info.data.get("verbalizer") is not None:
        raise ValueError(
            f"is a pair: with a verbalizer, write both into a template, such as "
            f"{'{' + text[0] + '}'} {'{' + text[1] + '}'}"
        )


def _stem(file: str) -> str:
    """a/b/cs.test.jsonl -> cs.test"""
    return PurePath(file).name.rpartition(".")[0]
