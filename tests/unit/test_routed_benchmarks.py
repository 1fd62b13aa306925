"""The benchmarks of routed adapters: every way runs, and tokens are routed as the tables say."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flora_train.adapters.spec import AdapterSpec
from tests.architectures import VOCABULARY, tiny_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # as where they are run
decoding = import_module("routed_decoding")
training = import_module("routed_training")
TOKENS = torch.arange(10, 10 + decoding.EXPERTS)


def test_rows_have_different_tokens_that_change_as_the_tables_say() -> None:
    assert decoding.fed_tokens(TOKENS, 3, 2, 1).tolist() == [[10, 11], [11, 12], [12, 13]]
    constant = decoding.fed_tokens(TOKENS, 5, 1, 2)[:, 0]
    assert constant.tolist() == [10, 10, 11, 11, 12]
    assert len(set(decoding.fed_tokens(TOKENS, 1, 8, 1)[0].tolist())) == decoding.EXPERTS


def test_switch_adapters_send_each_token_to_its_own_expert() -> None:
    bank = decoding.make_bank(tiny_model("llama").eval(), {"method": "switch", "top_k": 1, "rank": 2})
    decoding.route_by_token(bank, TOKENS)
    seen: list[int] = []

    class Recorder:
        """Keeps the experts of the last forward pass."""

        def add(self, spec: AdapterSpec, module: str, *, experts: Tensor, probabilities: Tensor) -> None:
            seen.extend(experts[:, 0].tolist())

    bank.router.recorder = Recorder()
    with bank.routed([0]):
        bank.model(torch.stack([TOKENS.flip(0)]))
    assert seen == list(reversed(range(decoding.EXPERTS)))


def test_every_way_of_decoding_runs_and_rows_of_merged_ways_are_alone() -> None:
    assert int(TOKENS.max()) < VOCABULARY
    ways = decoding.ways_of(tiny_model("llama").eval(), TOKENS)
    assert sum(way.alone for way in ways.values()) == 4
    for name, way in ways.items():
        rows = 1 if way.alone else 2
        prompt, fed = TOKENS[:4].repeat(rows, 1), decoding.fed_tokens(TOKENS, 2, rows, way.constant)
        assert decoding.seconds_a_step(way, prompt, fed) > 0, name


def test_the_loops_decode_what_the_bank_decodes() -> None:
    ways = decoding.ways_of(tiny_model("llama").eval(), TOKENS)
    logits = {}
    for name in ("MixLoRA, top-2 of 8", "loop over whole experts", "loop, W1 x and W3 x shared"):
        with torch.no_grad(), ways[name].route(2):
            logits[name] = ways[name].model(TOKENS.view(2, -1)).logits
    expected = logits.pop("MixLoRA, top-2 of 8")
    for name, found in logits.items():
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("rows", [1, 2])
def test_every_way_of_training_runs(rows: int) -> None:
    model = tiny_model("llama").requires_grad_(False).train()
    steps = training.steps_of(model, rows, 6)
    assert list(steps) == ["bank", "adapters in turn", "one pass", "one pass, shared"]
    seconds = training.measured(steps, 1)
    assert all(len(taken) == 1 and taken[0] > 0 for taken in seconds.values())
