"""Ask the Hugging Face hub: again where it is busy or the line breaks, with a bound on every wait, and one line for an answer that makes no sense."""

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
PASSING = (429, 500, 502, 503, 504)
"""Answers of the hub that another time may not be given."""
LONGEST_WAIT = 60.0
"""Seconds; the hub may ask for more, and is asked again all the same."""
LONGEST_NAME = 96
SILENCE = 300.0
"""Seconds without a byte after which the line counts as broken."""

Result = TypeVar("Result")


class AnswerError(Exception):
    """The hub gave an answer that the client cannot make sense of."""


def check_repository_name(name: str, key: str = "repo") -> None:
    """Raises UserError for a name that the hub would refuse: ORG/NAME, both of ASCII letters, digits, - _ and ."""
    owner, slash, short = name.partition("/")
    for part, word in ((owner, "ORG"), (short, "NAME")) if slash else ((name, "NAME"),):
        hint = None
        if not re.fullmatch(r"[A-Za-z0-9._-]+", part):
            hint = "may hold letters (a-z), digits, -, _ and . only"
        elif part[0] in "-." or part[-1] in "-.":
            hint = "may not begin or end with - or ."
        elif "--" in part or ".." in part:
            hint = "may not hold -- or .."
        elif len(part) > LONGEST_NAME:
            hint = f"has {len(part)} characters, and may have {LONGEST_NAME}"
        elif part.endswith((".git", ".ipynb")):
            hint = "may not end in .git or .ipynb"
        if hint is not None:
            raise user_error(key, name, f"the hub refuses this name: {word} {hint}")
    if not slash:
        raise user_error(key, name, "write ORG/NAME (or YOU/NAME)")


def insist(action: Callable[[], Result]) -> Result:
    """Do it, again where the hub is busy or the line breaks, each time after twice as long or as long as the hub says, and at most
    LONGEST_WAIT. Raises what the client raises, OSError where the line stays broken, and AnswerError."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    for attempt in range(ATTEMPTS):
        _bound_waits()
        wait = 2.0**attempt
        try:
            return action()
        except (LocalTokenNotFoundError, OfflineModeIsEnabled, UserError):
            raise
        except HfHubHTTPError as error:
            if error.response.status_code not in PASSING or attempt == ATTEMPTS - 1:
                raise
            reason = f"the hub answered {error.response.status_code}"
            wait = _asked_wait(error.response.headers.get("Retry-After"), wait)
        except Exception as error:
            if not _line_broke(error):
                if isinstance(error, OSError):
                    raise
                raise AnswerError(f"{type(error).__name__}: {first_line(error)}") from error
            if attempt == ATTEMPTS - 1 or isinstance(error, RuntimeError):
                raise OSError(first_line(error)) from error
            reason = first_line(error)
        if wait > LONGEST_WAIT:
            reason, wait = f"{reason} and asks for {wait:,.0f}s", LONGEST_WAIT
        logger.warning(f"{reason}; trying again in {wait:g}s")
        time.sleep(wait)
    raise AssertionError


def _asked_wait(header: str | None, otherwise: float) -> float:
    """Seconds of a Retry-After header, a number or a date."""
    if header is None:
        return otherwise
    try:
        seconds = float(header)
    except ValueError:
        try:
            at = parsedate_to_datetime(header)
            seconds = (at - datetime.now(at.tzinfo or UTC).replace(tzinfo=at.tzinfo)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return otherwise
    return otherwise if math.isnan(seconds) else min(max(seconds, 0.0), 1e12)


def _bound_waits() -> None:
    """The client waits by itself, too, as long as a header says: let no header say more than LONGEST_WAIT."""
    from huggingface_hub.utils import get_session

    session = get_session()
    hooks = getattr(session, "event_hooks", None)
    if isinstance(hooks, MutableMapping) and _bound not in hooks.get("response", ()):
        session.event_hooks = {**hooks, "response": [*hooks.get("response", ()), _bound]}
        session.timeout = SILENCE


def _bound(response: Any) -> None:
    asked = str(response.headers.get("Retry-After", "")).strip()
    if asked.isdigit() and (len(asked) > 9 or int(asked) > LONGEST_WAIT):
        logger.warning(f"the hub asks for a wait of {asked[:20]}s; it is asked again in {LONGEST_WAIT:g}s")
        response.headers["Retry-After"] = f"{LONGEST_WAIT:.0f}"
    limit = response.headers.get("RateLimit")
    if limit:
        longer = re.compile(r"\bt=(\d+)")
        response.headers["RateLimit"] = longer.sub(lambda t: f"t={_shorter(t[1])}", str(limit))


def _shorter(seconds: str) -> str:
    return seconds if len(seconds) < 9 and int(seconds) <= LONGEST_WAIT else f"{LONGEST_WAIT:.0f}"


def _line_broke(error: Exception) -> bool:
    """By name: which HTTP library the hub's client is made with changes with its version. A RuntimeError is an upload that its own attempts
    did not finish."""
    if isinstance(error, RecursionError):
        return False
    return isinstance(error, (ConnectionError, RuntimeError)) or any(
        kind.__name__ == "TransportError" for kind in type(error).__mro__
    )
