"""What was measured of an adapter beside its base and the other methods on its task: report.json as tables, and in the hub's two formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flora_train.evaluation.report.formatting import estimate, number, plural

HUB_NAMES = {"multipl_e": "nuprl/MultiPL-E"}
"""Suite of problems -> data set on the hub."""
RATES = {"wer": "WER", "wer_normalized": "normalised WER", "cer": "CER"}


@dataclass(frozen=True)
class Table:
    """rows: cells of one contender each; mine: which is the adapter's."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    mine: int


@dataclass(frozen=True)
class Figure:
    """One number for the hub. data: data set, its subset; metric: pass@1, wer or bits_per_byte; note: how, and on how much."""

    data: str
    subset: str
    metric: str
    value: float
    note: str


def tables(report: Mapping[str, Any], name: str) -> list[Table]:
    """Held-out bits per byte, pass@k of every suite of problems, and error rates, as far as the report has them."""
    return [*_held_out(report, name), *_programs(report, name), *_speech(report, name)]


def figures(report: Mapping[str, Any], name: str) -> list[Figure]:
    """Every figure of the adapter itself."""
    found = []
    for result in report.get("results", ()):
        for row in _named(result["contenders"], name):
            note = f"{result['examples']} held-out examples"
            found.append(Figure(result["task"], "held out", "bits_per_byte", row["bits_per_byte"]["value"], note))
    for suite, language, row in _judged(report, name):
        data, note = HUB_NAMES.get(suite["suite"], suite["suite"]), _asked(suite, language)
        subset = f"humaneval-{language['language']}" if data != suite["suite"] else language["language"]
        found += [Figure(data, subset, f"pass@{k}", row["pass_at"][str(k)]["value"], note) for k in suite["k"]]
    for language, row in _heard(report, name):
        note = f"{language['clips']} clips, {RATES[language['metric']]}"
        found.append(Figure(language["task"], language["language"], "wer", row[language["metric"]]["value"], note))
    return [figure for figure in found if figure.value is not None]


def benchmarks(report: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """pass@1, in percent, of suites that are data sets on the hub: the entries of its `.eval_results` files."""
    return [
        {
            "dataset": {"id": figure.data, "task_id": figure.subset},
            "value": round(100 * figure.value, 2),
            "notes": f"pass@1; {figure.note}",
        }
        for figure in figures(report, name)
        if figure.data in HUB_NAMES.values() and figure.metric == "pass@1"
    ]


def _held_out(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    for result in report.get("results", ()):
        for _ in _named(result["contenders"], name):
            contenders = [result["base"], *result["contenders"]]
            differences = {row["family"]: row["difference_to_base"] for row in result["contenders"]}
            yield _table(
                "Held-out loss",
                f"{result['examples']} examples; {_percent(result)} intervals of a paired bootstrap over them. Lower is better.",
                contenders,
                name,
                {"bits per byte": lambda row: number(row["bits_per_byte"]["value"])},
                {row["family"]: estimate(differences[row["family"]], 3) for row in result["contenders"]},
            )


def _programs(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    for suite, language, _ in _judged(report, name):
        first = str(suite["k"][0])
        to_base = {row["a"]: estimate(row["pass_at"][first], 3) for row in language["differences"] if row["b"] == "base"}
        yield _table(
            f"Programs that pass their tests: {suite['suite']}, {language['name']}",
            f"{_asked(suite, language)}; {_percent(suite)} intervals over problems. Higher is better.",
            language["contenders"],
            name,
            {f"pass@{k}": lambda row, k=str(k): _with_interval(row["pass_at"][k]) for k in suite["k"]},
            to_base,
        )


def _speech(report: Mapping[str, Any], name: str) -> Iterator[Table]:
    for language, _ in _heard(report, name):
        metric = language["metric"]
        to_base = {row["a"]: estimate(row[metric], 3) for row in language["differences"] if row["b"] == "base"}
        yield _table(
            "Words and characters that are wrong",
            f"{language['clips']} clips; the difference is that of the {RATES[metric]}. Lower is better.",
            language["contenders"],
            name,
            {title: lambda row, rate=rate: _with_interval(row[rate]) for rate, title in RATES.items()},
            to_base,
        )


def _table(
    title: str,
    note: str,
    contenders: Sequence[Mapping[str, Any]],
    name: str,
    cells: Mapping[str, Any],
    to_base: Mapping[str, str],
) -> Table:
    rows = tuple(
        (
            "base model" if row["family"] == "base" else row["family"],
            *(write(row) for write in cells.values()),
            to_base.get(row["family"], ""),
        )
        for row in contenders
    )
    mine = next(index for index, row in enumerate(contenders) if row["name"] == name)
    return Table(title, note, ("", *cells, "difference to the base"), rows, mine)


def _judged(report: Mapping[str, Any], name: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]:
    """Suite, language and the adapter's row, wherever it wrote programs."""
    for suite in report.get("code", ()):
        for language in suite["languages"]:
            for row in _named(language["contenders"], name):
                yield suite, language, row


def _heard(report: Mapping[str, Any], name: str) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for language in (report.get("speech") or {}).get("languages", ()):
        for row in _named(language["contenders"], name):
            yield language, row


def _named(rows: Sequence[Mapping[str, Any]], name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["name"] == name]


def _asked(suite: Mapping[str, Any], language: Mapping[str, Any]) -> str:
    problems = f"{language['problems']} of {language['available']} problems"
    return f"{problems}, {plural(suite['n'], 'completion')} each of up to {suite['max_new_tokens']} tokens at temperature {suite['temperature']:g}"


def _percent(part: Mapping[str, Any]) -> str:
    return f"{100 * part['confidence']:.3g} %"


def _with_interval(value: Mapping[str, Any]) -> str:
    return f"{number(value['value'])} [{number(value['low'])}, {number(value['high'])}]"
