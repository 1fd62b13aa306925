"""How do runs differ, in what they were told and in what came out? Two or more report.json side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from flora_train.config.paths import read_mapping
from flora_train.evaluation.report.formatting import count, listed, number, share
from flora_train.runtime.progress import duration
from flora_train.runtime.run_folder import flat

OF_ITS_OWN = ("name", "output_dir", "overwrite", "resume")
"""Keys of a configuration that differ without a meaning."""
SEED = "seed"


@dataclass(frozen=True)
class Cell:
    """value of one run, and its difference to the base with the interval (the base: its own interval), as text; best: that interval lies apart
    from those of all others, on the better side."""

    value: str
    change: str
    best: bool = False


@dataclass(frozen=True)
class Row:
    """what: task and method; cells: one a run, None where it has no such figure; note: why the figures are not of the same thing, or "";
    seeds: the mean and the range over the runs of each group that has several, `0.812 (0.805 to 0.820)`, or ""."""

    what: tuple[str, str]
    cells: Sequence[Cell | None]
    note: str
    seeds: Sequence[str] = ()


@dataclass(frozen=True)
class Measure:
    title: str
    rows: Sequence[Row]


@dataclass(frozen=True)
class Found:
    """One figure of one run. change: its difference to the base, on the same examples, or None for the base; same: what must be alike
    for two of them to be of the same thing."""

    measure: str
    task: str
    family: str
    estimate: Mapping[str, Any]
    change: Mapping[str, Any] | None
    same: tuple[Any, ...]


def measures(runs: Sequence[Mapping[str, Any]]) -> list[Measure]:
    """Held-out loss, pass@k and error rates of every task and method that two runs or more have, or one alone."""
    groups = seed_groups(runs)
    found: dict[str, dict[tuple[str, str], dict[int, Found]]] = {}
    for i, run in enumerate(runs):
        for figure in _figures(run):
            found.setdefault(figure.measure, {}).setdefault((figure.task, figure.family), {})[i] = figure
    return [Measure(measure, [_row(measure, what, row, groups) for what, row in rows.items()]) for measure, rows in found.items()]


def seed_groups(runs: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Runs that compete, by number: those whose configurations differ in nothing but their seeds are one group, else each is its own."""
    alike: dict[str, list[int]] = {}
    seeds = []
    for i, run in enumerate(runs):
        config = _configuration(run)
        seeds.append(config.get(SEED, 0))
        alike.setdefault(repr(sorted((k, repr(v)) for k, v in config.items() if k not in (SEED, *OF_ITS_OWN))), []).append(i)
    groups = []
    for members in alike.values():
        distinct = len({seeds[i] for i in members}) == len(members)
        groups += [members] if distinct else [[i] for i in members]
    return sorted(groups)


def with_seeds(names: Sequence[str], runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What runs are called, with the seed of each that stands beside others of its configuration."""
    told = list(names)
    for group in seed_groups(runs):
        for i in group if len(group) > 1 else ():
            told[i] += f" (seed {_configuration(runs[i]).get(SEED, 0)})"
    return told


def _configuration(run: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, as report.json holds it. Raises UserError if it cannot be read."""
    return flat(read_mapping(run["facts"]["config"], "the configuration in report.json"))


def verdicts(names: Sequence[str], found: Sequence[Measure], groups: Sequence[Sequence[int]] | None = None) -> str:
    """One sentence for each measure: how often which run is better, as far as intervals that do not meet can say. groups: of
    `seed_groups`; seeds of one configuration win together, or not at all."""
    groups = [[i] for i in range(len(names))] if groups is None else groups
    names = [" and ".join(names[i] for i in group) for group in groups]
    if len(groups) == 1:
        return f"{names[0]} differ in nothing but the seed: none is better, and the range between them is what a seed makes."
    sentences = []
    for measure in found:
        rows = [row for row in measure.rows if sum(cell is not None for cell in row.cells) > 1 and row.what[1] != "base"]
        alike = [row for row in rows if not row.note]
        wins = {
            name: sum(any(cell is not None and cell.best for cell in (row.cells[i] for i in group)) for row in alike)
            for name, group in zip(names, groups, strict=True)
        }
        clear = [f"{name} on {wins[name]}" for name in names if wins.get(name)]
        title = measure.title.partition(",")[0]
        told = f"{listed(clear)} of {len(alike)}" if clear else f"none on any of {len(alike)}"
        sentences += [f"{title}: clearly better is {told} adapters that can be compared."] if alike else []
        sentences += [f"{title}: nothing can be compared, the examples differ."] if rows and not alike else []
    return " ".join(sentences) or "They have no task and method in common."


def settings(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Keys of the configurations that differ, with every run's value."""
    configs = [_configuration(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in OF_ITS_OWN)
    rows = [(key, [_word(config, key) for config in configs]) for key in keys]
    return [(key, words) for key, words in rows if len(set(words)) > 1]


def costs(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Effort of every run."""
    stages = dict.fromkeys(stage for run in runs for stage in run["facts"].get("seconds", {}))
    rows = [
        ("adapters", [count(len(run["adapters"])) for run in runs]),
        ("adapter tokens", [count(sum(a["tokens"] for a in run["adapters"])) for run in runs]),
        *((stage, [_seconds(run["facts"].get("seconds", {}).get(stage)) for run in runs]) for stage in stages),
        ("peak memory", [_gibibytes(run["facts"].get("peak_memory_bytes")) for run in runs]),
        ("processes", [count(run["facts"].get("processes")) for run in runs]),
        ("device", [str(run["facts"].get("device") or "–") for run in runs]),
        ("processor", [str(run["facts"].get("machine", {}).get("processor") or "–") for run in runs]),
        ("flora_train", [str(run["facts"].get("commit") or run["facts"].get("flora_train") or "–")[:10] for run in runs]),
    ]
    return rows


def labels(paths: Sequence[str]) -> list[str]:
    """What runs are called: the ends of their paths that tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-depth:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{path} ({i})" for i, path in enumerate(paths, start=1)]


def _figures(run: Mapping[str, Any]) -> Iterator[Found]:
    # reports of before have only the hash of all of a task's examples
    hashes = {task["name"]: task.get("heldout_hash", task["data_hash"]) for task in run["tasks"]}
    heard = {task["name"]: task.get("test_hash") for task in run["tasks"]}
    for result in run["results"]:
        same: tuple[Any, ...] = (hashes[result["task"]], result["examples"])
        for row in (result["base"], *result["contenders"]):
            change = row.get("difference_to_base")
            yield Found("Held-out loss, bits per byte", result["task"], row["family"], row["bits_per_byte"], change, same)
    for suite in run["code"]:
        for k in suite["k"]:
            for part in suite["languages"]:
                same = (part["prompts_sha"], part["problems"], suite["temperature"], suite["top_p"], suite["max_new_tokens"])
                for row in part["contenders"]:
                    title, changes = f"pass@{k} on {suite['suite']} problems, percent", _to_base(part["differences"], "pass_at")
                    change = changes.get(row["family"], {}).get(str(k))
                    yield Found(title, part["name"], row["family"], row["pass_at"][str(k)], change, same)
    for part in (run["speech"] or {}).get("languages", ()):
        same = (
            heard.get(part["task"]),
            part["metric"],
            part["normalizer"],
            part["clips"],
            part["contenders"][0][part["metric"]]["N"],
        )
        for row in part["contenders"]:
            change = _to_base(part["differences"], part["metric"]).get(row["family"])
            yield Found("Error rate", part["task"], row["family"], row[part["metric"]], change, same)


def _to_base(differences: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {d["a"]: d[key] for d in differences if d["b"] == "base"}


def _row(measure: str, what: tuple[str, str], found: Mapping[int, Found], groups: Sequence[Sequence[int]]) -> Row:
    better = -1 if measure.startswith("pass@") else 1
    note = "" if len({figure.same for figure in found.values()}) == 1 else "not of the same examples"
    changes = {i: f.change or f.estimate for i, f in found.items()}
    finite = {i: change for i, change in changes.items() if None not in (change["value"], change["low"], change["high"])}
    competing = [[i for i in group if i in found] for group in groups]
    competing = [group for group in competing if group]
    best: list[int] = []
    if not note and len(finite) == len(found) and len(competing) > 1:
        low, high = ("low", "high") if better > 0 else ("high", "low")
        first = min(finite, key=lambda i: better * finite[i]["value"])
        group = next(group for group in competing if first in group)
        others = [change for i, change in finite.items() if i not in group]
        if all(better * finite[i][high] < better * other[low] for i in group for other in others):
            best = group
    cells = [_cell(found[i], better, i in best) if i in found else None for i in sorted(i for group in groups for i in group)]
    return Row(what, cells, note, [_over_seeds(found, group, better) for group in groups if len(group) > 1])


def _over_seeds(found: Mapping[int, Found], group: Sequence[int], better: int) -> str:
    """Mean and range of the runs of one configuration; "" where one of them has no such figure."""
    values = [found[i].estimate["value"] for i in group if i in found]
    if len(values) < len(group) or None in values:
        return ""
    mean, low, high = (number(v, 3) if better > 0 else share(v) for v in (fmean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def _cell(found: Found, better: int, best: bool) -> Cell:
    def write(value: float | None, sign: str = "") -> str:
        return number(value, 3, sign) if better > 0 else "–" if value is None else share(value, sign)

    shown, sign = (found.estimate, "") if found.change is None else (found.change, "+")
    interval = f"[{write(shown['low'], sign)}, {write(shown['high'], sign)}]"
    change = interval if found.change is None else f"{write(found.change['value'], '+')} {interval}"
    return Cell(write(found.estimate["value"]), change, best)


def _word(config: Mapping[str, Any], key: str) -> str:
    return "–" if key not in config else str(config[key])


def _seconds(value: float | None) -> str:
    return "–" if value is None else duration(value) if value >= 0.5 else "under a second"


def _gibibytes(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**30:.1f} GiB"
