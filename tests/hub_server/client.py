"""Points the clients of this process at a hub on loopback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from flora_train.runtime import hub_snapshot
from tests.hub_server.storage import TOKEN, Hub


def use_hub(
    monkeypatch: pytest.MonkeyPatch, hub: Hub, cache: Path, *, token: str | None = TOKEN, waits: bool = False
) -> None:
    """Until the end of a test, huggingface_hub reads this hub into `cache`. waits: between attempts, too."""
    from huggingface_hub import constants

    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_TOKEN_PATH": str(cache / "token"),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_snapshot, "_commits", {})
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    if not waits:
        monkeypatch.setattr(time, "sleep", lambda seconds: None)


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_snapshot, "_commits", {})


def start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(hub_snapshot, "_commits", {})
