"""The studies of routed adapters: tables of held-out losses, and the choices of gates."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flora_train.adapters.bank import AdapterBank
from studies.routed_study.choices import (
    Document,
    choices_of,
    document_table,
    layer_of,
    layer_table,
    right_share,
)
from studies.routed_study.heldout import Heldout, StudyError, check_order, largest_difference
from studies.routed_study.table import scores_of, write_tables
from tests.architectures import tiny_model
from tests.conftest import spec

sys.path.append(str(Path(__file__).resolve().parents[3] / "studies"))  # as where gates.py is run
gates = import_module("gates")
LANGUAGES = ("lua",) * 6 + ("fin",) * 4


@pytest.fixture
def heldout() -> Heldout:
    """mixlora is better by 0.5 bits per byte on Lua, and equal to the shared LoRA on Finnish."""
    generator = np.random.default_rng(0)
    sizes = generator.integers(50, 200, len(LANGUAGES))
    bits = 2.0 + 0.2 * generator.standard_normal(len(LANGUAGES))
    lora = sizes * bits
    better = np.where(np.array(LANGUAGES) == "lua", lora - 0.5 * sizes, lora)
    nats = {
        "base": {"base": (lora + sizes) * np.log(2)},
        "lora": {"m-lora_1": lora * np.log(2), "m-lora_2": lora * np.log(2)},
        "mixlora": {
            "m-mix_1": (better - 0.1 * sizes) * np.log(2),
            "m-mix_2": (better + 0.1 * sizes) * np.log(2),
        },
    }
    return Heldout(LANGUAGES, sizes, nats, {"base": 0, "lora": 1234, "mixlora": 1300})


def test_scores_are_ratios_of_sums_and_means_over_languages_and_seeds(heldout: Heldout) -> None:
    scores = scores_of(heldout)
    lua = np.array(LANGUAGES) == "lua"
    expected = {}
    for name, chosen in (("lua", lua), ("fin", ~lua)):
        bits = heldout.nats["lora"]["m-lora_1"][chosen] / np.log(2)
        expected[name] = bits.sum() / heldout.sizes[chosen].sum()
    assert scores["lora"].values == pytest.approx(expected)
    assert scores["lora"].mean == pytest.approx((expected["lua"] + expected["fin"]) / 2)
    assert scores["base"].mean == pytest.approx(scores["lora"].mean + 1)
    assert scores["mixlora"].seeds == pytest.approx([scores["lora"].mean - 0.35, scores["lora"].mean - 0.15])
    assert scores["mixlora"].deviation == pytest.approx(np.std([0.0, 0.2], ddof=1))
    assert scores["base"].deviation is None


def test_differences_are_paired_by_document(heldout: Heldout) -> None:
    scores = scores_of(heldout)
    difference = scores["mixlora"].minus(scores["lora"])
    assert (difference.value, difference.low, difference.high) == pytest.approx((-0.25, -0.25, -0.25))
    of_fin = scores["mixlora"].minus(scores["lora"], "fin")
    assert (of_fin.low, of_fin.high) == pytest.approx((0, 0), abs=1e-9)
    estimate = scores["lora"].estimate()
    assert estimate.low < estimate.value < estimate.high


def test_tables_have_every_method_and_mark_what_is_clear(heldout: Heldout) -> None:
    lines = list(write_tables(heldout))
    assert lines[2].startswith("| base | 0 |")
    row = next(line for line in lines if line.startswith("| MixLoRA | 1,300 |"))
    assert "-0.250 [-0.250, -0.250]" in row
    assert "| method | lua (6) | fin (4) |" in lines
    values = scores_of(heldout)["mixlora"].values
    assert f"| MixLoRA | {values['lua']:.3f}* | {values['fin']:.3f} |" in lines


def test_losses_are_compared_with_the_runs_report(heldout: Heldout) -> None:
    value = heldout.bits_per_byte("lora", "m-lora_1")
    adapters = [SimpleNamespace(family="lora_1", seeds_of="lora", name="m-lora_1")]
    contender = SimpleNamespace(family="lora_1", bits_per_byte=SimpleNamespace(value=value + 0.25))
    report = SimpleNamespace(adapters=adapters, results=[SimpleNamespace(contenders=[contender])])
    assert largest_difference(heldout, report) == pytest.approx(0.25)  # type: ignore[arg-type]


def test_examples_that_are_not_the_rows_are_refused() -> None:
    check_order(["abc", "äb"], np.array([3, 2]))
    for texts, sizes in ((["abc"], [3, 1]), (["abc", "ä"], [3, 3])):
        with pytest.raises(StudyError, match="not the rows"):
            check_order(texts, np.array(sizes))


def document(right: int, **counts: list[int]) -> Document:
    return Document(right, {f"layers.{name[-1]}.{name[:-1]}": np.array(c) for name, c in counts.items()})


DOCUMENTS = {
    "lua": [document(0, q0=[6, 2], q1=[1, 7]), document(0, q0=[8, 0], q1=[8, 0])],
    "perl": [document(1, q0=[0, 4], q1=[1, 3])],
}


def test_a_document_goes_where_most_of_its_tokens_go() -> None:
    first, second = DOCUMENTS["lua"]
    assert (first.majority, first.is_right) == (1, False)  # 7 against 9
    assert second.is_right
    assert right_share(DOCUMENTS["lua"], ["layers.0.q", "layers.1.q"]) == pytest.approx(23 / 32)
    lines = list(document_table(DOCUMENTS, ["lua-lora", "perl-lora"]))
    assert lines[2] == "| lua | 2 | 50.0% | 1 | 1 | 71.9% |"
    assert lines[3] == "| perl | 1 | 100.0% | 0 | 1 | 87.5% |"
    assert lines[4] == "| all | 3 | **66.7%** | | | 75.0% |"


def test_layers_have_the_share_of_their_tokens_that_are_right() -> None:
    lines = list(layer_table(DOCUMENTS))
    assert lines[2] == "| 0 | 1 | 87.5% | 100.0% | 90.0% | q 90.0%, q 90.0% |"
    assert lines[3] == "| 1 | 1 | 56.2% | 75.0% | 60.0% | q 60.0%, q 60.0% |"


def test_the_choices_of_a_document_are_those_of_its_routers() -> None:
    bank = AdapterBank.attach(tiny_model("llama"), [spec("mixlora", "a", "mix", experts=4, top_k=2)])
    layers = bank.parameters_of("a-mix")
    routers = {name: layer["router"] for name, layer in layers.items() if "router" in layer}
    seen: dict[str, torch.Tensor] = {}
    for name in routers:
        block = bank.model.get_submodule(name)
        forward = block.forward

        def observed(x: torch.Tensor, name: str = name, forward: object = forward) -> torch.Tensor:
            seen[name] = x[0]
            return forward(x)  # type: ignore[operator, no-any-return]

        block.forward = observed  # type: ignore[method-assign]
    counts = choices_of(bank, 0, [5, 9, 3, 7, 11])
    assert counts.keys() == routers.keys()
    assert len(counts) == len({layer_of(name) for name in counts})
    for name, router in routers.items():
        first = (seen[name] @ router.T).argmax(1)
        assert counts[name].tolist() == first.bincount(minlength=4).tolist()
    assert bank.router.recorder is None


def test_the_file_about_gates_says_whether_the_goal_is_met() -> None:
    text = "\n".join(gates.lines_of(DOCUMENTS, ["lua-lora", "perl-lora"], 128))
    assert "66.7% of 3 documents" in text
    assert "(goal: 95%, missed)" in text
    right = {"lua": DOCUMENTS["lua"][1:], "perl": DOCUMENTS["perl"]}
    assert "(goal: 95%, met)" in "\n".join(gates.lines_of(right, ["lua-lora", "perl-lora"], 128))


def test_gates_are_of_members_named_after_their_language() -> None:
    assert gates.member_of("perl", ["lua-lora", "perl-lora"]) == 1
    with pytest.raises(gates.StudyError, match="no member ruby-lora, only lua-lora"):
        gates.member_of("ruby", ["lua-lora"])
    bank = AdapterBank.attach(tiny_model("llama"), [spec("lora", "a", "plain")])
    with pytest.raises(gates.StudyError, match="no adapter of method meteora"):
        gates.gate_of(bank)


def test_documents_of_gates_are_the_held_out_rows_of_assets() -> None:
    for language in gates.LANGUAGES:
        texts = gates.held_out_texts(language, gates.CODE)
        assert len(texts) == 75
        assert all(texts)
