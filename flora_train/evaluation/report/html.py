"""What does a run look like on paper, or several beside each other? One self-contained page drawn from report.json: nothing is loaded, and it reads
without its script."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from flora_train.config.terminal_text import plain
from flora_train.evaluation.code.programs.execute import STATUSES
from flora_train.evaluation.report import plots as figures
from flora_train.evaluation.report.comparison import costs, measures, seed_groups, settings, verdicts, with_seeds
from flora_train.evaluation.report.formatting import count, estimate, listed, number, percent, share, shared_digits, verdict
from flora_train.evaluation.report.heatmap import gain_maps
from flora_train.evaluation.report.summary_text import summarise
from flora_train.evaluation.report.svg import FamilyStyle, family_styles
from flora_train.runtime.progress import duration
from flora_train.training.step_timer import format_shares

MAX_DRAWN = 100
"""Tasks that get figures. The tables hold all; the page says what is not drawn."""

MANY_TASKS = 8
"""From more tasks on there is a field to search for one."""

SCRIPT = Path(__file__).with_name("report.js")

FEW_EXAMPLES = 30
"""Below this many held-out examples a percentile bootstrap interval tends to be too narrow, and the page says so."""

CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}


def render_html(results: Mapping[str, Any]) -> str:
    """The page of a run, as text. results: the mapping that is saved as report.json, see `results.build_results`."""
    families = list(dict.fromkeys(a["family"] for a in results["adapters"]))
    styles = family_styles(families)
    limits = figures.difference_range(results["results"])
    drawn = results["results"][:MAX_DRAWN]
    adapters = {r["task"]: [a for a in results["adapters"] if a["task"] == r["task"]] for r in drawn}
    return _page(
        "report.html.j2",
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
        gain_maps=gain_maps(results),
        many_tasks=MANY_TASKS,
        suite_families=suite_families,
        speech_families=suite_families(results["speech"]) if results["speech"] else [],
        statuses=STATUSES,
        left_out={split: left_out([task[split] for task in results["tasks"]]) for split in ("train", "validation")},
        shares=shares(results),
        fairness=fairness(results),
        cost=cost(results),
        few_examples=FEW_EXAMPLES,
        max_points=figures.MAX_POINTS,
    )


def render_comparison(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of several runs, as text. runs: what each is called -> its report.json."""
    reports = list(runs.values())
    found, groups, names = measures(reports), seed_groups(reports), with_seeds(list(runs), reports)
    return _page(
        "comparison.html.j2",
        names=names,
        seed_groups=[" and ".join(names[i] for i in group) for group in groups if len(group) > 1],
        measures=found,
        summary=verdicts(names, found, groups),
        settings=settings(reports),
        costs=costs(reports),
        many=max((len(measure.rows) for measure in found), default=0) > MANY_TASKS,
    )


def _page(template: str, **content: Any) -> str:
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
    script = SCRIPT.read_text(encoding="utf-8")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(**content, script=Markup(script), script_hash=digest)
    return plain(page)


def suite_families(suite: Mapping[str, Any]) -> list[str]:
    """Everybody who takes part in a suite, or in transcribing, the base first."""
    return list(dict.fromkeys(c["family"] for part in suite["languages"] for c in part["contenders"]))


def _pass_panels(i: int, suite: Mapping[str, Any], styles: Mapping[str, FamilyStyle]) -> list[tuple[str, Any]]:
    """(language, panel) of the first languages and, where there are several, their mean."""
    several = [{**suite["macro"], "name": "mean of languages"}] if len(suite["macro"]["languages"]) > 1 else []
    parts = [*several, *suite["languages"][:MAX_DRAWN]]
    k = str(suite["k"][0])
    top = max((c["pass_at"][k]["high"] for part in parts for c in part["contenders"]), default=1.0)
    return [(part["name"], figures.pass_panel(f"pass-{i}-{j}", part, k, styles, top)) for j, part in enumerate(parts)]


def left_out(counts: Sequence[Mapping[str, Any]]) -> list[str]:
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
    clips: Counter[str] = Counter()
    for c in counts:
        clips.update({reason: found["clips"] for reason, found in c["unusable"].items()})
    return [f"{count(totals[key])} {phrase}" for key, phrase in words.items() if totals[key]] + [
        f"{count(n)} were left out: {reason}" for reason, n in clips.items()
    ]


def shares(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per task: the share of all drawn tokens, beside the `target_share` of the mixture."""
    drawn = sum(t["tokens_drawn"] for t in results["tasks"])
    return [{**t, "share": t["tokens_drawn"] / max(1, drawn)} for t in results["tasks"]]


def fairness(results: Mapping[str, Any]) -> Markup | None:
    """Shares over time, where there are several tasks and more than one moment was logged."""
    targets = {task["name"]: task["target_share"] for task in results["tasks"]}
    drawn = {task: points for task, points in results["curves"].get("drawn", {}).items() if targets.get(task)}
    if len(drawn) < 2 or len(next(iter(drawn.values()))) < 2:
        return None
    return figures.fairness_panel("fairness", drawn, targets)


def apart(found: Mapping[str, Any] | None) -> str | None:
    """What the last step's batches took together and adapter by adapter; None if it was not measured."""
    if found is None:
        return None
    measured, adapters = found.get("measured", found["adapters"]), found["adapters"]
    estimate = "" if measured == adapters else f", estimated from {measured} of {adapters} adapters"
    ratio = number(found["apart"] / found["together"], 2)
    return (
        f"{ratio} times as long, and the base loaded {found['adapters']} times: the last step's rows, forward and backward, took "
        f"{number(found['together'], 1)} s together and {number(found['apart'], 1)} s adapter by adapter (one step, on the machine as it was{estimate})"
    )


def cost(results: Mapping[str, Any]) -> dict[str, str]:
    """Figures of effort and surroundings, label to text. What was not recorded is left out."""
    facts, machine = results["facts"], results["facts"].get("machine", {})
    tokens, seconds = sum(a["tokens"] for a in results["adapters"]), facts.get("seconds", {}).get("train")
    memory = facts.get("peak_memory_bytes")
    cores = f"{machine['cpus']} CPUs, {machine['threads']} threads" if {"cpus", "threads"} <= machine.keys() else None
    versions = {"flora_train": facts.get("flora_train"), "Python": facts.get("python"), **facts.get("packages", {})}
    rate = f"{number(tokens / seconds, 0)} while training, {count(tokens)} tokens in all" if seconds and tokens else None
    shares = format_shares(facts.get("time_shares", {}))
    found = {
        "Adapter tokens per second": rate,
        "As separate runs": apart(facts.get("apart")),
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
