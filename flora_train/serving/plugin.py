"""The entry point of vLLM's plugin: after `register`, vLLM serves fLoRA and IA3 beside LoRA."""

from __future__ import annotations

PARTS = ("manager", "catalogue", "fairness")
"""Modules of this package whose `install` changes vLLM."""


def register() -> None:
    """Install the parts of the plugin. vLLM calls this in every process; a second call changes nothing."""
    from importlib import import_module

    for part in PARTS:
        import_module(f"flora_train.serving.{part}").install()
