"""The specifications of clients' adapters, made from one specification."""

from __future__ import annotations

from dataclasses import replace

from flora_train.adapters.sparse_mask import SparseMask
from flora_train.adapters.spec import AdapterSpec, scaling_of
from flora_train.config.errors import user_error


def client_spec(spec: AdapterSpec, client: str, rank: int | None = None) -> AdapterSpec:
    """The adapter of one client, whose examples are the task of its name.

    Args:
        spec: The adapter that all clients have.
        client: Name of the client and of its task.
        rank: A rank of its own, with the same alpha / rank. Default: that of `spec`.

    Returns:
        The specification.

    Raises:
        UserError: The method has no rank, or `spec` has ranks of its own for some layers.
    """
    own = replace(spec, name=f"{client}-{spec.family}", task=client)
    if rank is None or rank == spec.rank:
        return own
    if not spec.rank or spec.rank_pattern:
        raise user_error("rank", rank, f"clients of {spec.family} cannot have ranks of their own")
    alpha = spec.alpha * rank / spec.rank
    return replace(own, rank=rank, alpha=alpha, scaling=scaling_of(rank, alpha, spec.rslora))


def sparse_spec(spec: AdapterSpec, *, density: float, seed: int, lr: float | None = None) -> AdapterSpec:
    """The sparse adapter of SLoRA's first stage, with the layers and the optimization of `spec`.

    Args:
        spec: The adapter of the second stage.
        density: Share of the entries of each weight, in (0, 1].
        seed: Seed of the mask.
        lr: Learning rate of the first stage. Default: that of `spec`.

    Returns:
        The specification; its family is that of `spec` with `_sparse` added.

    Raises:
        UserError: The density is outside (0, 1].
    """
    family = f"{spec.family}_sparse"
    return replace(
        spec,
        name=f"{spec.task}-{family}",
        family=family,
        method="sparse",
        rank=0,
        rank_pattern=(),
        alpha_pattern=(),
        dropout=0.0,
        lr_ratio=1.0,
        lr=lr or spec.lr,
        mask=SparseMask(density, seed),
    )
