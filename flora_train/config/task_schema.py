"""What can a task be told? Where its rows come from, and what in them is read and learnt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from flora_train.config.section import Section, Text


class SourceConfig(Section):
    """Where rows come from: exactly one of `hub`, `files` or `folder`. A bare string means `files`."""

    hub: Text | None = None
    """A data set on the Hugging Face hub."""
    subset: str | None = None
    """Its configuration name."""
    split: str = "train"
    """Its split."""
    data_dir: str | None = None
    """The folder of it that is read, where it has one a language (data/lua)."""
    revision: str | None = None
    """Its branch, tag or commit."""
    max_rows: int | None = Field(None, ge=1)
    """Read its first so many rows only, streamed: for data sets that are larger than the disk."""
    stand_in: str | None = None
    """A local source that can take its place: what the error says when the hub does not give it."""
    files: list[Text] | None = Field(None, min_length=1)
    """Paths or globs of .jsonl, .json, .parquet, .csv, .tsv or .txt files."""
    folder: str | None = Field(None, validate_default=True)
    """A folder of source code: one row a file, in column `text` (and its path in `path`)."""
    glob: Text = "**/*"
    """Which files of `folder`. Hidden ones (.git) are left out."""
    sample_by: Literal["line", "paragraph", "document"] = "line"
    """How a .txt file is cut into rows (as in `datasets`): blank lines stand between paragraphs."""

    @field_validator("folder")
    @classmethod
    def _exactly_one_kind(cls, folder: str | None, info: ValidationInfo) -> str | None:
        kinds = {"hub", "files"}
        given = sorted(kind for kind in kinds if info.data.get(kind) is not None) + ["folder"] * (folder is not None)
        if kinds <= info.data.keys() and len(given) != 1:
            raise ValueError(f"give exactly one of hub, files or folder, not {' and '.join(given) or 'none'}")
        return folder


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


class TaskConfig(Section):
    train: Source
    """Rows to learn from."""
    validation: Source | None = None
    """Held-out rows. Without it, `validation_fraction` of the training rows is split off by seed."""
    validation_fraction: float = Field(0.05, gt=0, lt=1)
    """Share of the training rows held out when there is no validation source."""
    prompt: Text | None = None
    """Column (or template with {columns}) that is read but not learnt."""
    completion: Text | None = Field(None, validate_default=True)
    """Column (or template) that is learnt after the prompt."""
    text: Text | None = None
    """Column (or template) that is learnt whole. Use this or prompt + completion."""
    max_examples: int | None = Field(None, ge=1)
    """Use at most this many training rows (a seeded sample)."""
    max_validation_examples: int | None = Field(None, ge=1)
    """Use at most this many held-out rows (a seeded sample)."""
    over_long: Literal["truncate", "split", "drop"] = "truncate"
    """What happens to examples longer than training.max_length tokens; each is counted in the report. split: equal
    parts (examples with a prompt are truncated)."""
    packing: bool = False
    """Put short training examples together into sequences of up to training.max_length tokens. They do not see each other;
    fewer, fuller rows cost less padding. Checked on the model before training."""
    language: Text | None = None
    """The programming language that completions are judged in: a key of eval/languages.yaml (lua, pl, rb, ...)."""
    weight: float = Field(1.0, gt=0)
    """Share in the mixture, relative to the other tasks."""
    sample_prompts: list[Text] = []
    """Prompts completed by the base model and by every adapter at the end of the run."""

    @field_validator("completion")
    @classmethod
    def _both_or_neither(cls, completion: str | None, info: ValidationInfo) -> str | None:
        if "prompt" in info.data and (completion is None) != (info.data["prompt"] is None):
            raise ValueError("prompt and completion belong together: give both, or text for one learnt column")
        return completion

    @field_validator("text")
    @classmethod
    def _one_format(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and (info.data.get("prompt") is not None or info.data.get("completion") is not None):
            raise ValueError("give text, or prompt and completion, not both")
        return text
