"""SLoRA: both stages in one bank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flora_train.adapters.targets import dense_weight
from flora_train.config.errors import UserError
from flora_train.federated.local_training import LocalSteps
from flora_train.federated.rounds import RoundOptions
from flora_train.federated.simulation import Simulation
from flora_train.federated.slora import second_stage
from flora_train.federated.slora_sparse import dense_update
from flora_train.federated.specs import client_spec
from flora_train.federated.state import factors_of
from tests.unit.federated.harness import NAMES, clients_of, federated_trainer, server_spec, start_of


def both_stages(folder: Path, method: str, **options: Any) -> tuple[Simulation, Any, Any]:
    """The first stage's simulation, the global specification of the second, and its clients' ones."""
    sparse, dense = server_spec("sparse", lr=0.02), server_spec(method, **options)
    first = [client_spec(sparse, name) for name in NAMES]
    second = [client_spec(dense, name) for name in NAMES]
    trainer = federated_trainer(folder, [*first, *second])
    rounds = RoundOptions("factor_mean", local=LocalSteps(4))
    return Simulation(trainer, clients_of(first), start_of(trainer, sparse), options=rounds), dense, second


def weights_of(simulation: Simulation) -> Any:
    def weight_of(module: str) -> Tensor:
        layer: Any = simulation.bank.model.get_submodule(module)
        return dense_weight(layer.base_layer, layer.target)

    return weight_of


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_the_second_stage_continues_from_the_first_on_the_same_base(tmp_path: Path, method: str) -> None:
    simulation, dense, specs = both_stages(tmp_path, method)
    weight_of = weights_of(simulation)
    before = {module: weight_of(module).clone() for module in simulation.state.values.layers}
    losses = [record.loss for record in simulation.run(4)]
    assert losses[-1] is not None
    assert losses[0] is not None
    assert losses[-1] < losses[0]
    pool = next(p for p in simulation.bank.pools if p.method.name == method)
    begun = second_stage(simulation.state, pool, dense, seed=0, weight_of=weight_of)
    assert 0.1 < begun.relative_error < 1
    for module, params in begun.state.values.layers.items():
        mask = simulation.state.spec.at(module).mask
        assert mask is not None
        assert torch.equal(weight_of(module), before[module])
        shape = tuple(before[module].shape)
        update = dense_update(simulation.state.values.layers[module]["v"], mask.indices(*shape), shape)
        product = factors_of(params, dense.at(module)).dense()
        change = product if method == "lora" else before[module] * product
        assert float((update - change).norm()) == pytest.approx(begun.left_out[module], rel=1e-4)
        assert begun.left_out[module] < begun.norms[module]
    assert begun.state.values.head.keys() == simulation.state.values.head.keys()
    for name, tensor in simulation.state.values.head.items():
        assert torch.equal(begun.state.values.head[name], tensor)
    options = replace(simulation.options, algorithm="product_mean")
    further = Simulation(simulation.trainer, clients_of(specs), begun.state, options=options)
    record = further.round()
    assert {outcome.status for outcome in record.outcomes} == {"accepted"}
    assert record.loss is not None
    assert record.loss < losses[0]


@pytest.mark.parametrize("method", ["lora", "flora"])
def test_a_first_stage_that_learnt_nothing_begins_the_second_as_usual(tmp_path: Path, method: str) -> None:
    simulation, dense, _ = both_stages(tmp_path, method)
    pool = next(p for p in simulation.bank.pools if p.method.name == method)
    begun = second_stage(simulation.state, pool, dense, seed=0, weight_of=weights_of(simulation))
    assert begun.relative_error == 0.0
    usual = start_of(simulation.trainer, dense).values
    for module, params in usual.layers.items():
        assert torch.equal(begun.state.values.layers[module]["A"], params["A"])
        assert not begun.state.values.layers[module]["B"].any()


def test_stages_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    simulation, dense, _ = both_stages(tmp_path, "lora")
    sparse_pool, pool = simulation.bank.pools
    options: Any = {"seed": 0, "weight_of": weights_of(simulation)}
    with pytest.raises(UserError, match="follows sparse adapters"):
        second_stage(start_of(simulation.trainer, dense), pool, dense, **options)
    with pytest.raises(UserError, match="is of method lora or flora"):
        second_stage(simulation.state, sparse_pool, simulation.state.spec, **options)
    large = replace(dense, rank=33)
    with pytest.raises(UserError, match="has 32 singular values"):
        second_stage(simulation.state, pool, large, **options)
    some, other, _ = both_stages(tmp_path, "lora", target_modules=["query"])
    with pytest.raises(UserError, match="both stages of SLoRA must have the same layers"):
        second_stage(simulation.state, some.bank.pools[1], other, **options)
