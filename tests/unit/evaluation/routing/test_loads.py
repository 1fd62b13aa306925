"""The load of experts on held-out texts: counted without padding, the same in every batching, and shown."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.data.batch import collate
from flora_train.data.task import Task
from flora_train.evaluation.report.expert_maps import layer_labels, load_line, load_maps
from flora_train.evaluation.routing.load_types import ExpertLoad, LayerLoad
from flora_train.evaluation.routing.loads import LoadRecorder, expert_loads
from flora_train.training.loss import RowLosses
from tests.architectures import tiny_model
from tests.conftest import perturb, spec
from tests.unit.training.harness import PAD, random_split

TASKS = {
    name: Task(name, 1.0, random_split(0, 5), random_split(seed, 9), "hash") for seed, name in enumerate("ab")
}


def bank_of(*specs: Any) -> AdapterBank:
    bank = AdapterBank.attach(tiny_model().eval(), list(specs))
    perturb(bank)
    return bank


def loads_of(bank: AdapterBank, max_tokens: int = 60) -> list[ExpertLoad]:
    return expert_loads(
        RowLosses(bank.model), bank, TASKS, max_tokens=max_tokens, pad_token=PAD, collate=collate
    )


class Inputs:
    """What each router reads, one text at a time."""

    def __init__(self, bank: AdapterBank) -> None:
        self.read: dict[str, list[Tensor]] = {}
        for name in ("model.layers.0.mlp", "model.layers.1.mlp"):
            block = bank.model.get_submodule(name)
            block.register_forward_pre_hook(lambda module, args, name=name: self._keep(name, args[0]))

    def _keep(self, name: str, x: Tensor) -> None:
        self.read.setdefault(name, []).append(x.flatten(0, 1))


@torch.no_grad()
def counted_text_by_text(bank: AdapterBank, name: str, task: Task, top_k: int) -> Mapping[str, list[float]]:
    """Module -> shares, from the definition: no padding, no batch."""
    inputs = Inputs(bank)
    split = task.validation
    for example in range(len(split)):
        first, end = split.offsets[example], split.offsets[example + 1]
        ids = torch.from_numpy(np.asarray(split.tokens[first:end], dtype=np.int64))[None]
        with bank.routed([name]):
            bank.model(input_ids=ids)
    shares = {}
    for module, read in inputs.read.items():
        router = bank.parameters_of(name)[module]["router"]
        chosen = (torch.cat(read) @ router.T).topk(top_k).indices
        counts = torch.bincount(chosen.flatten(), minlength=len(router)).double()
        shares[module] = (counts / counts.sum()).tolist()
    return shares


def test_loads_are_those_of_every_text_alone_without_padding() -> None:
    mixes = [spec("mixlora", task, "mix", experts=4, rank=2) for task in "ab"]
    bank = bank_of(*mixes, spec("lora", "a", "lora", rank=2))
    loads = {load.adapter: load for load in loads_of(bank)}
    assert loads.keys() == {"a-mix", "b-mix"}
    for name, load in loads.items():
        split = TASKS[load.task].validation
        assert (load.tokens, load.examples) == (int(split.lengths.sum()), 9)
        reference = counted_text_by_text(bank, name, TASKS[load.task], top_k=2)
        assert {layer.module: list(layer.shares) for layer in load.layers} == reference
    for again in loads_of(bank, max_tokens=20):
        for layer, before in zip(again.layers, loads[again.adapter].layers, strict=True):
            assert layer.shares == before.shares
            assert layer.entropy == pytest.approx(before.entropy, abs=1e-6)
    assert bank.router.recorder is None


def test_a_router_without_preference_leaves_all_but_the_first_expert_dead() -> None:
    bank = bank_of(spec("mixlora", "a", "mix", experts=3, rank=2, top_k=1))
    for params in bank.parameters_of("a-mix").values():
        if "router" in params:
            params["router"].zero_()
    (load,) = loads_of(bank)
    assert [layer.shares for layer in load.layers] == [(1.0, 0.0, 0.0)] * 2
    assert (load.busiest, load.least, load.dead) == (1.0, 0.0, 4)
    assert load.entropy == pytest.approx(math.log(3))
    assert load.largest_entropy == pytest.approx(math.log(3))
    line = "experts: busiest 100 %, least 0 %, dead 4 of 6, entropy 1.1 of 1.1 nats"
    assert load_line(load) == line


def test_slots_without_expert_are_not_counted() -> None:
    bank = bank_of(spec("mixlora", "a", "mix", experts=3, rank=2, top_k=3, top_p=0.5))
    recorder = LoadRecorder(bank)
    chosen = torch.tensor([[2, 0, -1], [2, -1, -1]])
    module = "model.layers.0.mlp"
    recorder.add(bank.specs[0], module, experts=chosen, probabilities=torch.tensor([[0.2, 0.0, 0.8]] * 2))
    counts = recorder.counts["a-mix", module]
    assert counts.chosen.tolist() == [1.0, 0.0, 2.0]
    assert float(counts.tokens) == 2.0
    entropy = -2 * (0.2 * math.log(0.2) + 0.8 * math.log(0.8))
    assert float(counts.entropy) == pytest.approx(entropy, abs=1e-6)


def test_without_routed_adapters_nothing_is_read() -> None:
    assert loads_of(bank_of(spec("lora", "a", "lora", rank=2))) == []


def test_a_map_has_a_row_for_each_layer_and_tells_little_from_nothing() -> None:
    layers = [
        LayerLoad(module="model.layers.0.mlp", shares=(0.6, 0.396, 0.004, 0.0), entropy=1.0),
        LayerLoad(module="model.layers.10.mlp", shares=(0.3, 0.3, 0.3, 0.1), entropy=1.3),
    ]
    load = ExpertLoad(adapter="a-mix", task="a", examples=9, tokens=1234, top_k=2, layers=layers)
    (drawn,) = load_maps([load])
    assert [label for label, _ in drawn.rows] == ["0", "10"]
    first = drawn.rows[0][1]
    assert [cell.text for cell in first] == ["60", "40", "<1", "0"]
    assert [cell.dead for cell in first] == [False, False, False, True]
    assert first[0].strength == 1.0
    assert drawn.rows[1][1][3].strength == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    ("modules", "labels"),
    [
        (["h.3.mlp"], ["h.3.mlp"]),
        (["h.0.mlp", "h.1.mlp"], ["0", "1"]),
        (["encoder.0.mlp", "decoder.0.mlp"], ["encoder", "decoder"]),
        (["a.0.x", "a.0.y"], ["x", "y"]),
    ],
)
def test_labels_of_layers_leave_out_what_all_share(modules: list[str], labels: list[str]) -> None:
    assert layer_labels(modules) == labels
