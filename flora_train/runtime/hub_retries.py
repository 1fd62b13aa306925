"""Replaces the lines that the hub's client prints for every retry by one line of the package's own."""

from __future__ import annotations

import logging
import re
import time

logger = logging.getLogger(__name__)

CLIENT_LOGGERS = (
    "huggingface_hub.utils._http",
    "huggingface_hub.file_download",
    "huggingface_hub.hf_api",
    "datasets.utils.file_utils",
)
"""Loggers of the client's modules that repeat requests."""
QUIET = 60.0
"""Seconds after a line in which further retries are not mentioned."""
LONG_WAIT = 10.0
"""Seconds of a wait that is mentioned although an earlier retry was mentioned."""
FAILURE = re.compile(
    r"HTTP Error (?P<status>\d+) thrown while requesting"
    r"|'(?P<error>.*)' thrown while requesting"
    r"|Error while downloading from \S+: (?P<interruption>.*)"
    r"|(?P<lost>Got disconnected from|Failed to connect to) remote data host",
    re.DOTALL,
)
WAIT = re.compile(r"(?:Waiting|Retrying in) (?P<seconds>[\d.]+) ?s")


class RetryFilter(logging.Filter):
    """Drops the records of retries, and logs at most one line a minute instead."""

    def __init__(self) -> None:
        super().__init__()
        self._mentioned_at = -QUIET

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        failure, wait = FAILURE.match(message), WAIT.search(message)
        if failure is None and wait is None:
            return True
        now = time.monotonic()
        seconds = 0.0 if wait is None else float(wait["seconds"])
        if seconds >= LONG_WAIT:
            self._mention(now, f"asks to wait: the next request follows in {seconds:.0f}s")
        elif failure is not None and now - self._mentioned_at >= QUIET:
            self._mention(now, f"{_reason(failure)}: requests are repeated for some time")
        return False

    def _mention(self, now: float, text: str) -> None:
        self._mentioned_at = now
        logger.warning(f"the hub {text}")


def _reason(failure: re.Match[str]) -> str:
    """What went wrong, without the address, which may be signed."""
    if failure["status"]:
        return f"answered {failure['status']}"
    detail = (failure["error"] or failure["interruption"] or "").strip().partition("\n")[0]
    if not detail or "://" in detail:
        return "closed the connection, or is slow"
    return f"cannot be reached, or is slow ({detail})"


_filter = RetryFilter()


def hide_retries() -> None:
    """Drop the client's lines on retries, in this process."""
    for name in CLIENT_LOGGERS:
        logging.getLogger(name).addFilter(_filter)


def show_retries() -> None:
    """Undo `hide_retries`."""
    for name in CLIENT_LOGGERS:
        logging.getLogger(name).removeFilter(_filter)
