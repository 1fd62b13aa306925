"""SLoRA: rounds of sparse values, then rounds of the LoRA, or fLoRA, that begins with what they sum up to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from flora_train.adapters.methods import Target
from flora_train.adapters.pool import Pool
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.federated.low_rank import Fit
from flora_train.federated.slora_modulation import factors_of_modulation
from flora_train.federated.slora_sparse import dense_update
from flora_train.federated.slora_svd import factors_of_update
from flora_train.federated.state import WITH_FACTORS, GlobalState, initial_state
from flora_train.federated.values import AdapterValues, LayerValues


@dataclass(frozen=True)
class SecondStage:
    """Where the second stage begins."""

    state: GlobalState
    left_out: Mapping[str, float]
    """Module -> Frobenius norm of the part of dW that the factors do not hold. It is left out for good."""
    norms: Mapping[str, float]
    """Module -> Frobenius norm of dW."""

    @property
    def relative_error(self) -> float:
        """Norm of all that is left out, relative to that of dW, over all layers; 0 if nothing was learnt."""
        left_out = sum(norm**2 for norm in self.left_out.values()) ** 0.5
        whole = sum(norm**2 for norm in self.norms.values()) ** 0.5
        return left_out / whole if whole else 0.0


def second_stage(
    first: GlobalState, pool: Pool, spec: AdapterSpec, *, seed: int, weight_of: Callable[[str], Tensor]
) -> SecondStage:
    """The adapter that begins with the first stage's dW, on the same base, and the head that it learnt.

    Args:
        first: The state after the first stage, of sparse adapters.
        pool: Of some client's adapter of the second stage.
        spec: The global adapter of the second stage: LoRA, which begins with the SVD of dW, or fLoRA, which
            begins with a fit of its modulation.
        seed: Seed of the rows of A for which dW has no singular value.
        weight_of: Module -> W0 [out, in]. It is called for fLoRA only.

    Returns:
        The state before the first round of the second stage, and what is left out.

    Raises:
        UserError: The adapters are not sparse and then LoRA or fLoRA, their layers differ, or the rank is
            above the number of singular values of a layer.
    """
    _check(first, pool, spec)
    start = initial_state(pool, spec, base=first.base, seed=seed)
    fits: dict[str, Fit] = {}
    layers: dict[str, LayerValues] = {}
    for module, params in start.values.layers.items():
        own, update = spec.at(module), _update_of(first, module, pool.targets[module])
        if spec.method == "lora":
            fit = factors_of_update(update, rank=own.rank, scaling=own.scaling, spare=params["A"])
        else:
            fit = factors_of_modulation(weight_of(module), update, rank=own.rank, offset=own.offset)
        fits[module] = fit
        layers[module] = params
        if fit.norm:
            layers[module] = {"A": fit.factors.A.to(params["A"]), "B": fit.factors.B.to(params["B"])}
    values = AdapterValues(layers, first.values.head or start.values.head)
    left_out = {module: fit.left_out for module, fit in fits.items()}
    norms = {module: fit.norm for module, fit in fits.items()}
    return SecondStage(replace(start, values=values), left_out, norms)


def _update_of(first: GlobalState, module: str, target: Target) -> Tensor:
    """dW [out, in] of one layer."""
    mask, values = first.spec.at(module).mask, first.values.layers[module]["v"]
    assert mask is not None
    shape = target.out_features, target.in_features
    return dense_update(values, mask.indices(*shape).to(values.device), shape)


def _check(first: GlobalState, pool: Pool, spec: AdapterSpec) -> None:
    if first.spec.method != "sparse":
        raise user_error("federated", first.spec.method, "SLoRA's second stage follows sparse adapters")
    if spec.method not in WITH_FACTORS:
        raise user_error("federated", spec.method, "SLoRA's second stage is of method lora or flora")
    if pool.targets.keys() != first.values.layers.keys():
        differ = sorted(pool.targets.keys() ^ first.values.layers.keys())[:3]
        raise user_error("target_modules", differ, "both stages of SLoRA must have the same layers")
