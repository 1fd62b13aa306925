"""Low-rank matrices as factors: sums of them, and the closest one of a smaller rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flora_train.config.errors import user_error

NEGLIGIBLE = 1e-12
"""A singular value below this share of the largest one is a rounding error of float64."""


@dataclass(frozen=True)
class Factors:
    """The matrix scaling * B A, [out, in]."""

    A: Tensor
    """[r, in]."""
    B: Tensor
    """[out, r]."""
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return len(self.A)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.A.nbytes + self.B.nbytes

    def dense(self) -> Tensor:
        """scaling * B A in float64."""
        return self.scaling * (self.B.double() @ self.A.double())


@dataclass(frozen=True)
class Fit:
    """The closest matrix of a given rank."""

    factors: Factors
    left_out: float
    """Frobenius norm of what the rank cannot hold."""
    norm: float
    """Frobenius norm of the matrix that was fitted."""

    @property
    def relative_error(self) -> float:
        """left_out / norm; 0 for a matrix of zeros."""
        return self.left_out / self.norm if self.norm else 0.0


def weighted_sum(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_k weights_k scaling_k B_k A_k as one pair of factors, exact: [B_1 .. B_K] and [A_1; ..; A_K].

    Args:
        parts: Matrices of one shape and of any ranks.
        weights: One per matrix.

    Returns:
        Factors of the sum of all ranks, in float64.
    """
    A = torch.cat([part.A.double() for part in parts])
    columns = []
    for part, weight in zip(parts, weights, strict=True):
        columns.append(part.B.double() * (weight * part.scaling))
    return Factors(A, torch.cat(columns, dim=1))


def fit_rank(matrix: Factors | Tensor, rank: int, *, scaling: float, spare: Tensor | None = None) -> Fit:
    """The closest matrix of a rank, by its singular value decomposition (Eckart and Young).

    Factors of a low rank are never multiplied: with B = Q_B R_B and A^T = Q_A R_A, the decomposition of the
    small R_B R_A^T is enough.

    Args:
        matrix: Factors, or a dense [out, in].
        rank: Rank of the result.
        scaling: Of the result: scaling * B A is the closest matrix.
        spare: [rank, in]. Where the matrix has no further singular value, the row of A is that of `spare`,
            and the column of B is 0: two zeros would never leave zero in training. Default: rows of zeros.

    Returns:
        B = U sqrt(S / scaling) and A = sqrt(S / scaling) V^T in float64, by falling singular value, with what
        they leave out.

    Raises:
        UserError: The rank is above min(out, in).
    """
    outputs, inputs = matrix.shape
    if not 1 <= rank <= min(outputs, inputs):
        hint = (
            f"a matrix of {outputs} x {inputs} has {min(outputs, inputs)} singular values: use at most these"
        )
        raise user_error("rank", rank, hint)
    U, S, V = _decompose(matrix)
    smallest = NEGLIGIBLE * S[0]
    kept = S[: min(rank, int((smallest < S).sum()))]
    roots = (kept / scaling).sqrt()
    A, B = U.new_zeros(rank, inputs), U.new_zeros(outputs, rank)
    if spare is not None:
        A.copy_(spare)
    A[: len(kept)] = roots[:, None] * V[:, : len(kept)].T
    B[:, : len(kept)] = U[:, : len(kept)] * roots
    return Fit(Factors(A, B, scaling), float(S[len(kept) :].norm()), float(S.norm()))


def _decompose(matrix: Factors | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, k], S [k] falling and V [in, k] in float64."""
    if isinstance(matrix, Factors) and matrix.rank < min(matrix.shape):
        left, right = torch.linalg.qr(matrix.B.double()), torch.linalg.qr(matrix.A.double().T)
        U, S, Vh = torch.linalg.svd(matrix.scaling * (left.R @ right.R.T), full_matrices=False)
        return left.Q @ U, S, right.Q @ Vh.T
    dense = matrix.dense() if isinstance(matrix, Factors) else matrix.double()
    U, S, Vh = torch.linalg.svd(dense, full_matrices=False)
    return U, S, Vh.T
