"""Published results that a report shows beside those of a run: the form of eval/paper_tables.yaml."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from flora_train.config.base import ConfigModel, Text
from flora_train.config.errors import Problem, UserError, did_you_mean, user_error
from flora_train.config.language_names import language_key
from flora_train.config.paths import PROJECT_ROOT, exists, find_file, read_yaml
from flora_train.config.validation_errors import HINTS

PAPER = "paper"
PAPER_TABLES = PROJECT_ROOT / "eval" / "paper_tables.yaml"
NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
MEAN_AND_DEVIATION = re.compile(rf"\s*({NUMBER})\s*(?:(?:±|\+/?-)\s*({NUMBER})\s*)?")
ABSENT = ("-", "–", "—", "")
"""A cell without a value, as papers write it."""
LARGEST = 1e9
MOST_ERRORS = 10
"""Errors per word that a recogniser hardly makes, even one that repeats itself."""

Amount = Annotated[float, Field(ge=0, le=LARGEST)]
Positive = Annotated[float, Field(gt=0, le=1e18)]


class Cell(ConfigModel):
    """One published figure: a number, or a text such as `30.21 ± 0.25`."""

    mean: Amount
    deviation: Amount | None = None

    @model_validator(mode="before")
    @classmethod
    def _number_or_text(cls, value: Any) -> Any:
        hint = "must be a number, or a mean with its deviation, such as 30.21 ± 0.25"
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {"mean": value}
        if not isinstance(value, str):
            raise ValueError(hint)
        match = MEAN_AND_DEVIATION.fullmatch(value)
        if match is None:
            raise ValueError(hint)
        return {"mean": match[1], "deviation": match[2]}


class Setup(ConfigModel):
    """How published results were made, as far as that is published. None: not known, and not compared."""

    model: Text | None = None
    """The base model, as `model.path` names it."""
    parameters: Positive | None = None
    """Number of parameters of the base model."""
    quantization: Text | None = None
    """As `model.quantization`."""
    data: Text | None = None
    """Name of the training data."""
    steps: Positive | None = None
    examples_per_step: Positive | None = None
    """Examples that an adapter learns from in one step."""
    learning_rates: dict[Text, Positive] = {}
    """Method -> learning rate."""
    variant: Text | None = None
    """Of fLoRA, as `adapters.*.variant`."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of fLoRA and LoRA."""
    rank_in: dict[Text, Annotated[int, Field(ge=1)]] = {}
    """Language -> rank, where it differs from `rank`."""
    num_problems: Positive | None = None
    """Problems of each language."""
    num_samples: Positive | None = None
    """Completions of each problem."""
    temperature: Amount | None = None


class PublishedTable(ConfigModel):
    """One table: languages by methods."""

    title: Text
    metric: Text
    """pass@K, wer (as written), wer_normalized or cer."""
    unit: Literal["percent", "fraction"] = "percent"
    problems: Literal["multipl-e", "starter"] = "multipl-e"
    """The problems that pass@K was computed on."""
    same_model_only: bool = False
    """Shown only beside a run of `setup.model`."""
    setup: Setup = Setup()
    notes: list[Text] = []
    """Sentences below the table."""
    names: dict[Text, Text] = {}
    """Language -> its name for readers, where it should not be its key."""
    results: Annotated[dict[Text, dict[Text, Cell | None]], Field(min_length=1)]
    """Language -> method, or family of the run -> published figure."""

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, value: str) -> str:
        if re.fullmatch(r"pass@[1-9]\d{0,5}", value) or value in ("wer", "wer_normalized", "cer"):
            return value
        raise ValueError("must be pass@K, wer, wer_normalized or cer")

    @field_validator("results", mode="before")
    @classmethod
    def _absent_cells(cls, value: Any) -> Any:
        """A dash stands for no figure."""
        if not isinstance(value, dict):
            return value
        results: dict[Any, Any] = {}
        for language, row in value.items():
            results[language] = row
            if isinstance(row, dict):
                results[language] = {method: _cell(cell) for method, cell in row.items()}
        return results

    @field_validator("names")
    @classmethod
    def _names_by_key(cls, names: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        return {_language(info.data.get("metric"), language): name for language, name in names.items()}

    @field_validator("results")
    @classmethod
    def _results_by_key(
        cls, results: dict[str, dict[str, Cell | None]], info: ValidationInfo
    ) -> dict[str, dict[str, Cell | None]]:
        """The rows by the keys of their languages: `perl` is `pl`.

        Raises ValueError for a language that occurs twice, and for an impossible rate.
        """
        metric = info.data.get("metric")
        most = 100.0 if info.data.get("unit") == "percent" else 1.0
        rows: dict[str, dict[str, Cell | None]] = {}
        for language, row in results.items():
            key = _language(metric, language)
            if key in rows:
                raise ValueError(f"has {language} twice, by two names")
            rows[key] = row
            for method, cell in row.items():
                if cell is not None and cell.mean > most and str(metric).startswith("pass@"):
                    raise ValueError(
                        f"{language}.{method} is {cell.mean:g}, but {metric} is at most {most:g}"
                    )
        if not any(rows.values()):
            raise ValueError("must have a figure of at least one method: base: 17.3")
        return rows

    @property
    def k(self) -> int | None:
        """Of pass@k; None for error rates."""
        return int(self.metric.removeprefix("pass@")) if self.metric.startswith("pass@") else None

    @property
    def methods(self) -> list[str]:
        """All methods, the base first."""
        methods = dict.fromkeys(method for row in self.results.values() for method in row)
        return sorted(methods, key=lambda method: method != "base")

    @property
    def doubts(self) -> list[str]:
        """A sentence where the figures are rather of the other unit."""
        means = [cell.mean for row in self.results.values() for cell in row.values() if cell is not None]
        highest = max(means, default=0.0)
        if self.unit == "percent" and 0 < highest < 1:
            return ["All published figures are below 1 %: if they are fractions, write unit: fraction."]
        if self.unit == "fraction" and highest > MOST_ERRORS:
            return ["Published rates are above 1,000 %: if they are percentages, write unit: percent."]
        return []

    def fraction(self, language: str, method: str) -> Cell | None:
        """A published figure as a fraction; None if there is none."""
        cell = self.results[language].get(method)
        if cell is None or self.unit == "fraction":
            return cell
        deviation = None if cell.deviation is None else _hundredth(cell.deviation)
        return Cell.model_construct(mean=_hundredth(cell.mean), deviation=deviation)

    def rank(self, language: str) -> int | None:
        """The published rank in a language."""
        ranks = {_language(self.metric, name): rank for name, rank in self.setup.rank_in.items()}
        return ranks.get(language, self.setup.rank)


class PublishedResults(ConfigModel):
    """A file of published tables."""

    source: Text
    """Where the figures were published."""
    tables: Annotated[list[PublishedTable], Field(min_length=1)]


def load_published(name: str) -> PublishedResults:
    """The published results in a file, or those of the paper for the word `paper`. Raises UserError."""
    if name == PAPER:
        return read_published(PAPER_TABLES)
    path = find_file(name)
    if not exists(path) or path.is_dir():
        reason = "is a folder" if exists(path) else "no such file"
        hint = f"{reason}: give paper, or a YAML file of published results (docs/reports.md)."
        raise user_error("beside", name, hint + did_you_mean(name, [PAPER]))
    return read_published(path)


def read_published(path: Path) -> PublishedResults:
    """The published results in a file. Raises UserError, which names every wrong key."""
    content = read_yaml(path)
    try:
        return PublishedResults.model_validate(content)
    except ValidationError as error:
        problems: dict[str, Problem] = {}
        for item in error.errors():
            problem = _problem(path, item)
            problems.setdefault(problem.key, problem)
        raise UserError(*problems.values()) from None


def _problem(path: Path, item: Any) -> Problem:
    location = [part for part in item["loc"] if part not in ("[key]", "mean", "deviation")]
    key = f"{path}: {'.'.join(map(str, location))}"
    if item["type"] == "extra_forbidden":
        allowed = _keys_beside(location)
        hint = f"unknown key; the keys here are {', '.join(allowed)}."
        return Problem(key, None, hint + did_you_mean(str(location[-1]), allowed))
    if item["type"] == "missing":
        return Problem(key, None, HINTS["missing"])
    hint = HINTS.get(item["type"], item["msg"].replace("{", "{{").replace("}", "}}"))
    if item["type"] in ("model_type", "dict_type"):
        hint = "must hold keys and values"
    value = item["input"]
    if isinstance(value, (dict, list)):
        value = None
    context = {
        name: f"{part:g}" if isinstance(part, float) else part for name, part in item.get("ctx", {}).items()
    }
    return Problem(key, value, hint.format(**context))


def _keys_beside(location: Sequence[Any]) -> list[str]:
    """The keys that are allowed where an unknown one was found."""
    model: type[ConfigModel] = PublishedResults
    if len(location) == 3:
        model = PublishedTable
    elif len(location) > 3:
        model = Setup
    return list(model.model_fields)


def _language(metric: str | None, name: str) -> str:
    """The key of a language: of eval/languages.yaml for programs, a code in lower case for speech."""
    if metric is not None and metric.startswith("pass@"):
        return language_key(name)
    return name.strip().lower()


def _hundredth(value: float) -> float:
    """Without the digits that binary fractions add."""
    return round(value / 100, 10)


def _cell(value: Any) -> Any:
    """None for a dash."""
    if isinstance(value, str) and value.strip() in ABSENT:
        return None
    return value
