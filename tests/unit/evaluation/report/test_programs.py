"""Programs in the report: pass@k, its limits, and escaped text."""

from __future__ import annotations

import re
from typing import Any

from rich.console import Console

from flora_train.evaluation.code.score_types import CodeSuite
from flora_train.evaluation.report.summary_text import summarise
from flora_train.evaluation.report.terminal import print_pass_at_k
from flora_train.evaluation.report.types import Report
from tests.unit.evaluation.report.test_html import page_of, run


def results_of(**changes: Any) -> dict[str, Any]:
    """A run of two methods on one task."""
    return run({"lua": {"flora": -0.2, "lora": -0.1}}, **changes)


def estimate(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "excludes_zero": low > 0 or high < 0}


def contender(family: str, value: float, **facts: Any) -> dict[str, Any]:
    ended = dict.fromkeys(
        ("OK", "AssertionError", "Exception", "SyntaxError", "Timeout", "OutOfMemory", "SandboxViolation"), 3
    )
    ks = {k: estimate(value, max(0.0, value - 0.1), min(1.0, value + 0.1)) for k in ("1", "10")}
    return {
        "name": f"lua-{family}",
        "family": family,
        "samples": 20,
        "pass_at": ks,
        "ended": ended,
        "suspicious": 0,
        "cut": 0,
        **facts,
    }


def difference(a: str, b: str, value: float, low: float, high: float) -> dict[str, Any]:
    return {"first": a, "second": b, "pass_at": dict.fromkeys(("1", "10"), estimate(value, low, high))}


def macro_of(part: dict[str, Any]) -> dict[str, Any]:
    means = [{"family": row["family"], "pass_at": row["pass_at"]} for row in part["contenders"]]
    return {"contenders": means, "differences": part["differences"]}


def suite_of(*languages: str, **changes: Any) -> dict[str, Any]:
    part = {
        "contenders": [contender("base", 0.1), contender("flora", 0.4, suspicious=2), contender("lora", 0.3)],
        "differences": [
            difference("flora", "base", 0.3, 0.2, 0.4),
            difference("lora", "base", 0.2, -0.1, 0.4),
            difference("flora", "lora", 0.1, 0.05, 0.15),
        ],
    }
    facts = {
        "name": "Lua",
        "problems": 40,
        "available": 161,
        "prompts_sha": "0",
        "cpu_seconds": 15.0,
        "wins_and_losses": [],
    }
    settings = {
        "source": "starter",
        "num_samples": 20,
        "pass_at_k": [1, 10],
        "temperature": 0.2,
        "top_p": 0.95,
        "max_new_tokens": 96,
        "seed": 0,
    }
    counts = {"confidence": 0.95, "sandbox": "bubblewrap", "completions": 4800, "tokens": 100000}
    return {
        "suite": "starter",
        **settings,
        **counts,
        "languages": [{"language": language, **facts, **part} for language in languages],
        "macro": {"languages": list(languages), **macro_of(part)},
        "not_evaluated": [],
        **changes,
    }


def text_of(page: str) -> str:
    """What a reader sees: no tags, single spaces."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]))


def test_values_differences_and_what_was_left_out_stand_in_the_page() -> None:
    text = text_of(page_of(results_of(code=[suite_of("lua", "pl")])))
    assert "pass@1 on starter problems, in percent" in text
    assert "pass@10 on starter problems, in percent" in text
    assert "40.0 +30.0 [+20.0, +40.0]" in text
    assert "20.0" in text
    assert "40 of 161" in text
    assert "mean of 2" in text
    assert "yes, flora is better" in text
    assert "scores on them are not comparable with HumanEval" in text
    assert "The limit of CPU time was 15 seconds." in text
    assert "Nothing was executed" not in text


def test_page_lists_time_limits_that_differ_by_language() -> None:
    suite = suite_of("lua", "java")
    suite["languages"][1]["cpu_seconds"] = 20.0
    assert "The limit of CPU time was 15 or 20 seconds, depending on the language." in text_of(
        page_of(results_of(code=[suite]))
    )


def test_a_run_without_problems_has_no_such_section() -> None:
    assert 'id="programs"' not in page_of(results_of())


def test_the_summary_says_what_is_not_clear() -> None:
    last = summarise(Report.model_validate(results_of(code=[suite_of("lua", "pl")])))[-1]
    assert last == (
        "pass@1 on the starter problems over 2 languages: base 10.0\u00a0%, flora 40.0\u00a0% and lora "
        "30.0\u00a0% (no clear "
        "difference to the base)."
    )


def test_missing_evaluation_is_named_and_is_not_a_score_of_zero() -> None:
    missing = [{"language": "jl", "reason": "Julia does not run here <b>: apt-get install julia"}]
    nothing = suite_of(
        languages=[], macro={"languages": [], "contenders": [], "differences": []}, not_evaluated=missing
    )
    page = page_of(results_of(code=[nothing]))
    assert "jl: Julia does not run here &lt;b&gt;: apt-get install julia" in page
    assert "Not evaluated (these are not scores of 0)" in page
    assert "nothing could be compared" in text_of(page)


def test_page_warns_about_a_run_without_sandbox() -> None:
    assert "without a sandbox" in text_of(page_of(results_of(code=[suite_of("lua", sandbox="none")])))
    assert "without a sandbox" not in text_of(page_of(results_of(code=[suite_of("lua")])))


def test_the_terminal_shows_every_k_within_eighty_columns() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_pass_at_k([CodeSuite.model_validate(suite_of("lua", "pl"))], console)
    said = console.export_text()
    assert "pass@1 " in said
    assert "pass@10" in said
    assert "0.400 [0.300, 0.500]" in said
    assert "+0.300 [+0.200, +0.400]" in said
    assert max(len(line.rstrip()) for line in said.splitlines()) <= 80
