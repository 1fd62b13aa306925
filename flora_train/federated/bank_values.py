"""Values to and from the adapters of a bank, and residuals to its base."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flora_train.adapters.bank import AdapterBank
from flora_train.adapters.layer import AdapterLinear
from flora_train.adapters.pool import Pool
from flora_train.adapters.targets import dense_weight
from flora_train.config.errors import user_error
from flora_train.federated.fedex import Residual
from flora_train.federated.values import AdapterValues
from flora_train.models.quantized import is_quantized


@torch.no_grad()
def write_values(bank: AdapterBank, adapter: str, values: AdapterValues) -> None:
    """Set all parameters of an adapter of the bank."""
    for module, params in bank.parameters_of(adapter).items():
        for param, view in params.items():
            view.copy_(values.layers[module][param])
    for param, view in bank.head_of(adapter).items():
        view.copy_(values.head[param])


def read_values(bank: AdapterBank, adapter: str) -> AdapterValues:
    """A copy of all parameters of an adapter of the bank."""
    views = AdapterValues(bank.parameters_of(adapter), bank.head_of(adapter))
    return views.map(lambda name, tensor: tensor.detach().clone())


@torch.no_grad()
def add_to_base(bank: AdapterBank, residuals: Mapping[str, Residual]) -> None:
    """Add residuals to the weights of the base, in place. Raises UserError for a quantized layer."""
    for module, residual in residuals.items():
        layer = bank.model.get_submodule(module)
        assert isinstance(layer, AdapterLinear)
        if is_quantized(layer.base_layer):
            raise user_error("algorithm", "fedex", f"cannot change {module}, which is quantized")
        weight = adapted_weight(bank, module)
        weight.add_(residual.dense().to(weight))


def adapted_weight(bank: AdapterBank, module: str) -> Tensor:
    """The weight of the base's layer that adapters attach to, [out, in]. Writing into it changes the base."""
    layer = bank.model.get_submodule(module)
    assert isinstance(layer, AdapterLinear)
    return dense_weight(layer.base_layer, layer.target).detach()


def adapted_weights(bank: AdapterBank, pool: Pool) -> dict[str, Tensor]:
    """Module -> `adapted_weight`, of the layers of a pool."""
    return {module: adapted_weight(bank, module) for module in pool.targets}
