"""Low-rank approximations of a weight change: the closest B A, and the closest weight * (B A)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

RIDGE = 1e-6
"""Ridge of a least-squares system, relative to the mean of its diagonal: keeps a row without weights
solvable."""

DAMPINGS = (0.1, 0.01, 1.0)
"""Relative to the mean squared weight: added to each squared weight before a change is divided by it."""

RANDOM_STARTS = 5
SMALL_LAYER = 2**18
"""Random starts are tried for layers of at most this many weights: in larger layers a start takes long, and
the local optima differ little."""

FINISHED_STARTS = 2
"""Starts of a small layer that run for all rounds: the best after a quarter of the rounds. A larger layer
finishes only one."""


def energies(delta: Tensor) -> Tensor:
    """Squared singular values of delta [out, in], largest first, float64 [min(out, in)]."""
    wide = delta.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32: B A is the matrix of rank r closest to delta [out, in] (Eckart &
    Young 1936).

    Ranks beyond min(out, in) are zero.
    """
    wide = delta.double()
    tall = wide.shape[0] > wide.shape[1]
    side = wide.T if tall else wide
    vectors = torch.linalg.eigh(side @ side.T)[1].flip(1)[:, :rank]
    others = vectors.T @ side
    # Both factors get the root of the singular value.
    scale = others.norm(dim=1).clamp_min(1e-300).sqrt()
    B, A = vectors * scale, others / scale[:, None]
    if tall:
        B, A = A.T, B.T
    missing = rank - B.shape[1]
    padded_B = torch.nn.functional.pad(B, (0, missing))
    padded_A = torch.nn.functional.pad(A, (0, 0, 0, missing))
    return padded_B.float(), padded_A.float()


def relative_error(spectra: Sequence[Tensor], rank: int) -> float:
    """|deltas - closest matrices of this rank| / |deltas|, Frobenius over all layers. spectra: `energies` of
    each layer."""
    total = sum(float(spectrum.sum()) for spectrum in spectra)
    remaining = sum(float(spectrum[rank:].sum()) for spectrum in spectra)
    return relative_norm(remaining, total)


def relative_norm(squared_error: float, squared_norm: float) -> float:
    """|error| / |matrix| from the squares; 0 for a matrix of zeros."""
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def smallest_rank(spectra: Sequence[Tensor], max_error: float) -> int:
    """The smallest rank, the same for all layers, whose `relative_error` is at most `max_error`."""
    low, high = 1, max(len(spectrum) for spectrum in spectra)
    while low < high:
        middle = (low + high) // 2
        if relative_error(spectra, middle) <= max_error:
            high = middle
        else:
            low = middle + 1
    return low


def modulation(weight: Tensor, delta: Tensor, rank: int, *, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, with weight * (B A) close to delta [out, in].

    Low-rank approximation weighted by weight^2 has no closed form (Srebro & Jaakkola 2003), and alternating
    least squares converges to a local optimum. The result is the best of several starts, always the same
    ones: close, but not always the closest.
    """
    weights = weight.double().square()
    pulled = weight.double() * delta.double()
    first = max(1, rounds // 4)
    tried = [_least_squares(weights, pulled, A, rounds=first) for A in _starts(weights, pulled, rank)]
    tried.sort(key=lambda factors: _loss(weights, pulled, *factors))
    finished = FINISHED_STARTS if weights.numel() <= SMALL_LAYER else 1
    ended = [_least_squares(weights, pulled, A, rounds=rounds - first) for _, A in tried[:finished]]
    B, A = min(ended, key=lambda factors: _loss(weights, pulled, *factors))
    return B.float(), A.float()


def _starts(weights: Tensor, pulled: Tensor, rank: int) -> Iterator[Tensor]:
    """Initial A [r, in]: the truncated ratio delta / weight, damped where a weight is near 0, and random
    values."""
    for damping in DAMPINGS:
        ratio = pulled / (weights + damping * weights.mean() + 1e-300)
        yield truncated(ratio, rank)[1].double()
    if weights.numel() <= SMALL_LAYER:
        generator = torch.Generator().manual_seed(0)
        for _ in range(RANDOM_STARTS):
            yield torch.randn(rank, weights.shape[1], generator=generator, dtype=torch.float64).to(
                weights.device
            )


def _least_squares(weights: Tensor, pulled: Tensor, A: Tensor, *, rounds: int) -> tuple[Tensor, Tensor]:
    """B and A after this number of rounds of alternating least squares."""
    B = _solve(weights, pulled, A)
    for _ in range(rounds):
        A = _solve(weights.T, pulled.T, B.T).T
        B = _solve(weights, pulled, A)
    return B, A


def _loss(weights: Tensor, pulled: Tensor, B: Tensor, A: Tensor) -> float:
    """|weight * (B A) - delta|^2 - |delta|^2."""
    product = B @ A
    return float((weights * product.square() - 2.0 * pulled * product).sum().nan_to_num(nan=math.inf))


def _solve(weights: Tensor, pulled: Tensor, A: Tensor) -> Tensor:
    """B [out, r] whose row b_i minimises sum_j weights_ij (b_i a_j - delta_ij / weight_ij)^2. A: [r, in]."""
    products = (A[:, None, :] * A[None, :, :]).flatten(0, 1)  # [r r, in]
    systems = (weights @ products.T).unflatten(1, (len(A), len(A)))
    diagonal = systems.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(dim=1, keepdim=True) + 1e-300
    return torch.linalg.solve(systems, pulled @ A.T)
