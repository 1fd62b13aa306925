"""The page of a run shows its results, whatever they are, and stays one safe file."""

from __future__ import annotations

import copy
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

import pytest

from flora_train.evaluation.report.html import render_html
from flora_train.evaluation.report.summary_text import summarise
from flora_train.evaluation.report.types import SCHEMA_VERSION, Report

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "use", "path", "rect", "circle", "line"}


def estimate(value: float | None, half: float = 0.01) -> dict[str, Any]:
    if value is None:
        return {"value": None, "low": None, "high": None, "excludes_zero": False}
    return {"value": value, "low": value - half, "high": value + half, "excludes_zero": abs(value) > half}


def run(differences: dict[str, dict[str, float | None]], **changes: Any) -> dict[str, Any]:
    """report.json of a run, which tests may change. differences: task -> family -> bits per byte against the
    base, None for not finite."""
    counts: Any = {
        "unusable": {},
        **dict.fromkeys(("empty", "over_long_split", "over_long_dropped", "prompt_too_long"), 0),
    }
    counts |= {
        "rows": 1234,
        "unsampled": 17,
        "over_long_truncated": 5,
        "examples": 1217,
        "tokens": 9000,
        "label_tokens": 8000,
    }
    tasks, adapters, judged, completions = [], [], [], []
    curves: dict[str, Any] = {
        "training": {},
        "heldout": {},
        "base": dict.fromkeys(differences, 2.0),
        "heldout_examples": 8,
    }
    for task, families in differences.items():
        tasks.append(
            {
                "name": task,
                "weight": 1.0,
                "train": counts,
                "validation": counts,
                "tokens_drawn": 500,
                "target_share": 0.5,
                "epochs": 0.1,
                "data_hash": "0",
            }
        )
        finite = [d for d in families.values() if d is not None]
        contenders = []
        for family, difference in families.items():
            name, loss = f"{task}-{family}", None if difference is None else 2.0 + difference
            facts = {
                "bits_per_byte": estimate(loss),
                "loss": loss,
                "perplexity": loss,
                "difference_to_base": estimate(difference),
            }
            contenders.append(
                {"name": name, "family": family, **facts, "best": difference == min(finite, default=0)}
            )
            hyper = {
                "method": "lora",
                "rank": 8,
                "variant": None,
                "lr": 0.001,
                "parameters": 10,
                "tokens": 500,
                "skipped_steps": 0,
            }
            adapters.append(
                {
                    "name": name,
                    "task": task,
                    "family": family,
                    **hyper,
                    "selected_step": 20,
                    "rollbacks": 0,
                    "quarantined": None,
                    "retired": None,
                }
            )
            curves["training"][name] = [[step, loss and loss + 1 / step] for step in range(1, 21)]
            curves["heldout"][name] = [[10, loss], [20, loss]]
        pairs = [(a, b) for a in contenders for b in contenders if contenders.index(a) < contenders.index(b)]
        unknown = estimate(None)
        judged.append(
            {
                "task": task,
                "examples": 50,
                "label_tokens": 8000,
                "label_bytes": 24000,
                "confidence": 0.95,
                "base": {
                    "name": "base",
                    "family": "base",
                    "bits_per_byte": estimate(2.0),
                    "loss": 2.0,
                    "perplexity": 7.4,
                },
                "contenders": contenders,
                "differences": [
                    {
                        "first": a["family"],
                        "second": b["family"],
                        "bits_per_byte": unknown
                        if None in (a["loss"], b["loss"])
                        else estimate(a["loss"] - b["loss"]),
                    }
                    for a, b in pairs
                ],
            }
        )
        completions.append(
            {
                "task": task,
                "prompt": "def f():",
                "completions": {"base": "\n  pass", **dict.fromkeys(families, "\n  1")},
            }
        )
    facts = {
        "model": "models/tiny",
        "dtype": "float32",
        "seconds": {"train": 61.0},
        "config": "name: x",
        "commit": None,
    }
    parts = {
        "tasks": tasks,
        "adapters": adapters,
        "results": judged,
        "curves": curves,
        "completions": completions,
    }
    rest = {"sweeps": [], "code": [], "speech": None, "not_measured": ["Everything else."], **changes}
    return {"schema_version": SCHEMA_VERSION, "name": "a run", "facts": facts, **parts, **rest}


def page_of(results: dict[str, Any]) -> str:
    """The page of a report.json."""
    return render_html(Report.model_validate(results))


def summary(differences: dict[str, dict[str, float | None]]) -> str:
    return " ".join(summarise(Report.model_validate(run(differences)))).replace("\u00a0", " ")


class Outline(HTMLParser):
    """Checks that elements close in order; keeps headings, ids and references to them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.references: set[str] = set()
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids += [given["id"] or ""] if "id" in given else []
        self.references |= set((given.get("aria-labelledby") or "").split())
        self.references |= {
            found for value in given.values() for found in re.findall(r"(?:^|url\()#([\w.-]+)", value or "")
        }
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


THREE = {
    "lua": {"flora": -0.20, "lora": -0.10, "ia3": -0.05},
    "perl": {"flora": -0.03, "lora": 0.04},
    "ruby": {"lora": None},
}


@pytest.mark.parametrize(
    "differences", [THREE, {"lua": {"flora": -0.2}}, {"lua": {"flora": None, "lora": None}}]
)
def test_page_is_well_formed_with_unique_ids_and_ordered_headings(
    differences: dict[str, dict[str, float | None]],
) -> None:
    page = Outline(page_of(run(differences)))
    assert len(page.ids) == len(set(page.ids))
    assert page.references <= set(page.ids)
    assert page.headings[0] == 1
    assert page.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))


def test_one_adapter_with_one_evaluation_renders_without_completions() -> None:
    results = run({"lua": {"flora": -0.2}}, completions=[])
    results["curves"] = {
        "training": {"lua-flora": [[4, 2.0]]},
        "heldout": {"lua-flora": [[4, 2.0]]},
        "base": {"lua": None},
        "heldout_examples": None,
    }
    page = page_of(results)
    assert "1 adapter on task lua was trained" in page
    assert "methods cannot be compared" in page
    assert 'id="completions"' not in page
    assert ">best</span>" not in page


def test_without_curves_the_panel_says_that_nothing_was_logged() -> None:
    assert "nothing was logged" in page_of(
        run(THREE, curves={"training": {}, "heldout": {}, "base": {}, "heldout_examples": None})
    )


def test_completions_prompts_and_configuration_are_escaped() -> None:
    results = run({"lua": {"flora": -0.2}}, name="<i>run</i>")
    attack = "</code></pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    results["completions"] = [
        {"task": "lua", "prompt": attack, "completions": {"base": attack, "flora": attack}}
    ]
    results["facts"]["config"] = attack
    page = page_of(results)
    assert page.count("<script") == 1
    assert "<img" not in page
    assert "<i>run" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 4


def test_control_characters_and_lone_surrogates_of_completions_stay_harmless_and_visible() -> None:
    results = run({"lua": {"flora": -0.2}})
    results["completions"] = [
        {"task": "lua", "prompt": "p", "completions": {"base": "\x1b[31m\x00", "flora": "a\ud800b"}}
    ]
    page = page_of(results)
    assert "␛[31m␀" in page
    assert page.encode("utf-8")


def test_page_loads_nothing_external_and_runs_its_own_script_only() -> None:
    page = page_of(run(THREE))
    assert not re.search(r"""(?:src|href|action|data|xmlns)\s*=\s*["']?\s*(?:https?:|//)""", page)
    assert not re.search(r"url\(\s*['\"]?(?!#)", page)
    assert "@import" not in page
    (script,) = re.findall(r"<script[^>]*>(.*?)</script>", page, re.S)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_best_is_marked_in_words_once_per_task_with_rivals() -> None:
    page = page_of(run(THREE))
    cells = re.findall(r'<td data-label="[^"]*" class="best clear">.*?</td>', page, re.DOTALL)
    assert [re.search(r"[\d.]+(?=</span>)", cell)[0] for cell in cells] == ["1.800", "1.970"]
    assert all(">best</span>" in cell for cell in cells)


def test_worse_and_unclear_are_written_beside_the_figure() -> None:
    page = page_of(run({"lua": {"flora": 0.2, "lora": 0.001}}))
    assert re.search(r">worse</span>\s*2\.200", page)
    assert re.search(r">unclear</span>\s*2\.001", page)


def test_summary_says_all_better_only_where_every_interval_is_below_zero() -> None:
    assert (
        "On all 2 tasks every method predicts held-out text better than the base model: no 95 % interval"
        in summary({"lua": {"flora": -0.2}, "perl": {"flora": -0.1, "lora": -0.3}})
    )
    assert "every method" not in summary({"lua": {"flora": -0.2}, "perl": {"flora": -0.001}})


def test_summary_says_worse_no_clear_difference_and_not_finite_by_name() -> None:
    text = summary({"lua": {"flora": 0.2, "lora": -0.2}, "perl": {"flora": 0.001, "lora": None}})
    assert "Of 4 adapters, 1 predicts held-out text better than the base model" in text
    assert "1 predicts it worse (flora on lua)" in text
    assert "for 1 there is no clear difference, the 95 % interval includes zero (flora on perl)" in text
    assert "1 cannot be compared, the held-out loss is not finite (lora on perl)" in text


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (-0.2, "better than the base model: −0.200 bits per byte, 95 % interval −0.210 to −0.190"),
        (0.2, "worse than the base model: +0.200 bits per byte"),
        (0.001, "no clear difference to the base model on held-out text: +0.001"),
        (None, "cannot be compared"),
    ],
)
def test_summary_of_one_adapter_follows_its_interval(difference: float | None, words: str) -> None:
    assert words in summary({"lua": {"flora": difference}})


def test_summary_names_the_best_method_and_whether_its_lead_is_clear() -> None:
    text = summary({"lua": {"flora": -0.20, "lora": -0.10}, "perl": {"flora": -0.10, "lora": -0.101}})
    assert (
        "The best method is flora on lua (−0.200 bits per byte, 95 % interval −0.210 to −0.190) and "
        "lora on perl"
    ) in text
    assert "The lead over the next method is not clear on perl: the interval includes zero." in text
    assert "is clear on all 3 tasks." in summary({task: {"flora": -0.2, "lora": -0.1} for task in "abc"})
    assert "still worse than the base" in summary({"lua": {"flora": 0.2, "lora": 0.3}})


def test_figures_that_are_not_finite_are_named_and_never_best() -> None:
    results = run({"lua": {"flora": None, "lora": -0.1}})
    results["results"][0]["contenders"][0]["best"] = True
    page = page_of(results)
    assert "not finite" in page
    assert "22 losses are not finite" in page
    assert not re.search(
        r"\b(?:nan|None|inf|Undefined)\b", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    )
    assert len(re.findall(">best</span>", page)) == 1


def test_everything_left_out_or_cut_is_counted_in_words() -> None:
    page = page_of(run(THREE))
    assert (
        "Of 3,702 training rows, 51 were left out by the limit on examples and "
        "15 were cut off at the length limit."
    ) in page


def test_a_task_without_adapter_has_no_target_share() -> None:
    results = run({"lua": {"flora": -0.1}})
    results["tasks"].append(
        {**results["tasks"][0], "name": "idle", "tokens_drawn": 0, "target_share": 0.0, "epochs": 0.0}
    )
    assert "<td>0.0&nbsp;%</td><td>0.0&nbsp;%</td>" in page_of(results)


def test_same_results_give_the_same_bytes() -> None:
    assert page_of(run(THREE)) == page_of(copy.deepcopy(run(THREE)))


def test_a_run_of_100_adapters_stays_under_3_megabytes_and_draws_every_task() -> None:
    families = {"flora": -0.20, "lora": -0.10, "ia3": -0.05, "other": 0.02}
    page = page_of(run({f"task{i}": families for i in range(25)}))
    assert len(page.encode()) < 3_000_000
    assert page.count("Loss over steps on task") == 25
    assert "13 more tasks" in page
