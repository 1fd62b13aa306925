"""Requests to the Hugging Face hub: retries with bounded waits, and one clear error for every failure.

huggingface_hub retries some of its own requests and waits as long as the hub's headers say. The retries here
cover every request, cap each wait, and report it.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, MutableMapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from flora_train.config.errors import UserError, first_line, user_error

logger = logging.getLogger(__name__)

ATTEMPTS = 6
TRANSIENT_STATUSES = (429, 500, 502, 503, 504)
"""HTTP statuses after which the request is repeated."""
MAX_WAIT = 60.0
"""Seconds between two attempts; a longer Retry-After of the hub is cut to this."""
MAX_NAME_LENGTH = 96
READ_TIMEOUT = 300.0
"""Seconds without a byte after which a connection counts as broken."""

Result = TypeVar("Result")


class AnswerError(Exception):
    """The client cannot interpret the hub's answer."""


def check_repository_name(name: str, key: str = "repo") -> None:
    """Raises UserError for a name that the hub would refuse: ORG/NAME, both of ASCII letters, digits, - _ and
    ."""
    owner, slash, short_name = name.partition("/")
    parts = {"ORG": owner, "NAME": short_name} if slash else {"NAME": name}
    for label, part in parts.items():
        if (problem := _name_problem(part)) is not None:
            raise user_error(key, name, f"the hub refuses this name: {label} {problem}")
    if not slash:
        raise user_error(key, name, "write ORG/NAME (or YOU/NAME)")


def _name_problem(part: str) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9._-]+", part):
        return "may hold letters (a-z), digits, -, _ and . only"
    if part[0] in "-." or part[-1] in "-.":
        return "may not begin or end with - or ."
    if "--" in part or ".." in part:
        return "may not hold -- or .."
    if len(part) > MAX_NAME_LENGTH:
        return f"has {len(part)} characters; at most {MAX_NAME_LENGTH} are allowed"
    if part.endswith((".git", ".ipynb")):
        return "may not end in .git or .ipynb"
    return None


def with_retries(action: Callable[[], Result]) -> Result:
    """Call `action`, again after a transient HTTP status or a broken connection.

    Waits double with each attempt, or last as long as the hub's Retry-After says, at most MAX_WAIT seconds.
    Raises the client's exceptions, OSError for a connection that stays broken, and AnswerError for an answer
    that the client cannot interpret.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for attempt in range(ATTEMPTS):
        is_last = attempt == ATTEMPTS - 1
        _cap_client_waits()
        wait = 2.0**attempt
        try:
            return action()
        except (LocalTokenNotFoundError, OfflineModeIsEnabled, UserError):
            raise
        except HfHubHTTPError as error:
            status = error.response.status_code
            if status not in TRANSIENT_STATUSES or is_last:
                raise
            reason = f"the hub answered {status}"
            wait = _retry_after(error.response.headers.get("Retry-After"), default=wait)
        except Exception as error:
            if not _is_connection_error(error):
                if isinstance(error, OSError):
                    raise
                raise AnswerError(f"{type(error).__name__}: {first_line(error)}") from error
            if is_last or isinstance(error, RuntimeError):
                raise OSError(first_line(error)) from error
            reason = first_line(error)
        if wait > MAX_WAIT:
            reason, wait = f"{reason} and requests a wait of {wait:,.0f}s", MAX_WAIT
        logger.warning(f"{reason}; trying again in {wait:g}s")
        time.sleep(wait)
    raise AssertionError


def _retry_after(header: str | None, *, default: float) -> float:
    """Seconds of a Retry-After header, which holds a number or a date."""
    if header is None:
        return default
    try:
        seconds = float(header)
    except ValueError:
        try:
            date = parsedate_to_datetime(header)
            now = datetime.now(date.tzinfo or UTC).replace(tzinfo=date.tzinfo)
            seconds = (date - now).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return default
    if math.isnan(seconds):
        return default
    return min(max(seconds, 0.0), 1e12)


def _cap_client_waits() -> None:
    """Cap the waits that huggingface_hub reads from headers, and set the read timeout."""
    from huggingface_hub.utils import get_session

    session = get_session()
    hooks = getattr(session, "event_hooks", None)
    if isinstance(hooks, MutableMapping) and _cap_headers not in hooks.get("response", ()):
        session.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _cap_headers]}
        session.timeout = READ_TIMEOUT


def _cap_headers(response: Any) -> None:
    requested = str(response.headers.get("Retry-After", "")).strip()
    if requested.isdigit() and (len(requested) > 9 or int(requested) > MAX_WAIT):
        logger.warning(f"the hub requests a wait of {requested[:20]}s; trying again in {MAX_WAIT:g}s")
        response.headers["Retry-After"] = f"{MAX_WAIT:.0f}"
    limit = response.headers.get("RateLimit")
    if limit:
        response.headers["RateLimit"] = re.sub(r"\bt=(\d+)", _capped_reset, str(limit))


def _capped_reset(match: re.Match[str]) -> str:
    seconds = match[1]
    if len(seconds) < 9 and int(seconds) <= MAX_WAIT:
        return f"t={seconds}"
    return f"t={MAX_WAIT:.0f}"


def _is_connection_error(error: Exception) -> bool:
    """Recognised by class name, because the client's HTTP library depends on its version.

    A RuntimeError is raised by an upload whose own attempts failed.
    """
    if isinstance(error, RecursionError):
        return False
    if isinstance(error, (ConnectionError, RuntimeError)):
        return True
    return any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
