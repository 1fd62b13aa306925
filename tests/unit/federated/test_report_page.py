"""The page of a federated run shows its strategies, rounds and clients, whatever they are, and is one safe
file."""

from __future__ import annotations

import re
import shutil
import subprocess
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flora_train.federated.report_html import render_federated
from flora_train.federated.report_page import write_page
from flora_train.federated.report_plots import round_points
from flora_train.federated.report_summary import summarise
from flora_train.federated.report_tables import distributions, evenly, mebibytes, population_facts, round_maps
from flora_train.federated.report_terminal import print_federated
from flora_train.federated.result_types import FederatedReport, Incident
from tests.unit.federated.reports import federated_report, with_incidents

SIX = {"lora": 0.61, "slora": 0.66, "flora": 0.645, "ia3": 0.5, "full": 0.7, "central": 0.74}
VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "use", "path", "rect", "circle", "line"}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Tables by id of their caption, texts, and tags that were opened and not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.ids: list[str] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self._rows: list[list[str]] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        found = dict(attrs)
        if name := found.get("id"):
            self.ids.append(name)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._rows = []
        if tag == "caption":
            self.tables[str(found["id"])] = self._rows
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._rows[-1][-1] += " ".join(data.split())


def drawn(report: FederatedReport) -> Page:
    """The page of a report; every tag is closed and every id is there once."""
    page = Page(render_federated(report))
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)
    return page


def row_of(page: Page, table: str, name: str) -> list[str]:
    (row,) = [row for row in page.tables[table] if row and row[0].removesuffix("best") == name]
    return row


def test_strategies_have_their_figures_bytes_and_times() -> None:
    page = drawn(federated_report(SIX, rounds=4, seeds=(0, 1)))
    lora, slora, full, central = (
        row_of(page, "table-strategies", name) for name in ("lora", "slora", "full", "central")
    )
    assert lora[1:4] == ["LoRA", "product_mean", "8"]
    assert lora[4].startswith("61.0 ± 0.0")
    assert "59.0, 63.0" in lora[4]
    assert slora[2] == "slora, 2 sparse rounds first"
    assert lora[6:8] == ["0.46", "0.46"]  # 4 rounds x 3 clients x 40,000 bytes each way
    assert lora[8:10] == ["50s", "0.8s"]
    assert full[1:3] == ["full fine-tuning", "mean of all weights"]
    assert central[6:8] == ["–", "–"]
    assert len(page.tables["table-differences"]) == 1 + 15
    assert "no clear difference" in row_of(page, "table-differences", "slora − flora")[2]
    assert row_of(page, "table-differences", "lora − full")[2] == "yes, full is better"


def test_summary_names_the_best_and_compares_with_full_finetuning() -> None:
    best, against, cheapest = summarise(federated_report(SIX))
    assert best.startswith("full has the highest accuracy of 5 strategies: 70.0 [68.0, 72.0] percent")
    assert best.endswith("its lead over slora is clear.")
    assert (
        against == "Against full fine-tuning in rounds (full), lora, slora, flora and ia3 are clearly worse."
    )
    assert cheapest.startswith("lora, slora, flora and 1 more send the fewest bytes, 0.92 MiB in all rounds")
    assert cheapest.endswith("full the most, 1,000 times as many.")


def test_summary_says_where_a_lead_is_not_clear() -> None:
    first, second = summarise(federated_report({"lora": 0.61, "flora": 0.62}))
    assert first.endswith("its lead over lora is not clear.")
    assert second == "Clients and server send 0.92 MiB in all rounds."


def test_lower_bits_per_byte_are_better() -> None:
    report = federated_report({"lora": 1.3, "flora": 1.1}, figures=("bits_per_byte",))
    assert summarise(report)[0].startswith("flora has the lowest bits per byte of 2 strategies: 1.100")
    page = drawn(report)
    assert row_of(page, "table-differences", "lora − flora")[1:] == [
        "+0.200 [+0.180, +0.220]",
        "yes, flora is better",
    ]
    worst, lower, middle, best = map(float, row_of(page, "table-distribution", "lora")[1:5])
    assert worst > lower > middle > best
    (first_map, _) = round_maps(report)
    assert first_map.rows[0][1][-1][0] > first_map.rows[-1][1][-1][0]  # type: ignore[index]


def test_distribution_over_clients_is_of_the_last_evaluated_round() -> None:
    report = federated_report({"lora": 0.5}, clients=11, rounds=3)
    values = sorted(own.value or 0.0 for own in report.strategies[0].seeds[0].rounds[-1].clients.values())
    (row,) = distributions(report)
    assert [row.worst, row.lower, row.middle, row.best] == pytest.approx([values[i] for i in (0, 1, 5, 10)])


@pytest.mark.parametrize("every", [1, 2, 7])
def test_points_are_those_of_evaluated_rounds(every: int) -> None:
    (strategy,) = federated_report({"slora": 0.6}, rounds=6, seeds=(0, 1, 2), every=every).strategies
    points = round_points(strategy, "accuracy")
    assert [point.round for point in points] == [n for n in range(1, 7) if n % every == 0 or n == 6]
    assert points[-1].sent == pytest.approx(6 * 6 * 40_000 / 2**20)
    assert [point.is_sparse for point in points] == [point.round <= 3 for point in points]
    assert points[-1].value == pytest.approx(0.6)
    assert (points[-1].low, points[-1].high) == pytest.approx((0.58, 0.62))


def test_first_stage_and_central_strategies_are_told_in_the_plot() -> None:
    page = render_federated(federated_report(SIX))
    assert "Hollow markers on a dotted line: rounds of sparse values" in page
    assert "Horizontal, without markers" in page
    plain = render_federated(federated_report({"lora": 0.6}))
    assert "Hollow markers" not in plain
    assert "Horizontal" not in plain


@pytest.mark.parametrize(
    ("finals", "options"),
    [
        pytest.param({"lora": 0.6}, {"clients": 1, "rounds": 1}, id="one of everything"),
        pytest.param({"lora": None, "flora": None}, {"rounds": 2}, id="nothing finite"),
        pytest.param({"central": 0.6}, {}, id="no rounds"),
        pytest.param({"lora": 0.6}, {"split": "tasks", "alpha": None}, id="tasks"),
        pytest.param({f"s{i}": 0.5 for i in range(12)}, {"rounds": 60}, id="many strategies and rounds"),
    ],
)
def test_page_of_any_run_is_whole(finals: dict[str, float | None], options: dict[str, Any]) -> None:
    page = drawn(federated_report(finals, **options))
    assert {"table-strategies", "table-clients"} <= set(page.tables)
    assert len(page.tables["table-clients"]) == 1 + options.get("clients", 5)


def test_a_thousand_clients_stay_readable() -> None:
    report = federated_report({"lora": 0.6, "slora": 0.7}, clients=1000, rounds=30)
    html = render_federated(report)
    assert "<summary>Figures of 1,000 clients</summary>" in html
    assert "lora: 60 of 1,000 clients, evenly spaced" in html
    assert "Find a client" in html
    assert len(html) < 1_500_000
    first_map = round_maps(report)[0]
    assert len(first_map.rows) == 60
    assert (first_map.rounds[0], first_map.rounds[-1], len(first_map.rounds)) == (1, 30, 12)
    lasts = [cells[-1][0] for _, cells in first_map.rows if cells[-1] is not None]
    assert lasts == sorted(lasts)


def test_failed_rounds_and_missing_clients_are_listed() -> None:
    report = federated_report({"lora": 0.6, "flora": 0.62})
    incidents = [
        Incident(client="client-001", status="excluded", reason="has numbers that are not finite"),
        Incident(client="client-002", status="absent", reason="did not answer"),
    ]
    report = with_incidents(report, 1, incidents=incidents)
    report = with_incidents(report, 2, failure="0 of 3 updates can be used", loss=None, accepted=0)
    page = drawn(report)
    assert page.tables["table-incidents"][1:] == [
        ["lora", "2", "client-001", "excluded", "has numbers that are not finite"],
        ["lora", "2", "client-002", "absent", "did not answer"],
        ["lora", "3", "–", "round failed", "0 of 3 updates can be used"],
    ]
    assert row_of(page, "table-strategies", "lora")[-2:] == ["1", "2"]
    assert summarise(report)[-1] == (
        "Over all runs together, 1 round changed nothing, for lack of usable updates, and 2 updates of "
        "clients are part of no average."
    )
    assert "A cross: a round that changed nothing." in render_federated(report)


def test_markup_and_control_characters_in_names_are_shown_as_text() -> None:
    evil = '<script>alert("x")</script>\x1b[31m & $x^2$'
    report = federated_report({evil: 0.6, "lora": 0.5}, rounds=2, name=evil, model=evil, notes=[evil])
    bad = Incident(client=evil, status="absent", reason=evil)
    html = render_federated(with_incidents(report, 0, incidents=[bad], failure=evil))
    assert "<script>alert" not in html
    assert "\x1b" not in html
    assert html.count("<script>") == 1


def test_page_loads_nothing_and_its_script_is_the_one_that_is_allowed() -> None:
    html = render_federated(federated_report(SIX))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = b64encode(sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in html
    assert not re.findall(r"(?:src|href)=\"(?!#)", html)
    assert "url(http" not in html


def test_clients_are_described() -> None:
    facts = population_facts(federated_report({"lora": 0.6}, clients=9, seeds=(3, 4)))
    assert facts["Clients"] == "9, of which 3 take part in a round"
    assert facts["Split"] == "the examples of each label, by shares from Dirichlet(0.1)"
    assert facts["Training examples of a client"] == "10 (smallest), 16 (median), 28 (largest)"
    assert facts["Entropy of a client's labels"].startswith("0.70 nats")
    assert facts["In a round, a client takes"] == "5 steps of 8 examples"
    assert facts["Seeds"] == "3, 4"


def test_evenly_keeps_first_and_last() -> None:
    assert evenly(range(5), 5) == [0, 1, 2, 3, 4]
    assert evenly(range(100), 4) == [0, 33, 66, 99]


@pytest.mark.parametrize(
    ("sent", "text"), [(0, "0.0"), (1024, "0.00098"), (2**19, "0.5"), (3 * 2**30, "3,072")]
)
def test_bytes_are_written_in_mebibytes(sent: int, text: str) -> None:
    assert mebibytes(sent) == text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [400, 1200])
def test_page_is_not_wider_than_its_window(width: int, tmp_path: Path) -> None:
    """In a browser: only tables scroll sideways. The page's own policy forbids a second script, so that the
    width is asked for in a page without policy."""
    report = federated_report(SIX, clients=30, rounds=8, seeds=(0, 1))
    page = write_page(report, tmp_path).read_text(encoding="utf-8")
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    asked = "<script>document.title = `${document.documentElement.scrollWidth} of ${innerWidth}`</script>"
    (tmp_path / "asked.html").write_text(page.replace("</body>", f"{asked}</body>"), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "asked.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>(\d+) of (\d+)</title>", done.stdout)
    assert found is not None, done.stdout[:500]
    assert int(found[1]) <= int(found[2])


def test_page_of_a_server_without_held_out_examples() -> None:
    report = federated_report(SIX)
    bare = report.replace(figures=[], differences=[])
    page = render_federated(bare)
    assert "No adapter was evaluated" in page
    assert 'id="by-client"' not in page
    assert 'id="strategies"' in page
    console = Console(record=True, width=80)
    print_federated(bare, console)
    assert "no held-out examples" in console.export_text()
