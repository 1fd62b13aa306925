"""Malformed and unusual requests for `serving_load.py`: what a server may be sent, and how it may answer."""

from __future__ import annotations

from typing import Any

REFUSED = frozenset(range(400, 500))
"""Statuses of a request that must be refused."""
ANSWERED = frozenset({200})
EITHER = REFUSED | ANSWERED
"""Statuses of a request that may be refused: anything but an error of the server."""

COMPLETIONS = "/v1/completions"
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

BODIES: list[tuple[bytes, frozenset[int]]] = [
    (b'{"model": "base", "prompt": ', REFUSED),
    (b"", REFUSED),
    (b"[]", REFUSED),
    (b"null", REFUSED),
    (b"{}", REFUSED),
    (b"\xff\xfe\x00", REFUSED),
    (b'{"model": ["base"], "prompt": "a"}', REFUSED),
    (b'{"model": "nobody", "prompt": "a"}', REFUSED),
    (b'{"model": "../../etc/passwd", "prompt": "a"}', REFUSED),
    (b'{"model": "base", "prompt": {"a": 1}}', REFUSED),
    (b"[" * 5000, REFUSED),
]
"""Of completions, without JSON or without a model."""

FIELDS: list[tuple[dict[str, Any], frozenset[int]]] = [
    ({"max_tokens": 10**9}, REFUSED),
    ({"max_tokens": -1}, REFUSED),
    ({"max_tokens": "many"}, REFUSED),
    ({"temperature": -1}, REFUSED),
    ({"top_p": 7}, REFUSED),
    ({"top_k": -7}, REFUSED),
    ({"n": -3}, REFUSED),
    ({"n": 0}, EITHER),
    ({"logprobs": 10**6}, REFUSED),
    ({"logprobs": -2}, REFUSED),
    ({"prompt_logprobs": 10**6}, REFUSED),
    ({"prompt": ""}, EITHER),
    ({"prompt": []}, EITHER),
    ({"prompt": [[]]}, EITHER),
    ({"prompt": [10**9]}, REFUSED),
    ({"prompt": [-5]}, REFUSED),
    ({"prompt": [5] * 2000}, REFUSED),
    ({"prompt": "a" * 200_000}, REFUSED),
    ({"logit_bias": {"999999999": 1}}, REFUSED),
    ({"logit_bias": {"x": 1}}, REFUSED),
    ({"logit_bias": {"5": 50}}, EITHER),
    ({"min_tokens": 50, "max_tokens": 5}, REFUSED),
    ({"stop": [""]}, EITHER),
    ({"stop": ["a", "e"]}, ANSWERED),
    ({"seed": 2**80}, REFUSED),
    ({"echo": True, "logprobs": 2}, ANSWERED),
    ({"prompt_logprobs": 2}, ANSWERED),
    ({"echo": True, "max_tokens": 0}, EITHER),
    ({"best_of": 3, "n": 2}, EITHER),
    ({"temperature": 1.5, "n": 2, "top_k": 3}, ANSWERED),
    ({"truncate_prompt_tokens": -5}, EITHER),
    ({"stream": True, "stream_options": {"include_usage": 7}}, EITHER),
    ({"response_format": {"type": "json_schema"}}, EITHER),
    ({"priority": 10**30}, EITHER),
]
"""Changes of a well-formed request of any model."""

LOADS: list[dict[str, Any]] = [
    {},
    {"lora_name": "", "lora_path": ""},
    {"lora_name": "bad-path", "lora_path": "/nowhere/at/all"},
    {"lora_name": "bad-path", "lora_path": "/etc"},
    {"lora_name": "bad-path", "lora_path": "/etc/passwd"},
    {"lora_name": "bad-path", "lora_path": "a\x00b"},
    {"lora_name": "bad-path", "lora_path": "x" * 5000},
    {"lora_name": "bad-path", "lora_path": ["/etc"]},
    {"lora_name": "base", "lora_path": "/etc"},
]
"""Adapters that cannot be loaded."""

UNLOADS: list[dict[str, Any]] = [
    {},
    {"lora_name": "nobody"},
    {"lora_name": ""},
    {"lora_name": "base"},
    {"lora_name": 5},
]
"""Adapters that cannot be unloaded."""
