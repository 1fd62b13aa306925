"""What is the best low-rank stand-in for a change of a weight? For servers that only add B A, and for adapters that only multiply by it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

RIDGE = 1e-6
"""Of the mean of a least-squares system's diagonal: keeps a row without weights solvable."""

BRAKES = (0.1, 0.01, 1.0)
"""Of the mean squared weight: what is added to each before a change is divided by it."""
RANDOM_STARTS, SMALL = 5, 2**18
"""Random starts, of layers with at most so many weights: the local optima of larger ones differ little, and a start there takes long."""
FINISHED = 2
"""Starts of such a layer that are followed to the end: those that are best after a quarter of the rounds. Of a larger one the best alone."""


def energies(delta: Tensor) -> Tensor:
    """Squared singular values of [out, in], largest first, float64 [min(out, in)]."""
    wide = delta.double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0.0)


def truncated(delta: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, with B A the closest to [out, in] of this rank (Eckart & Young 1936); what a rank beyond
    min(out, in) adds is zero."""
    wide = delta.double()
    tall = wide.shape[0] > wide.shape[1]
    side = wide.T if tall else wide
    vectors = torch.linalg.eigh(side @ side.T)[1].flip(1)[:, :rank]
    others = vectors.T @ side
    scale = others.norm(dim=1).clamp_min(1e-300).sqrt()  # both factors get the root of the singular value
    B, A = vectors * scale, others / scale[:, None]
    if tall:
        B, A = A.T, B.T
    missing = rank - B.shape[1]
    return torch.nn.functional.pad(B, (0, missing)).float(), torch.nn.functional.pad(A, (0, 0, 0, missing)).float()


def relative_error(spectra: Sequence[Tensor], rank: int) -> float:
    """|deltas - their best of this rank| / |deltas|, Frobenius over all layers together. spectra: their `energies`."""
    total = sum(float(spectrum.sum()) for spectrum in spectra)
    left = sum(float(spectrum[rank:].sum()) for spectrum in spectra)
    return (left / total) ** 0.5 if total else 0.0


def smallest_rank(spectra: Sequence[Tensor], max_error: float) -> int:
    """The smallest rank, the same for all layers, whose `relative_error` is at most `max_error`."""
    low, high = 1, max(len(spectrum) for spectrum in spectra)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if relative_error(spectra, middle) <= max_error else (middle + 1, high)
    return low


def modulation(weight: Tensor, delta: Tensor, rank: int, rounds: int = 30) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, with weight * (B A) close to delta [out, in]: the start of a residual fLoRA.

    Low-rank approximation weighted by weight^2 has no closed form (Srebro & Jaakkola 2003), and alternating least squares ends in a local optimum:
    the best of several starts is taken, always the same ones, which is a close fit and not always the closest.
    """
    weights = weight.double().square()
    pulled = weight.double() * delta.double()
    first = max(1, rounds // 4)
    tried = [_improved(weights, pulled, A, first) for A in _starts(weights, pulled, rank)]
    tried.sort(key=lambda factors: _loss(weights, pulled, *factors))
    finished = FINISHED if weights.numel() <= SMALL else 1
    ended = [_improved(weights, pulled, A, rounds - first) for _, A in tried[:finished]]
    B, A = min(ended, key=lambda factors: _loss(weights, pulled, *factors))
    return B.float(), A.float()


def _starts(weights: Tensor, pulled: Tensor, rank: int) -> Iterator[Tensor]:
    """A [r, in] of the ratio delta / weight, truncated, with more or less of a brake where a weight is near 0, and random ones."""
    for brake in BRAKES:
        yield truncated(pulled / (weights + brake * weights.mean() + 1e-300), rank)[1].double()
    if weights.numel() <= SMALL:
        generator = torch.Generator().manual_seed(0)
        for _ in range(RANDOM_STARTS):
            yield torch.randn(rank, weights.shape[1], generator=generator, dtype=torch.float64).to(weights.device)


def _improved(weights: Tensor, pulled: Tensor, A: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
    """B and A after so many rounds of alternating least squares."""
    B = _solve(weights, pulled, A)
    for _ in range(rounds):
        A = _solve(weights.T, pulled.T, B.T).T
        B = _solve(weights, pulled, A)
    return B, A


def _loss(weights: Tensor, pulled: Tensor, B: Tensor, A: Tensor) -> float:
    """|weight * (B A) - delta|^2, less |delta|^2."""
    product = B @ A
    return float((weights * product.square() - 2.0 * pulled * product).sum().nan_to_num(nan=math.inf))


def _solve(weights: Tensor, pulled: Tensor, A: Tensor) -> Tensor:
    """For every row i the b_i with the least sum_j weights_ij (b_i a_j - delta_ij / weight_ij)^2. A: [r, in]. Returns [out, r]."""
    products = (A[:, None, :] * A[None, :, :]).flatten(0, 1)  # [r r, in]
    systems = (weights @ products.T).unflatten(1, (len(A), len(A)))
    diagonal = systems.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(dim=1, keepdim=True) + 1e-300
    return torch.linalg.solve(systems, pulled @ A.T)
