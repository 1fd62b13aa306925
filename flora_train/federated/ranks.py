"""Clients with other ranks than the server.

Products of any ranks are averaged as they are, and the server's result is sorted by singular values, so that
its first ranks are the closest matrix that a client of a lower rank can hold. Factors cannot be averaged
across ranks: they are padded with zeros, and a client of a lower rank gets the first rows and columns.
"""

from __future__ import annotations

from torch.nn import functional as F

from flora_train.federated.low_rank import Factors


def padded(part: Factors, rank: int, scaling: float) -> Factors:
    """The same matrix with factors of a rank that is not lower, and another scaling, which B makes up for."""
    missing = rank - part.rank
    if missing < 0:
        raise ValueError(f"factors of rank {part.rank} cannot be padded to rank {rank}")
    B = part.B
    if part.scaling != scaling:
        B = B * (part.scaling / scaling)
    return Factors(F.pad(part.A, (0, 0, 0, missing)), F.pad(B, (0, missing)), scaling)


def shortened(whole: Factors, rank: int, scaling: float) -> Factors:
    """The first ranks of factors, and another scaling: both factors make up for it alike."""
    A, B = whole.A[:rank], whole.B[:, :rank]
    if whole.scaling == scaling:
        return Factors(A, B, scaling)
    root = (whole.scaling / scaling) ** 0.5
    return Factors(A * root, B * root, scaling)
