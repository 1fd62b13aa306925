"""The names of the parts of a routed adapter."""

from __future__ import annotations

SHARED = "shared"
"""Name of the part that holds the layers without experts."""


def expert_name(expert: int) -> str:
    """The name of the part that an expert, or a member of a gate, is."""
    return f"expert_{expert}"
