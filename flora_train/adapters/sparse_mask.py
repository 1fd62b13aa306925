"""The mask of sparse adapters: which entries of each weight they change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from flora_train.config.errors import user_error


@dataclass(frozen=True)
class SparseMask:
    """A random mask, which does not depend on data: the same wherever density and seed are the same."""

    density: float
    """Share of the entries of each weight, in (0, 1]."""
    seed: int
    module: str = ""
    """The layer that the mask is of; empty where it stands for all layers."""

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise user_error("density", self.density, "must be above 0 and at most 1, such as 0.01")

    def count(self, size: int) -> int:
        """The masked entries of a weight of this many entries: at least one."""
        return max(1, round(self.density * size))

    def indices(self, outputs: int, inputs: int) -> Tensor:
        """The flat positions of the masked entries in a weight [out, in]: int64 [n], rising, on the CPU.

        They depend on seed, density, module and shape alone.
        """
        size = outputs * inputs
        key = "\x1f".join(map(str, (self.seed, "sparse mask", self.module, outputs, inputs)))
        generator = np.random.default_rng(np.frombuffer(sha256(key.encode()).digest(), dtype=np.uint32))
        chosen = generator.choice(size, self.count(size), replace=False, shuffle=False)
        return torch.from_numpy(np.sort(chosen).astype(np.int64))


def mask_digest(indices: Mapping[str, Tensor]) -> str:
    """SHA-256, as hexadecimal digits, of the masks of all layers. indices: layer -> int64 [n]."""
    digest = sha256()
    for name in sorted(indices):
        digest.update(f"{name} {len(indices[name])}\x1f".encode())
        digest.update(indices[name].cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()
