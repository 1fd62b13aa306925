"""Federated full fine-tuning: the average of what each client's own loop gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.config.errors import UserError
from flora_train.data.labels.split import LabelSplit
from flora_train.federated.bank_values import read_values, write_values
from flora_train.federated.full_finetuning import FullFineTuning, _Average
from flora_train.federated.local_training import Client, LocalSteps
from flora_train.federated.rounds import RoundOptions
from flora_train.federated.specs import client_spec
from flora_train.federated.values import AdapterValues
from tests.unit.federated.harness import NAMES, clients_of, federated_trainer, server_spec

RATES = {"adamw": 2e-3, "sgd": 0.1}


def make_full(folder: Path, optimizer: str = "adamw", **options: Any) -> FullFineTuning:
    specs = [
        client_spec(server_spec("head", lr=RATES[optimizer], max_grad_norm=None), name) for name in NAMES
    ]
    trainer = federated_trainer(folder, specs, optimizer=optimizer)
    return FullFineTuning(trainer, clients_of(specs), RoundOptions(local=LocalSteps(4), **options))


def trained_by_hand(full: FullFineTuning, client: Client, optimizer: str) -> dict[str, Tensor]:
    """torch's own optimizer on all weights and the head, example by example, in a loop without a bank."""
    model: Any = full.trainer.model
    start = {name: own.detach().clone() for name, own in model.named_parameters()}
    (pool,) = full.bank.pools
    heads = {name: own.clone().requires_grad_() for name, own in full.head.tensors()}
    model.requires_grad_(True)
    parameters = [*model.parameters(), *heads.values()]
    kind: Any = torch.optim.SGD if optimizer == "sgd" else torch.optim.AdamW
    loop = kind(parameters, lr=RATES[optimizer], weight_decay=0.0)
    split = full.trainer.tasks[client.name].train
    assert isinstance(split, LabelSplit)
    for batch in full.options.local.batches(client, 0, full.options.seed):
        losses = []
        for example in batch:
            tokens = torch.tensor(split.example(example)[None], dtype=torch.long)
            states = model.base_model(input_ids=tokens).last_hidden_state
            own = {name.removeprefix("head."): tensor[None] for name, tensor in heads.items()}
            assert pool.head is not None
            logits = pool.head(states, torch.tensor([tokens.shape[1]]), {n: t[0] for n, t in own.items()})
            target = torch.tensor([split.target(example)])
            losses.append(torch.nn.functional.cross_entropy(logits, target))
        torch.stack(losses).mean().backward()
        loop.step()
        loop.zero_grad()
    found = {name: own.detach().clone() for name, own in [*model.named_parameters(), *heads.items()]}
    model.requires_grad_(False)
    with torch.no_grad():
        for name, own in model.named_parameters():
            own.copy_(start[name])
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_round_averages_what_each_client_s_own_loop_gives(tmp_path: Path, optimizer: str) -> None:
    full = make_full(tmp_path, optimizer, clients_per_round=2)
    names = full.options.choose(full.clients, 0)
    clients = [full.clients[name] for name in names]
    by_hand = [trained_by_hand(full, client, optimizer) for client in clients]
    start = {name: own.detach().clone() for name, own in full.trainer.model.named_parameters()}
    record = full.round()
    sizes = [len(client.examples) for client in clients]
    now = {**dict(full.trainer.model.named_parameters()), **dict(full.head.tensors())}
    moved = 0.0
    for name, tensor in now.items():
        pairs = zip(by_hand, sizes, strict=True)
        expected = sum(values[name] * size for values, size in pairs) / sum(sizes)
        torch.testing.assert_close(tensor, expected, rtol=0, atol=2e-5)
        if name in start:
            moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-3
    travelled = record.outcomes[0].bytes_up
    assert travelled <= sum(tensor.nbytes for tensor in now.values())
    assert travelled > 0.5 * sum(tensor.nbytes for tensor in now.values())
    assert record.bytes_up == record.bytes_down == 2 * travelled


def test_losses_fall_and_the_base_is_frozen_between_rounds(tmp_path: Path) -> None:
    full = make_full(tmp_path)
    losses = [full.round().loss for _ in range(3)]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0]
    assert not any(own.requires_grad for own in full.trainer.model.parameters())
    assert all(own.grad is None for own in full.trainer.model.parameters())
    full.load_global_head(full.clients["client_0"].adapter)
    loaded = read_values(full.bank, full.clients["client_0"].adapter)
    assert loaded.digest() == full.head.digest()


def test_a_client_that_goes_wrong_changes_nothing_for_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the head that one client begins with: the mean is that of the others."""

    def write(bank: AdapterBank, adapter: str, values: AdapterValues) -> None:
        write_values(bank, adapter, values)
        if adapter == "client_1-head":
            bank.row(bank.ids[adapter]).fill_(float("nan"))

    full, others = make_full(tmp_path), make_full(tmp_path)
    del others.clients["client_1"]
    others.round()
    monkeypatch.setattr("flora_train.federated.full_finetuning.write_values", write)
    record = full.round()
    assert [outcome.status for outcome in record.outcomes] == ["accepted", "excluded", "accepted", "accepted"]
    assert "none of its 2 steps had a finite loss" in record.outcomes[1].reason
    pairs = zip(full.trainer.model.parameters(), others.trainer.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    assert full.head.digest() == others.head.digest()
    del full.clients["client_0"], full.clients["client_2"], full.clients["client_3"]
    with pytest.raises(UserError, match="0 of 1 clients have weights that can be used: client_1: none"):
        full.round()


def test_full_finetuning_needs_heads(tmp_path: Path) -> None:
    specs = [client_spec(server_spec("lora"), name) for name in NAMES]
    trainer = federated_trainer(tmp_path, specs)
    with pytest.raises(UserError, match="needs adapters of method head"):
        FullFineTuning(trainer, clients_of(specs), RoundOptions())


def test_a_client_that_did_not_train_a_parameter_counts_with_its_first_value() -> None:
    average = _Average({"used": torch.zeros(2), "rare": torch.full((2,), 4.0)})
    average.add({"used": torch.ones(2), "rare": torch.full((2,), 8.0)}, 1)
    average.add({"used": torch.full((2,), 5.0)}, 3)
    means = average.means()
    assert means["used"].tolist() == [4.0, 4.0]
    assert means["rare"].tolist() == [5.0, 5.0]
