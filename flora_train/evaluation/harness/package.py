"""Whether lm_eval, an optional package, is installed."""

from __future__ import annotations

from importlib.util import find_spec

from flora_train.config.errors import user_error


def check_installed() -> None:
    """Raises UserError if lm_eval is not installed."""
    if find_spec("lm_eval") is None:
        raise user_error("lm-eval", None, "needs the package lm_eval: pip install 'flora-train[lm-eval]'")
