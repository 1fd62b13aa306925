"""Groups of layers that `target_modules` can name, whatever an architecture calls them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

QUERY_KEY = "query-key"
"""The query and key projections of attention, the layers that the fLoRA paper adapts in code models."""
GROUPS = (QUERY_KEY,)
"""Groups that may also stand in a list of module names."""

SEPARATE_QUERIES = "q_proj query q Wq wq q_lin query_proj project_q linear_q q_attn q_a_proj q_b_proj"
SEPARATE_KEYS = (
    "k_proj key k Wk wk k_lin key_proj project_k linear_k c_attn kv_proj kv_a_proj_with_mqa kv_b_proj"
)
QUERIES, KEYS = frozenset(SEPARATE_QUERIES.split()), frozenset(SEPARATE_KEYS.split())
"""Names of separate projections; the last of each are those of latent attention (DeepSeek-V2 and later)."""
ONE_MATRIX = (
    "c_attn qkv_proj query_key_value Wqkv wqkv qkv W_pack att_proj query_key in_proj_qkv in_proj_qkvz"
)
FUSED = frozenset(ONE_MATRIX.split())
"""Names of one matrix that computes queries and keys, and usually values."""
FUSED_IN_ATTENTION = frozenset(("in_proj",))
"""Names of such a matrix that state-space and convolution layers use for something else."""


def query_key_layers(layers: Iterable[str]) -> set[str]:
    """The layers among these module names that compute the queries and keys of attention.

    Separate projections count only where a module has both, so that RWKV's `key`, which belongs to no query,
    is not one of them.
    """
    by_parent: dict[str, set[str]] = defaultdict(set)
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        by_parent[parent].add(leaf)
    selected: set[str] = set()
    for parent, leaves in by_parent.items():
        chosen = leaves & FUSED
        if "attn" in parent or "attention" in parent:
            chosen |= leaves & FUSED_IN_ATTENTION
        if leaves & QUERIES and leaves & KEYS:
            chosen |= leaves & (QUERIES | KEYS)
        selected.update(f"{parent}.{leaf}".removeprefix(".") for leaf in chosen)
    return selected
