"""How large is an adapter's next step? Learning rates by the adapter's own step count."""

from __future__ import annotations

from math import cos, pi

from flora_train.adapters.spec import AdapterSpec


def learning_rate(spec: AdapterSpec, step: int) -> float:
    """The learning rate of the adapter's own step number `step` (from 0).

    Linear warm-up over `warmup_steps`, then constant, linear to zero or half a cosine to zero at `max_steps`.
    """
    if step < spec.warmup_steps:
        return spec.lr * (step + 1) / spec.warmup_steps
    progress = min(1.0, (step - spec.warmup_steps) / max(1, spec.max_steps - spec.warmup_steps))
    factor = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + cos(pi * progress))}[spec.schedule]
    return spec.lr * factor
