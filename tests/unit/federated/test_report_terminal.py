"""What a terminal shows when a federated run ends."""

from __future__ import annotations

import io

from rich.console import Console

from flora_train.federated.report_terminal import print_federated
from flora_train.federated.result_types import FederatedReport, Incident
from tests.unit.federated.reports import federated_report, with_incidents


def lines_of(report: FederatedReport) -> list[str]:
    text = io.StringIO()
    print_federated(report, Console(file=text, width=80, soft_wrap=True))
    return text.getvalue().splitlines()


def test_every_strategy_has_a_line_of_80_columns() -> None:
    finals = {"lora": 0.61, "lora_products": 0.63, "slora": 0.66, "full": 0.7, "central": 0.74}
    lines = lines_of(federated_report(finals, clients=100, rounds=20, seeds=(0, 1, 2)))
    assert max(map(len, lines)) <= 80
    assert "chapters: 100 clients, 20 rounds; higher is better, in percent" in lines
    (lora,) = [line for line in lines if line.strip().startswith("lora ")]
    assert " ".join(lora.split()) == "lora 61.0 +/- 0.0 [59.0, 63.0] 61.0 +/- 0.0 4.6 4m14s"
    (central,) = [line for line in lines if line.strip().startswith("central ")]
    assert central.split()[-2:] == ["-", "13s"]


def test_failed_rounds_and_left_out_clients_have_a_line() -> None:
    report = federated_report({"lora": 0.6, "flora": 0.62})
    bad = Incident(client="a", status="excluded", reason="another shape\x1b[31m")
    report = with_incidents(report, 0, incidents=[bad], failure="0 of 1 updates can be used")
    (line,) = [line for line in lines_of(report) if line.startswith("lora: ")]
    assert line == r"lora: 1 round changed nothing, 1 update left out (another shape\x1b[31m)"
    assert not [line for line in lines_of(report) if line.startswith("flora: ")]


def test_texts_have_bits_per_byte() -> None:
    lines = lines_of(federated_report({"lora": 1.25}, figures=("bits_per_byte",)))
    assert "chapters: 5 clients, 4 rounds; lower is better" in lines
    assert any("1.250 [1.230, 1.270]" in line for line in lines)


def test_a_figure_that_is_not_finite_is_said() -> None:
    assert any("not finite" in line for line in lines_of(federated_report({"lora": None})))
