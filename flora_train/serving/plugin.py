"""The entry point of vLLM's plugin: after `register`, vLLM serves fLoRA and IA3 beside LoRA."""

from __future__ import annotations


def register() -> None:
    """Install the parts of the plugin. vLLM calls this in every process; a second call changes nothing."""
    from flora_train.serving import catalogue, manager

    manager.install()
    catalogue.install()
