"""The server's step: the updates of a round become the next global adapter, by one of three algorithms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from flora_train.adapters.spec import AdapterSpec
from flora_train.federated.factor_mean import mean_of_factors
from flora_train.federated.fedex import Residual, mean_with_residual
from flora_train.federated.low_rank import Factors
from flora_train.federated.modulation_mean import mean_of_modulations
from flora_train.federated.product_mean import mean_of_products
from flora_train.federated.scale_mean import mean_of_scales
from flora_train.federated.server_checks import check_algorithm, check_client
from flora_train.federated.slora_sparse import mean_of_values
from flora_train.federated.state import WITH_FACTORS, GlobalState, base_with, factors_of
from flora_train.federated.updates import ClientUpdate
from flora_train.federated.values import AdapterValues, LayerValues
from flora_train.federated.weights import shares_of, weighted_mean


@dataclass(frozen=True)
class Aggregation:
    """The result of a server step."""

    state: GlobalState
    left_out: Mapping[str, float]
    """Module -> what the rank left out of the mean, relative to its norm; empty where nothing is fitted."""


@dataclass(frozen=True)
class _Layer:
    """One layer after a server step."""

    params: LayerValues
    left_out: float | None = None
    residual: Residual | None = None


def aggregate(state: GlobalState, updates: Sequence[ClientUpdate], algorithm: str) -> Aggregation:
    """The next global state.

    Args:
        state: That the clients began with.
        updates: That can be used (see `sort_updates`), in an order that does not depend on arrival.
        algorithm: A key of ALGORITHMS.

    Returns:
        The state, and how much of the mean its rank cannot hold. Heads are averaged as they are.

    Raises:
        UserError: There is no update, the algorithm cannot average this method or these ranks.
    """
    check_algorithm(algorithm, state.spec)
    for update in updates:
        check_client(algorithm, state.spec, update.spec)
    shares = shares_of([update.examples for update in updates])
    layers: dict[str, LayerValues] = {}
    left_out: dict[str, float] = {}
    residuals: dict[str, Residual] = {}
    for module, params in state.values.layers.items():
        clients = [update.values.layers[module] for update in updates]
        specs = [update.spec.at(module) for update in updates]
        layer = _aggregate_layer(
            params, clients, specs, shares=shares, spec=state.spec.at(module), algorithm=algorithm
        )
        layers[module] = {name: layer.params[name].to(params[name]) for name in params}
        if layer.left_out is not None:
            left_out[module] = layer.left_out
        if layer.residual is not None:
            residuals[module] = layer.residual
    head: dict[str, Tensor] = {}
    for name, tensor in state.values.head.items():
        head[name] = weighted_mean([update.values.head[name] for update in updates], shares).to(tensor)
    values, base = AdapterValues(layers, head), base_with(state.base, residuals)
    return Aggregation(replace(state, values=values, base=base, residuals=residuals), left_out)


def _aggregate_layer(
    params: LayerValues,
    clients: Sequence[LayerValues],
    specs: Sequence[AdapterSpec],
    *,
    shares: Sequence[float],
    spec: AdapterSpec,
    algorithm: str,
) -> _Layer:
    if spec.method == "ia3":
        return _Layer({"l": mean_of_scales([client["l"] for client in clients], shares)})
    if spec.method == "sparse":
        return _Layer({"v": mean_of_values([client["v"] for client in clients], shares)})
    assert spec.method in WITH_FACTORS
    parts = [factors_of(client, own) for client, own in zip(clients, specs, strict=True)]
    own_scaling = factors_of(params, spec).scaling
    if algorithm == "fedex":
        mean, residual = mean_with_residual(parts, shares)
        return _Layer(_params(mean), residual=residual)
    if algorithm == "factor_mean":
        return _Layer(_params(mean_of_factors(parts, shares, rank=spec.rank, scaling=own_scaling)))
    if spec.method == "flora":
        offsets = [own.offset for own in specs]
        fit = mean_of_modulations(
            parts, offsets, shares, rank=spec.rank, offset=spec.offset, spare=params["A"]
        )
    else:
        fit = mean_of_products(parts, shares, rank=spec.rank, scaling=own_scaling, spare=params["A"])
    return _Layer(_params(fit.factors), left_out=fit.relative_error)


def _params(factors: Factors) -> LayerValues:
    return {"A": factors.A, "B": factors.B}
