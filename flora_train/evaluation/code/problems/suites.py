"""Which problems does `evaluation.problems` mean? Our starter problems, a folder of MultiPL-E's prompt files, or the hub's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path

from flora_train.config.errors import choices, first_line, user_error
from flora_train.config.language_names import language_key
from flora_train.config.load import find_file
from flora_train.evaluation.code.problems.problem import Problem, load_problems, problems_of_rows, prompt_file
from flora_train.evaluation.code.problems.starter import STARTER_LANGUAGES, load_starter_problems

STARTER = "starter"
HUB = "hub:"


@dataclass(frozen=True)
class Suite:
    """name: of its folder in a run; source: what the recipe says; problems: language -> name -> problem; limit: so many of each
    language are asked (None: all); missing: language -> why the suite has no problems in it."""

    name: str
    source: str
    problems: Mapping[str, Mapping[str, Problem]]
    limit: int | None
    missing: Mapping[str, str]

    @property
    def asked(self) -> dict[str, dict[str, Problem]]:
        """Language -> name -> problem, of those that contenders are to solve."""
        return {language: dict(islice(problems.items(), self.limit)) for language, problems in self.problems.items()}

    def sha(self, language: str) -> str:
        """Of all problems in this language."""
        return sha256("".join(problem.sha for problem in self.problems[language].values()).encode()).hexdigest()


def load_suite(source: str, languages: Iterable[str], limit: int | None) -> Suite:
    """The suite's problems in these languages, of which at most `limit` of each are asked. Raises UserError if there is no such suite, or if it
    has none of these languages."""
    found: dict[str, Mapping[str, Problem]] = {}
    missing: dict[str, str] = {}
    for language in languages:
        problems = _problems(source, language)
        if problems is None:
            missing[language] = f"{source} has no problems in it"
        else:
            found[language] = problems
    if not found:
        raise user_error("evaluation.problems", source, f"has no problems in {choices(missing)}")
    return Suite(suite_name(source), source, found, limit, missing)


def suite_name(source: str) -> str:
    """`starter`, or the last part of a folder or hub name, in lower case."""
    return Path(source.removeprefix(HUB)).name.lower() if source.startswith(HUB) else find_file(source).resolve().name.lower()


def _problems(source: str, language: str) -> Mapping[str, Problem] | None:
    if source == STARTER:
        return load_starter_problems(language) if language in STARTER_LANGUAGES else None
    if source.startswith(HUB):
        return _from_hub(source.removeprefix(HUB), language)
    folder = find_file(source)
    if not folder.is_dir():
        hint = (
            "is no folder here: give starter, a folder with MultiPL-E's humaneval-<language>.jsonl, or hub:nuprl/MultiPL-E "
            "(for evaluation only, never for training)"
        )
        raise user_error("evaluation.problems", source, hint)
    return load_problems(folder, language) if prompt_file(folder, language) is not None else None


def _from_hub(name: str, language: str) -> Mapping[str, Problem] | None:
    try:
        from datasets import get_dataset_config_names, load_dataset
    except ImportError as error:
        raise user_error("evaluation.problems", HUB + name, "needs datasets: pip install 'flora-train[hub]'") from error
    try:
        subset = _subset(get_dataset_config_names(name), language)
        if subset is None:
            return None
        rows = load_dataset(name, subset, split="test")
    except Exception as error:  # whatever the hub's client raises: no network, a gate, another revision
        hint = f"cannot be had ({first_line(error)}): give a folder with MultiPL-E's humaneval-<language>.jsonl, or starter"
        raise user_error("evaluation.problems", HUB + name, hint) from error
    return problems_of_rows(language, ((f"{name} {subset} {i}", dict(row)) for i, row in enumerate(rows)))


def _subset(there: Iterable[str], language: str) -> str | None:
    """The hub's configuration of the language, by whatever word for it."""
    found = sorted(name for name in there if name.startswith("humaneval-") and language_key(name) == language)
    return f"humaneval-{language}" if f"humaneval-{language}" in found else next(iter(found), None)
