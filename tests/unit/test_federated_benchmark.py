"""The benchmark of a federated round: both sides compute the same average, and the file has all ways."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from tests.architectures import tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # as where it is run
federated_round = import_module("federated_round")


@pytest.fixture
def encoder(tmp_path: Path) -> str:
    """A folder with a small BERT."""
    folder = tmp_path / "encoder"
    tiny_model("bert").base_model.save_pretrained(folder)
    return str(folder)


def test_clients_in_one_bank_and_in_peft_one_by_one_have_the_same_average(encoder: str) -> None:
    setup = federated_round.Setup(encoder, 3, [4, 7, 9])
    assert setup.difference() <= federated_round.TOLERANCE
    assert setup.moved() > 100 * federated_round.TOLERANCE  # a comparison of adapters that learnt


def test_peft_clients_each_begin_with_the_global_adapter_and_a_fresh_optimizer(encoder: str) -> None:
    setup = federated_round.Setup(encoder, 2, [7])
    (_, first), (_, second) = setup.batches
    alone = setup.peft.client(setup.start, second)
    setup.peft.client(setup.start, first)
    after_another = setup.peft.client(setup.start, second)
    for name, expected in alone.items():
        assert torch.equal(after_another[name], expected), name


def test_the_file_has_a_row_for_each_way_and_the_server_step(
    encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--clients", "2", "--at-once", "1", "2", "--lengths", "6", "--repeats", "1", "--texts", "none"]
    federated_round.main(["--model", encoder, *sizes])
    text = capsys.readouterr().out
    for way in ("peft", "bank, 1 at once", "bank, 2 at once"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"| {way} |")]
        seconds, rate, ratio, memory = (cell.strip(" *") for cell in row.split("|")[2:6])
        assert float(seconds) >= 0
        assert float(rate.replace(",", "")) > 0
        assert float(ratio) > 0
        assert float(memory.replace(",", "")) >= 0
    assert "| base alone |" in text
    assert "product_mean" in text
