"""What does a run look like on paper? One self-contained page drawn from report.json: no scripts, nothing loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flora_train.evaluation.code.programs.execute import STATUSES
from flora_train.evaluation.report import figures
from flora_train.training.clock import spoken
from flora_train.training.progress import duration

NOT_FINITE = "not finite"

MAX_DRAWN = 100
"""Tasks that get figures. The tables hold all; the page says what is not drawn."""

FEW_EXAMPLES = 30
"""Below this many held-out examples a percentile bootstrap interval tends to be too narrow, and the page says so."""

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def render_html(results: Mapping[str, Any]) -> str:
    """The page, as text. results: the mapping that is saved as report.json, see `results.build_results`."""
    environment = Environment(
        loader=PackageLoader("flora_train.evaluation.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {function.__name__: function for function in (number, estimate, count, listed, share)}
    environment.filters["duration"] = lambda seconds: duration(seconds) if seconds >= 0.5 else "under a second"
    environment.filters["visible"] = lambda text: text.translate(CONTROLS).strip("\n").rstrip()
    families = list(dict.fromkeys(a["family"] for a in results["adapters"]))
    styles = figures.family_styles(families)
    limits = figures.difference_range(results["results"])
    drawn = results["results"][:MAX_DRAWN]
    adapters = {r["task"]: [a for a in results["adapters"] if a["task"] == r["task"]] for r in drawn}
    page = environment.get_template("report.html.j2").render(
        **results,
        families=families,
        keys={family: figures.legend_key(f"key-{i}", style) for i, (family, style) in enumerate(styles.items())},
        summary=summarise(results),
        digits=shared_digits(results["results"]),
        confidence=percent(results["results"]),
        verdict=verdict,
        difference_panels=[figures.difference_panel(f"difference-{i}", r, styles, limits) for i, r in enumerate(drawn)],
        curve_panels=[
            figures.curve_panel(f"curve-{i}", r["task"], adapters[r["task"]], results["curves"], styles)
            for i, r in enumerate(drawn)
        ],
        pass_panels=[_pass_panels(i, suite, styles) for i, suite in enumerate(results["code"])],
        suite_families=suite_families,
        statuses=STATUSES,
        left_out={split: left_out([task[split] for task in results["tasks"]]) for split in ("train", "validation")},
        shares=shares(results),
        cost=cost(results),
        few_examples=FEW_EXAMPLES,
        max_points=figures.MAX_POINTS,
    )
    return page.encode("utf-8", "replace").decode()


def suite_families(suite: Mapping[str, Any]) -> list[str]:
    """Everybody who takes part in a suite, the base first."""
    return list(dict.fromkeys(c["family"] for part in suite["languages"] for c in part["contenders"]))


def _pass_panels(i: int, suite: Mapping[str, Any], styles: Mapping[str, figures.FamilyStyle]) -> list[tuple[str, Any]]:
    """(language, panel) of the first languages and, where there are several, their mean."""
    several = [{**suite["macro"], "name": "mean of languages"}] if len(suite["macro"]["languages"]) > 1 else []
    parts = [*several, *suite["languages"][:MAX_DRAWN]]
    k = str(suite["k"][0])
    top = max((c["pass_at"][k]["high"] for part in parts for c in part["contenders"]), default=1.0)
    return [(part["name"], figures.pass_panel(f"pass-{i}-{j}", part, k, styles, top)) for j, part in enumerate(parts)]


def summarise(results: Mapping[str, Any]) -> list[str]:
    """Paragraphs of findings, computed from the figures and worded as their intervals allow: base, then methods."""
    adapters, judged = results["adapters"], results["results"]
    tasks = list(dict.fromkeys(a["task"] for a in adapters))
    steps = max((step for curve in results["curves"]["training"].values() for step, _ in curve), default=0)
    where = f"task {tasks[0]}" if len(tasks) == 1 else plural(len(tasks), "task")
    what = f"{plural(len(adapters), 'adapter')} on {where} {'was' if len(adapters) == 1 else 'were'} trained in one run on "
    what += f"{results['facts'].get('model', 'one base model')}" + (f", in {plural(steps, 'step')}." if steps else ".")
    return [f"{what} {_against_base(judged)}", *_between_methods(judged), *map(_of_programs, results["code"])]


def _of_programs(suite: Mapping[str, Any]) -> str:
    """What a suite's mean over languages, or its only language, says."""
    parts = suite["languages"] if len(suite["languages"]) == 1 else [suite["macro"]] if suite["macro"]["languages"] else []
    if not parts:
        return f"On the {suite['suite']} problems nothing could be compared: see what was not evaluated."
    part, k = parts[0], str(suite["k"][0])
    to_base = {d["a"]: d["pass_at"][k] for d in part["differences"] if d["b"] == "base"}
    values = {c["family"]: c["pass_at"][k]["value"] for c in part["contenders"]}
    where = f"in {part['name']}" if "name" in part else f"over {len(part['languages'])} languages"
    words = [
        f"{family} {share(value)}\u00a0%" + ("" if to_base[family]["excludes_zero"] else " (no clear difference to the base)")
        for family, value in values.items()
        if family in to_base
    ]
    return f"pass@{k} on the {suite['suite']} problems {where}: base {share(values['base'])}\u00a0%, {listed(words)}."


def _against_base(judged: Sequence[Mapping[str, Any]]) -> str:
    found: dict[str, list[str]] = {"better": [], "worse": [], "unclear": [], NOT_FINITE: []}
    for result in judged:
        for c in result["contenders"]:
            found[verdict(c["difference_to_base"])].append(f"{c['family']} on {result['task']}")
    total, better, level = sum(map(len, found.values())), len(found["better"]), percent(judged)
    if total == 1:
        difference, digits = judged[0]["contenders"][0]["difference_to_base"], shared_digits(judged)
        figures = f"{number(difference['value'], digits, '+')} bits per byte, {level} interval {interval(difference, digits)}"
        return {
            "better": f"It predicts held-out text better than the base model: {figures}.",
            "worse": f"It predicts held-out text worse than the base model: {figures}.",
            "unclear": f"There is no clear difference to the base model on held-out text: {figures}.",
            NOT_FINITE: "Its held-out loss is not finite, so it cannot be compared with the base model.",
        }[verdict(difference)]
    if better == total:
        who = f"On all {len(judged)} tasks every method" if len(judged) > 1 else "Every method"
        return f"{who} predicts held-out text better than the base model: no {level} interval of the difference reaches zero."
    parts = [f"{better or 'none'} {'predicts' if better < 2 else 'predict'} held-out text better than the base model"]
    if names := found["worse"]:
        parts.append(f"{len(names)} {'predicts' if len(names) == 1 else 'predict'} it worse ({listed(names, 4)})")
    if names := found["unclear"]:
        parts.append(f"for {len(names)} there is no clear difference, the {level} interval includes zero ({listed(names, 4)})")
    if names := found[NOT_FINITE]:
        parts.append(f"{len(names)} cannot be judged, the held-out loss is not finite ({listed(names, 4)})")
    return f"Of {total} adapters, {'; '.join(parts)}."


def _between_methods(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    best: dict[str, Mapping[str, Any]] = {}
    tied: list[str] = []
    for result in judged:
        finite = [c for c in result["contenders"] if verdict(c["difference_to_base"]) != NOT_FINITE]
        order = sorted(finite, key=lambda c: c["bits_per_byte"]["value"])
        if len(order) > 1:
            best[result["task"]] = order[0]
            pair = {c["family"] for c in order[:2]}
            lead = next(d["bits_per_byte"] for d in result["differences"] if {d["a"], d["b"]} == pair)
            tied += [] if lead["excludes_zero"] else [result["task"]]
    if not best:
        return []
    wins = Counter(c["family"] for c in best.values()).most_common()
    only = wins[0][0] if len(wins) == 1 else ""
    if len(best) <= 4:
        cases = _cases(best, shared_digits(judged), percent(judged), named=not only)
        sentence = f"The best method is {only + (' everywhere: ' if len(best) > 1 else ': ') if only else ''}{listed(cases)}."
    elif only:
        sentence = f"On all {len(best)} tasks with more than one method the best is {only}."
    else:
        sentence = f"Of {len(best)} tasks with more than one method, the best is {listed([f'{w} on {n}' for w, n in wins], 6)}."
    if tied:
        where = "" if len(best) == 1 else f" on {listed(tied, 4)}" if len(tied) < len(best) else " on any task"
        return [f"{sentence} The lead over the next method is not clear{where}: the interval includes zero."]
    where = {1: "", 2: " on both tasks"}.get(len(best), f" on all {len(best)} tasks")
    return [f"{sentence} The lead over the next method is clear{where}."]


def _cases(best: Mapping[str, Mapping[str, Any]], digits: int, level: str, named: bool) -> list[str]:
    cases: list[str] = []
    for task, c in best.items():
        difference = c["difference_to_base"]
        remarks = {"worse": ", still worse than the base", "unclear": ", not clearly different from the base"}
        figures = [number(difference["value"], digits, "+"), interval(difference, digits)]
        if not cases:
            figures = [f"{figures[0]} bits per byte", f"{level} interval {figures[1]}"]
        cases.append(
            f"{c['family'] + ' on ' if named else ''}{task} ({', '.join(figures)}{remarks.get(verdict(difference), '')})"
        )
    return cases


def verdict(difference: Mapping[str, Any]) -> str:
    """What an estimate of a difference allows to say: better (lower), worse, unclear or not finite."""
    if any(difference[key] is None for key in ("value", "low", "high")):
        return NOT_FINITE
    return "unclear" if not difference["excludes_zero"] else "better" if difference["value"] < 0 else "worse"


def shared_digits(judged: Sequence[Mapping[str, Any]]) -> int:
    """Decimals at which a typical interval of a difference has two significant digits: one precision for the page."""
    found = [c["difference_to_base"] for r in judged for c in r["contenders"]]
    widths = sorted((d["high"] - d["low"]) / 2 for d in found if verdict(d) != NOT_FINITE)
    width = widths[len(widths) // 2] if widths else 0.0
    return min(5, max(2, 1 - math.floor(math.log10(width)))) if width > 0 else 3


def share(value: float, sign: str = "") -> str:
    """A probability, or a difference of two, in percent."""
    return f"{100 * value:{sign}.1f}".replace("-", "\u2212")


def percent(judged: Sequence[Mapping[str, Any]]) -> str:
    """`95 %`, the confidence of all intervals."""
    return f"{100 * judged[0]['confidence']:.3g}\u00a0%"


def left_out(counts: Sequence[Mapping[str, int]]) -> list[str]:
    """What did not become an example, or not whole, over all tasks, in words."""
    words = {
        "unsampled": "were left out by the limit on examples",
        "empty": "had no text to learn",
        "over_long_dropped": "were dropped as too long",
        "prompt_too_long": "were left out because the prompt alone fills the length limit",
        "over_long_truncated": "lost their end at the length limit",
        "over_long_split": "were split into several examples",
    }
    totals = {key: sum(c[key] for c in counts) for key in words}
    return [f"{count(totals[key])} {phrase}" for key, phrase in words.items() if totals[key]]


def shares(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task: the share of all drawn tokens, beside the `target_share` of the mixture."""
    drawn = sum(t["tokens_drawn"] for t in results["tasks"])
    return [{**t, "share": t["tokens_drawn"] / max(1, drawn)} for t in results["tasks"]]


def cost(results: Mapping[str, Any]) -> dict[str, str]:
    """Figures of effort and surroundings, label to text. What was not recorded is left out."""
    facts, machine = results["facts"], results["facts"].get("machine", {})
    tokens, seconds = sum(a["tokens"] for a in results["adapters"]), facts.get("seconds", {}).get("train")
    memory = facts.get("peak_memory_bytes")
    cores = f"{machine['cpus']} CPUs, {machine['threads']} threads" if {"cpus", "threads"} <= machine.keys() else None
    versions = {"flora_train": facts.get("flora_train"), "Python": facts.get("python"), **facts.get("packages", {})}
    rate = f"{number(tokens / seconds, 0)} while training, {count(tokens)} tokens in all" if seconds and tokens else None
    shares = spoken(facts.get("time_shares", {}))
    found = {
        "Adapter tokens per second": rate,
        "Time of a step": f"{shares} (base: the frozen model alone, forward and backward)" if shares else None,
        "Peak memory": f"{memory / 2**30:.1f} GiB in the main process" if memory else None,
        "Processes": facts.get("processes"),
        "Device": facts.get("device"),
        "Finished": facts.get("finished"),
        "GPU": machine.get("gpu") or "none",
        "Processor": ", ".join(filter(None, (machine.get("processor"), cores, machine.get("system")))),
        "Model": " in ".join(filter(None, (facts.get("model"), facts.get("dtype")))),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "Commit": facts.get("commit") or "not recorded",
        "Command": facts.get("command"),
    }
    return {label: str(text) for label, text in found.items() if text}


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    """A fixed number of decimals, or from 1,000 on none."""
    if value is None or not math.isfinite(value):
        return NOT_FINITE
    if abs(value) >= 1e7:
        return f"{value:{sign}.1e}".replace("-", "−")
    text = f"{value:{sign},.{0 if abs(value) >= 100 else digits}f}".replace("-", "−")
    return re.sub(r"^[−+](?=[0.]*$)", "", text)


def interval(difference: Mapping[str, Any], digits: int) -> str:
    """`−0.054 to −0.028`."""
    return " to ".join(number(difference[key], digits, "+") for key in ("low", "high"))


def estimate(difference: Mapping[str, Any], digits: int) -> str:
    """`−0.040 [−0.054, −0.028]`."""
    if verdict(difference) == NOT_FINITE:
        return NOT_FINITE
    value, low, high = (number(difference[key], digits, "+") for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def plural(n: int, word: str) -> str:
    return f"{count(n)} {word}" if n == 1 else f"{count(n)} {word}s"


def listed(words: Sequence[str], most: int = 1000) -> str:
    """`a, b and c`; beyond `most`: `a, b and 7 more`."""
    shown = [*words[:most], *([f"{len(words) - most} more"] if len(words) > most else [])]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
