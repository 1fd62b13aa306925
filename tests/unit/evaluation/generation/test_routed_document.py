"""The Python blocks of docs/routed.md run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flora_train.adapters.bank import AdapterBank
from flora_train.evaluation.generation import Decoder, Request
from flora_train.evaluation.generation.given_routes import alternating_routes, given_routes
from tests.conftest import spec
from tests.documents import blocks
from tests.unit.adapters.gate_reference import LORAS, gate_spec
from tests.unit.data.conftest import byte_tokenizer
from tests.unit.evaluation.generation.test_complete import model_for
from tests.unit.evaluation.generation.test_merged_decoding import GREEDY

DOCUMENT = Path(__file__).parents[4] / "docs" / "routed.md"


def test_the_blocks_of_the_page_run() -> None:
    tokenizer = byte_tokenizer()
    gate = gate_spec(LORAS, "mixed")
    switch = spec("switch", experts=8, top_k=1, rank=2)
    bank = AdapterBank.attach(model_for("llama", tokenizer), [gate, switch])
    bank.model.eval()
    texts: list[str] = []
    input_ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    names: dict[str, Any] = {
        "bank": bank,
        "model": bank.model,
        "input_ids": input_ids,
        "lengths": [3, 2],
        "given_routes": given_routes,
        "alternating_routes": alternating_routes,
        "requests": [Request(bank.ids[switch.name], "re", ("",))],
        "report": lambda generated: texts.append(generated.text),
    }
    observe, decode, measure = (block.text for block in blocks(DOCUMENT, "python"))
    exec(observe.replace("mixed-gate", gate.name), names)
    choices: Any = bank.router.recorder
    first: dict[str, list[torch.Tensor]] = choices.first
    assert set(first) == set(bank.location[0][0].targets)
    assert all(len(of_layer[0]) == 5 for of_layer in first.values())
    assert names["names"] == list(LORAS)
    bank.router.recorder = None
    bank.abandon()
    exec(decode, names)
    names["decoder"] = Decoder(
        bank.model, tokenizer, bank.routed, sampling=GREEDY, max_new_tokens=3, merging=names["merging"]
    )
    exec(measure, names)
    assert len(texts) == 1
