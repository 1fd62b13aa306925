"""SLoRA: rounds of sparse values, then rounds of the LoRA that their singular value decomposition begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from flora_train.adapters.pool import Pool
from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import user_error
from flora_train.federated.low_rank import Fit
from flora_train.federated.slora_svd import factors_of_update
from flora_train.federated.state import GlobalState, initial_state
from flora_train.federated.values import AdapterValues, LayerValues


@dataclass(frozen=True)
class SecondStage:
    """Where the second stage begins."""

    state: GlobalState
    left_out: Mapping[str, float]
    """Module -> Frobenius norm of the part of dW that the LoRA does not hold. It is left out for good."""
    norms: Mapping[str, float]
    """Module -> Frobenius norm of dW."""

    @property
    def relative_error(self) -> float:
        """Norm of all that is left out, relative to that of dW, over all layers; 0 if nothing was learnt."""
        left_out = sum(norm**2 for norm in self.left_out.values()) ** 0.5
        whole = sum(norm**2 for norm in self.norms.values()) ** 0.5
        return left_out / whole if whole else 0.0


def second_stage(first: GlobalState, pool: Pool, spec: AdapterSpec, *, seed: int) -> SecondStage:
    """The LoRA that begins with the SVD of the first stage's dW, and the head that the first stage learnt.

    Args:
        first: The state after the first stage, of sparse adapters.
        pool: Of some client's LoRA.
        spec: The global LoRA.
        seed: Seed of the rows of A for which dW has no singular value.

    Returns:
        The state before the first round of the second stage, on the same base, and what is left out.

    Raises:
        UserError: The adapters are not sparse and LoRA, their layers differ, or the rank is above the number
            of singular values of a layer.
    """
    _check(first, pool, spec)
    start = initial_state(pool, spec, base=first.base, seed=seed)
    fits: dict[str, Fit] = {}
    layers: dict[str, LayerValues] = {}
    for module, params in start.values.layers.items():
        target, own, mask = pool.targets[module], spec.at(module), first.spec.at(module).mask
        assert mask is not None
        values = first.values.layers[module]["v"]
        indices = mask.indices(target.out_features, target.in_features).to(values.device)
        shape = target.out_features, target.in_features
        fit = factors_of_update(
            values, indices, shape, rank=own.rank, scaling=own.scaling, spare=params["A"]
        )
        fits[module] = fit
        layers[module] = {"A": fit.factors.A.to(params["A"]), "B": fit.factors.B.to(params["B"])}
    values_now = AdapterValues(layers, first.values.head or start.values.head)
    left_out = {module: fit.left_out for module, fit in fits.items()}
    norms = {module: fit.norm for module, fit in fits.items()}
    return SecondStage(replace(start, values=values_now), left_out, norms)


def _check(first: GlobalState, pool: Pool, spec: AdapterSpec) -> None:
    if first.spec.method != "sparse":
        raise user_error("federated", first.spec.method, "SLoRA's second stage follows sparse adapters")
    if spec.method != "lora":
        raise user_error("federated", spec.method, "SLoRA's second stage is of method lora")
    if pool.targets.keys() != first.values.layers.keys():
        differ = sorted(pool.targets.keys() ^ first.values.layers.keys())[:3]
        raise user_error("target_modules", differ, "both stages of SLoRA must have the same layers")
