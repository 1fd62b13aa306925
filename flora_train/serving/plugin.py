"""The entry point of vLLM's plugin: after `register`, vLLM serves fLoRA and IA3 beside LoRA."""

from __future__ import annotations

EXTRAS = ("catalogue", "fairness")
"""Modules of this package whose `install` changes vLLM and without which adapters are served, too."""
DIFFERENT = (ImportError, AttributeError, TypeError)
"""Errors of a vLLM that lacks what is changed."""

_is_registered = False


def register() -> None:
    """Install the parts of the plugin. vLLM calls this in every process; a second call changes nothing."""
    from importlib import import_module

    from flora_train.serving import support

    global _is_registered
    if _is_registered:
        return
    _is_registered = True
    try:
        from flora_train.serving import admission

        admission.check_seams()
        from flora_train.serving import manager

        manager.install()
        admission.install()
    except DIFFERENT as error:
        support.report_missing("serving of fLoRA and IA3", str(error))
        support.install_refusal()
    for part in EXTRAS:
        try:
            import_module(f"flora_train.serving.{part}").install()
        except DIFFERENT as error:
            support.report_missing(part, str(error))
