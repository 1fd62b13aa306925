"""Seeds of the random numbers that adapters draw."""

from __future__ import annotations

from hashlib import sha256

import torch


def seeded_generator(seed: int, *key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose state depends only on the seed and the key."""
    digest = sha256("\x1f".join(map(str, (seed, *key))).encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
