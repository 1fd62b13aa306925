"""Requests to the Hugging Face hub: retries with bounded waits, and one clear error for every failure.

huggingface_hub retries some of its own requests and waits as long as the hub's headers say. The retries here
cover every request, cap each wait, and report it.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

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

OFFLINE_HINT = "HF_HUB_OFFLINE forbids access to the hub: unset it"
CONSISTENCY = "Consistency check failed"
"""In the client's error for a file whose size differs from the size in the hub's headers."""
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
FAILED_UPLOAD = "Error while uploading"
"""Start of the client's error for an upload that failed."""
MOST_CAUSES = 10
"""Exceptions in a chain that are searched for the hub's answer."""

Result = TypeVar("Result")


class AnswerError(Exception):
    """The client cannot interpret the hub's answer."""


class DamagedFileError(Exception):
    """A downloaded file differs from what its commit holds."""


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


def with_retries(
    action: Callable[[], Result], about: str = "", *, connect_attempts: int = ATTEMPTS
) -> Result:
    """Call `action`, again after a transient HTTP status, a broken connection or a file that arrived damaged.

    about: repository, for the log; connect_attempts: attempts as long as no connection is made at all.

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
            with quiet_client():
                return action()
        except (LocalTokenNotFoundError, OfflineModeIsEnabled, UserError):
            raise
        except Exception as raised:
            error = _hub_cause(raised)
            if isinstance(error, HfHubHTTPError):
                status = error.response.status_code
                if status not in TRANSIENT_STATUSES or is_last:
                    raise error from None
                reason = f"the hub answered {status}"
                wait = _retry_after(error.response.headers.get("Retry-After"), default=wait)
            elif isinstance(error, DamagedFileError) or CONSISTENCY in str(error):
                if is_last:
                    raise
                reason = first_line(error)
            else:
                if not _is_connection_error(error):
                    if isinstance(error, OSError):
                        raise
                    raise AnswerError(f"{type(error).__name__}: {first_line(error)}") from error
                is_last = is_last or (is_unreachable(error) and attempt >= connect_attempts - 1)
                if is_last or isinstance(error, RuntimeError):
                    raise OSError(first_line(error)) from error
                reason = first_line(error)
        if wait > MAX_WAIT:
            reason, wait = f"{reason} and requests a wait of {wait:,.0f}s", MAX_WAIT
        start = f"{about}: " if about else ""
        logger.warning(f"{start}{reason}; trying again in {wait:g}s")
        time.sleep(wait)
    raise AssertionError


def _hub_cause(error: Exception) -> Exception:
    """The answer of the hub, or the broken connection, that an exception of a library stands for."""
    from huggingface_hub.errors import HfHubHTTPError

    cause: BaseException | None = error
    for _ in range(MOST_CAUSES):
        if cause is None:
            break
        is_answer = isinstance(cause, HfHubHTTPError) and cause.response is not None
        if is_answer or (isinstance(cause, Exception) and _is_connection_error(cause)):
            return cause  # type: ignore[return-value]
        cause = cause.__cause__ or cause.__context__
    return error


@contextmanager
def quiet_client() -> Iterator[None]:
    """Without the lines that the client logs about its own attempts."""
    client = logging.getLogger("huggingface_hub")
    level = client.level
    if level < logging.ERROR and "HF_HUB_VERBOSITY" not in os.environ:
        client.setLevel(logging.ERROR)
    try:
        yield
    finally:
        client.setLevel(level)


def is_outage(error: Exception) -> bool:
    """Whether an error says that the hub cannot be reached at the moment, not that it refuses."""
    from huggingface_hub.errors import HfHubHTTPError

    error = _hub_cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT_STATUSES
    return _is_connection_error(error)


def is_unreachable(error: Exception) -> bool:
    """Whether no connection could be made."""
    return isinstance(error, ConnectionRefusedError) or type(error).__name__ == "ConnectError"


def explain(error: Exception, name: str, repo_type: str = "model", revision: str | None = None) -> str:
    """Why a repository cannot be read, and what to do about it, as the end of a sentence that names it."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    error = _hub_cause(error)
    if isinstance(error, AnswerError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    noun = {"model": "model", "dataset": "data set"}[repo_type]
    page = repository_page(name, repo_type)
    status = None
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        cache = f"the hub's cache ({constants.HF_HUB_CACHE})"
        return f"cannot be written to {cache}: {error.strerror}; set HF_HOME to a folder with room"
    if isinstance(error, UnicodeEncodeError):
        return "the token of this machine has characters that no token has: correct HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return f"is not in the local cache, and {OFFLINE_HINT}"
    if isinstance(error, GatedRepoError):
        if status == 401 or get_token() is None:
            return f"is gated: accept its terms on {page}, then run `hf auth login`"
        return (
            f"is gated, and this login has no access: accept its terms on {page} "
            "with the account that `hf auth whoami` shows"
        )
    if isinstance(error, RevisionNotFoundError) and re.fullmatch("[0-9a-f]{40}", revision or ""):
        return f"has no commit {str(revision)[:12]} (any more): give another revision"
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision or 'main'}: give a branch, tag or commit that {page} lists"
    if isinstance(error, RepositoryNotFoundError):
        hint = f"the hub has no such {noun}, or this login may not see it: check the name"
        return hint if get_token() is not None else f"{hint}, and run `hf auth login` for a private one"
    if isinstance(error, HfHubHTTPError) and status == 404 and "x-error-code" not in error.response.headers:
        host = urlsplit(constants.ENDPOINT).netloc.rpartition("@")[2]
        return (
            f"the hub at {host} answers 404, and not as a hub: check the name of the {noun}, and HF_ENDPOINT"
        )
    if status == 401:
        return "the hub refuses the login: run `hf auth login` with a valid token, or correct HF_TOKEN"
    if status == 403:
        return f"the hub forbids reading it (403): check the token's permissions for {page}"
    if status in TRANSIENT_STATUSES:
        return f"the hub still answered {status} after {ATTEMPTS} attempts: try again later"
    if isinstance(error, DamagedFileError):
        return f"{error}, {ATTEMPTS} times: it changes on the hub; try again later, or give another revision"
    if CONSISTENCY in str(error):
        return f"a file has another size than the hub says ({first_line(error)}): try again later"
    if isinstance(error, HFValidationError):
        return f"is not a name of a {noun} on the hub (ORG/NAME): {first_line(error)}"
    if _is_connection_error(error):
        return f"the hub cannot be reached ({first_line(error)}): check the network connection"
    return f"cannot be read ({type(error).__name__}: {first_line(error)})"


def repository_page(name: str, repo_type: str) -> str:
    """Web page of a repository, on which its terms are accepted."""
    from huggingface_hub import constants

    folder = {"model": "", "dataset": "datasets/"}[repo_type]
    return f"{constants.ENDPOINT}/{folder}{name}"


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

    An upload whose own attempts failed raises a RuntimeError.
    """
    if isinstance(error, RuntimeError):
        return str(error).startswith(FAILED_UPLOAD)
    if isinstance(error, ConnectionError):
        return True
    return any(cls.__name__ == "TransportError" for cls in type(error).__mro__)
