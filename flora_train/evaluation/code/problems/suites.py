"""Suites named by `evaluation.problems`: the starter problems, a folder, a table, or the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from flora_train.config.errors import choices, first_line, user_error
from flora_train.config.language_names import language_key
from flora_train.config.load import find_file
from flora_train.data.hub_commits import HUB_PREFIX
from flora_train.data.hub_dataset import HubDataset
from flora_train.evaluation.code.problems.problem import Problem, load_problems, problems_of_rows, prompt_file
from flora_train.evaluation.code.problems.starter import STARTER_LANGUAGES, load_starter_problems
from flora_train.runtime.hub_snapshot import HubError, open_snapshot

STARTER = "starter"
TABLE_SUFFIXES = (".yaml", ".yml")
"""Endings of a table of problems."""


@dataclass(frozen=True)
class Suite:
    """A set of problems in several languages."""

    name: str
    """Name of its folder in a run."""
    source: str
    """Its entry in evaluation.problems."""
    problems: Mapping[str, Mapping[str, Problem]]
    """Language -> name -> problem."""
    limit: int | None
    """Number of problems of each language to be solved; None: all."""
    missing: Mapping[str, str]
    """Language -> why the suite has no problems in it."""

    @property
    def asked(self) -> dict[str, dict[str, Problem]]:
        """Language -> name -> problem, of those to be solved."""
        return {
            language: dict(islice(problems.items(), self.limit))
            for language, problems in self.problems.items()
        }

    def sha(self, language: str) -> str:
        """SHA-256 of all problems in this language."""
        return sha256(
            "".join(problem.sha for problem in self.problems[language].values()).encode()
        ).hexdigest()


def load_suite(source: str, languages: Iterable[str], limit: int | None) -> Suite:
    """The suite's problems in these languages.

    Raises UserError if there is no such suite, or it has none of them.
    """
    problems_of: dict[str, Mapping[str, Problem]] = {}
    missing: dict[str, str] = {}
    with _opened(source) as dataset:
        for language in languages:
            problems = _problems(source, language, dataset)
            if problems is None:
                missing[language] = f"{source} has no problems in it"
            else:
                problems_of[language] = problems
    if not problems_of:
        raise user_error("evaluation.problems", source, f"has no problems in {choices(missing)}")
    return Suite(suite_name(source), source, problems_of, limit, missing)


def suite_name(source: str) -> str:
    """`starter`, or the last part of a folder, table or hub name, in lower case and without .yaml."""
    if source.startswith(HUB_PREFIX):
        return Path(source.removeprefix(HUB_PREFIX)).name.lower()
    path = find_file(source).resolve()
    name = path.stem if path.suffix in TABLE_SUFFIXES else path.name
    return name.lower()


@contextmanager
def _opened(source: str) -> Iterator[HubDataset | None]:
    """The data set that a source names; None for other sources."""
    if not source.startswith(HUB_PREFIX):
        yield None
        return
    try:
        import datasets
    except ImportError as error:
        hint = "needs datasets: pip install 'flora-train[hub]'"
        raise user_error("evaluation.problems", source, hint) from error
    datasets.disable_progress_bars()
    with _hub_errors(source):
        dataset = HubDataset(open_snapshot(source.removeprefix(HUB_PREFIX), None, "dataset"))
    with dataset:
        yield dataset


@contextmanager
def _hub_errors(source: str) -> Iterator[None]:
    """Raises UserError for what cannot be read from the hub."""
    try:
        yield
    except Exception as error:  # the libraries raise many types, for a damaged file for example
        reason = f"cannot be read ({type(error).__name__}: {first_line(error)})"
        if isinstance(error, HubError):
            reason = str(error)
        alternative = "give a folder with MultiPL-E's humaneval-<language>.jsonl, or starter"
        raise user_error("evaluation.problems", source, f"{reason}. Instead, {alternative}") from error


def _problems(source: str, language: str, dataset: HubDataset | None) -> Mapping[str, Problem] | None:
    if source == STARTER:
        return load_starter_problems(language) if language in STARTER_LANGUAGES else None
    if dataset is not None:
        return _from_hub(source, language, dataset)
    folder = find_file(source)
    if folder.suffix in TABLE_SUFFIXES and folder.is_file():
        return load_starter_problems(language, folder) if language in STARTER_LANGUAGES else None
    if not folder.is_dir():
        hint = (
            "is not a folder: give starter, a folder with MultiPL-E's humaneval-<language>.jsonl, a table "
            "of your own problems (.yaml, in the format of eval/starter_problems.yaml), or "
            "hub:nuprl/MultiPL-E (for evaluation only, never for training)"
        )
        raise user_error("evaluation.problems", source, hint)
    if prompt_file(folder, language) is None:
        return None
    return load_problems(folder, language)


def _from_hub(source: str, language: str, dataset: HubDataset) -> Mapping[str, Problem] | None:
    with _hub_errors(source):
        subset = _subset(dataset.configurations(), language)
        if subset is None:
            return None
        rows = list(dataset.rows(subset, "test"))
    name = dataset.snapshot.name
    return problems_of_rows(language, ((f"{name} {subset} {i}", row) for i, row in enumerate(rows)))


def _subset(configurations: Iterable[str], language: str) -> str | None:
    """The hub's configuration of the language, by any name of the language."""
    names = sorted(name for name in configurations if name.startswith("humaneval-"))
    matching = [name for name in names if language_key(name) == language]
    exact = f"humaneval-{language}"
    if exact in matching:
        return exact
    return matching[0] if matching else None
