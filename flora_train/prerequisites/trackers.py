"""What is missing for a tracker that is online: wandb's server and a login."""

from __future__ import annotations

import netrc
import os
from contextlib import suppress
from urllib.parse import urlsplit

from flora_train.config.schema import RunConfig
from flora_train.prerequisites.findings import Findings
from flora_train.runtime.hub_probe import can_connect, shown_url
from flora_train.runtime.hub_snapshot import is_offline

WANDB = "https://api.wandb.ai"


def check_trackers(config: RunConfig, findings: Findings) -> None:
    """Add a problem where tracking.online needs a login or a network that is not there."""
    mode = os.environ.get("WANDB_MODE", "online")
    if not config.tracking.online or "wandb" not in config.tracking.trackers or mode != "online":
        return
    server = os.environ.get("WANDB_BASE_URL") or WANDB
    later = "or leave tracking.online=false, and upload later with `wandb sync`"
    if not _has_login(urlsplit(server).hostname or ""):
        hint = f"wandb has no login here: run `wandb login` (or set WANDB_API_KEY), {later}"
        findings.add("tracking.online", True, hint)
    reason = None if is_offline() else can_connect(server)
    if reason is not None:
        hint = f"{shown_url(server)} cannot be reached ({reason}): connect this machine, {later}"
        findings.add("tracking.online", True, hint)


def _has_login(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
