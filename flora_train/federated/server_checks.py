"""Which adapters an algorithm can average. All of it is known before any client trains."""

from __future__ import annotations

from collections.abc import Mapping

from flora_train.adapters.spec import AdapterSpec
from flora_train.config.errors import choices, did_you_mean, user_error
from flora_train.federated.state import WITH_FACTORS, GlobalState

ALGORITHMS: Mapping[str, tuple[str, ...]] = {
    "factor_mean": ("lora", "flora", "ia3", "sparse", "head"),
    "product_mean": ("lora", "flora", "ia3", "sparse", "head"),
    "fedex": ("lora",),
}
"""Algorithm -> the methods that it averages. Those without factors are averaged exactly by all of them."""


def check_algorithm(algorithm: str, spec: AdapterSpec) -> None:
    """Raises UserError if the algorithm is unknown, or cannot average adapters of this method."""
    if algorithm not in ALGORITHMS:
        hint = f"is one of {choices(ALGORITHMS)}.{did_you_mean(algorithm, ALGORITHMS)}"
        raise user_error("algorithm", algorithm, hint)
    if spec.method not in ALGORITHMS[algorithm]:
        able = choices(name for name, methods in ALGORITHMS.items() if spec.method in methods)
        raise user_error("algorithm", algorithm, f"cannot average {spec.method} ({able} can)")


def check_client(algorithm: str, spec: AdapterSpec, own: AdapterSpec) -> None:
    """Check that a client's adapter can be averaged with the others.

    Args:
        algorithm: A key of ALGORITHMS.
        spec: The global adapter.
        own: The client's.

    Raises:
        UserError: Its method differs, its rank is above that of the global adapter, or the algorithm needs
            adapters that are alike.
    """
    if own.method != spec.method:
        raise user_error(own.name, own.method, f"the global adapter is of method {spec.method}")
    if spec.method not in WITH_FACTORS:
        return
    if own.rank > spec.rank:
        raise user_error(own.name, own.rank, f"its rank is above {spec.rank}, that of the global adapter")
    if algorithm == "fedex" and (own.rank, own.scaling) != (spec.rank, spec.scaling):
        hint = f"fedex needs clients of rank {spec.rank} and one alpha: product_mean takes any ranks"
        raise user_error(own.name, own.rank, hint)
    if algorithm == "factor_mean" and spec.method == "flora" and own.offset != spec.offset:
        hint = "factors of pure and residual fLoRA cannot be averaged: use product_mean"
        raise user_error(own.name, own.offset, hint)


def check_ranks(algorithm: str, state: GlobalState) -> None:
    """Raises UserError if some layer has fewer singular values than the global adapter has ranks."""
    if algorithm != "product_mean" or state.spec.method not in WITH_FACTORS:
        return
    for module, params in state.values.layers.items():
        rank, outputs, inputs = len(params["A"]), len(params["B"]), params["A"].shape[1]
        most = min(outputs, inputs)
        if rank > most:
            raise user_error("rank", rank, f"{module} is {outputs} x {inputs}: it has {most} singular values")
