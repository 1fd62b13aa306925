"""The server's state: the global adapter, what the base is by now, and what each client gets of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

import torch
from torch import Tensor

from flora_train.adapters.pool import Pool
from flora_train.adapters.sparse_mask import mask_digest
from flora_train.adapters.spec import AdapterSpec
from flora_train.federated.fedex import Residual
from flora_train.federated.low_rank import Factors
from flora_train.federated.ranks import shortened
from flora_train.federated.updates import Expected, shapes_of
from flora_train.federated.values import AdapterValues, LayerValues

WITH_FACTORS = ("lora", "flora")
"""Methods whose layers have A and B."""


@dataclass(frozen=True)
class GlobalState:
    """What the server knows after a round."""

    spec: AdapterSpec
    """The global adapter, of the largest rank."""
    values: AdapterValues
    base: str
    """Fingerprint of the base with all residuals that were added to it."""
    mask: str | None = None
    """Digest of the mask, of sparse adapters."""
    residuals: Mapping[str, Residual] = field(default_factory=dict)
    """Module -> what the last round adds to its weight (FedEx)."""

    @property
    def residual_bytes(self) -> int:
        """Bytes of the residuals, which every client gets beside the values."""
        return sum(residual.nbytes for residual in self.residuals.values())


def initial_state(pool: Pool, spec: AdapterSpec, *, base: str, seed: int) -> GlobalState:
    """The state before the first round: the identity, with the initial values that the seed gives.

    Args:
        pool: Of some client's adapter: the layers and the head of the global one.
        spec: The global adapter. Its name is what the initial values depend on, beside the seed.
        base: Fingerprint of the base.
        seed: Seed of the initial values.

    Returns:
        The state, on the CPU.
    """
    own = Pool(spec.method, [spec], pool.targets, pool.head)
    own.allocate(torch.device("cpu"))
    own.initialise(0, seed)
    return GlobalState(spec, AdapterValues(own.row(0), own.head_row(0)), base, mask_of_pool(own))


def mask_of_pool(pool: Pool) -> str | None:
    """Digest of the masks of all layers, which a client states with its values; None without masks."""
    masks: dict[str, Tensor] = {}
    for module in pool.targets:
        if "indices" in pool.constants(module):
            masks[module] = pool.constants(module)["indices"]
    return mask_digest(masks) if masks else None


def factors_of(params: LayerValues, spec: AdapterSpec) -> Factors:
    """The factors of one layer. spec: as it is on that layer. fLoRA's have no scaling."""
    scaling = spec.scaling if spec.method == "lora" else 1.0
    return Factors(params["A"], params["B"], scaling)


def values_for(state: GlobalState, spec: AdapterSpec) -> AdapterValues:
    """What a client with this adapter gets: the global values, or their first ranks."""
    if state.spec.method not in WITH_FACTORS:
        return state.values
    layers: dict[str, LayerValues] = {}
    for module, params in state.values.layers.items():
        own, whole = spec.at(module), state.spec.at(module)
        part = shortened(factors_of(params, whole), own.rank, factors_of(params, own).scaling)
        layers[module] = {"A": part.A, "B": part.B}
    return AdapterValues(layers, state.values.head)


def expected_of(state: GlobalState, spec: AdapterSpec) -> Expected:
    """What the update of a client with this adapter must agree with."""
    shapes = shapes_of(values_for(state, spec))
    return Expected(shapes, state.base, state.mask, state.spec.method)


def base_with(base: str, residuals: Mapping[str, Residual]) -> str:
    """The fingerprint of a base to which these residuals were added. Without residuals it stays."""
    if not residuals:
        return base
    found = sha256(base.encode())
    for module in sorted(residuals):
        tensors = {str(place): tensor for place, tensor in enumerate(residuals[module].tensors)}
        found.update(AdapterValues({module: tensors}).digest().encode())
    return found.hexdigest()
