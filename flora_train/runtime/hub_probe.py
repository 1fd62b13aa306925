"""Asks the hub which repositories can be read: one short connection attempt, then one request for each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from flora_train.config.errors import first_line, user_error
from flora_train.config.json_format import JsonObject, parse_object

RepositoryType = Literal["model", "dataset"]
Access = Literal[
    "ok",
    "login",
    "token",
    "terms",
    "hidden",
    "missing",
    "revision",
    "refused",
    "busy",
    "not a hub",
    "unreachable",
]
"""login: gated, and nobody is logged in; token: the token is refused; terms: they are not accepted; hidden:
private, or no such repository; missing: no such repository; refused: another 4xx; busy: the hub answers
slowly, with 429 or with 5xx."""

LIMIT = 2.0
"""Seconds for the first answer of the hub, and again for all others."""
REPETITIONS, PAUSE = 2, 1.0
"""How many times a hub that answers 429 or 5xx is asked again, and seconds before each."""
LONGEST_ANSWER = 64 << 20
"""Bytes of an answer that is read."""
MOST_REDIRECTS = 5
CLOSED = {"RemoteProtocolError", "ReadError"}
"""Exceptions of the client for a connection that was closed: by name, because its HTTP library depends on its
version."""
UNLIKE_A_HUB = "it answers 404, and not as a hub does"
"""Reason of an answer that another server, or a mirror that lacks the repository, has given."""
OPEN_FILES = ("README.md", ".gitattributes")
"""Files of a gated repository that can be read without access."""


@dataclass(frozen=True)
class Repository:
    type: RepositoryType
    name: str
    revision: str | None = None
    file: str | None = None
    """A file, or a folder with / at its end, whose access is checked. Default: any file."""
    with_sizes: bool = False
    """Whether the sizes of its files are requested."""

    @property
    def page(self) -> str:
        """Path of its page on the hub."""
        return self.name if self.type == "model" else f"datasets/{self.name}"


@dataclass(frozen=True)
class Answer:
    """What the hub says about a repository."""

    access: Access
    reason: str = ""
    files: Mapping[str, int] = field(default_factory=dict)
    """File -> bytes, where sizes were requested and are known."""
    parameters: int | None = None
    """Of its safetensors files."""
    status: int = 0
    """Of the answer that makes the hub busy."""


@dataclass(frozen=True)
class _Response:
    status: int
    headers: Mapping[str, str]
    body: bytes


def check_settings() -> None:
    """Raises UserError for an environment variable that the hub's client cannot interpret."""
    try:
        from huggingface_hub import constants  # noqa: F401
    except ValueError as error:
        reason = first_line(error)
        values = {name: value for name, value in sorted(os.environ.items()) if name.startswith("HF_")}
        named = [name for name, value in values.items() if value and repr(value) in reason]
        name = named[0] if named else "HF_ENDPOINT"
        hint = f"the hub's client cannot interpret it ({reason}): correct or unset it"
        raise user_error(name, values.get(name, "").rpartition("@")[2], hint) from error


def endpoint() -> str:
    """The hub's address (HF_ENDPOINT)."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def shown_url(url: str) -> str:
    """A URL without user and password."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, query="", fragment="").geturl()


def proxy() -> str | None:
    """The proxy through which the hub is reached, without user and password."""
    parts = urlsplit(endpoint())
    proxies = getproxies()
    address = proxies.get(parts.scheme) or proxies.get("all")
    if address is None or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return shown_url(address if "://" in address else f"http://{address}")


def go_offline() -> None:
    """Use the hub's cache only, as with HF_HUB_OFFLINE=1, from now on and in processes that are started."""
    from huggingface_hub import constants

    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True


def has_token() -> bool:
    """Whether this machine has a token for the hub: HF_TOKEN, or that of `hf auth login`."""
    from huggingface_hub import constants

    if any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")):
        return True
    with suppress(OSError), open(constants.HF_TOKEN_PATH, encoding="utf-8") as file:
        return bool(file.read().strip())
    return False


def time_limit() -> float:
    """LIMIT, or HF_HUB_ETAG_TIMEOUT where it is set."""
    with suppress(ValueError):
        seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT", ""))
        if 0 < seconds < 3600:
            return seconds
    return LIMIT


def probe(repositories: Sequence[Repository]) -> dict[Repository, Answer]:
    """The hub's answers. Where the first request gets none, no other is made, and all are `unreachable`.

    A hub that answers 429 or 5xx is asked again.
    """
    if not repositories:
        return {}
    limit = time_limit()
    first, *others = repositories
    answers = _ask_all([first], limit, late="unreachable")
    if answers[first].access == "unreachable":
        return dict.fromkeys(repositories, answers[first])
    answers |= _ask_all(others, limit, late="busy")
    for _ in range(REPETITIONS):
        busy = [repository for repository, answer in answers.items() if answer.status]
        if busy:
            time.sleep(PAUSE)
            answers |= _ask_all(busy, limit, late="busy")
    return answers


def can_connect(url: str) -> str | None:
    """None if a server answers there within the limit, else the reason why not."""
    result = _within(time_limit(), {url: lambda: _request("HEAD", url, {}).status})[url]
    return _failure(result) if isinstance(result, Exception) or result is None else None


def _ask_all(
    repositories: Sequence[Repository], limit: float, *, late: Literal["busy", "unreachable"]
) -> dict[Repository, Answer]:
    """Ask for all repositories at the same time. late: what a repository is whose answer does not come in
    time."""
    begun: set[Repository] = set()
    actions = {repository: _asking(repository, begun) for repository in repositories}
    answers = {}
    for repository, result in _within(limit, actions).items():
        if isinstance(result, Answer):
            answers[repository] = result
        elif repository in begun:
            answers[repository] = Answer("busy", f"has not sent its whole answer within {limit:g}s")
        else:
            answers[repository] = Answer(late, _failure(result))
    return answers


def _asking(repository: Repository, begun: set[Repository]) -> Callable[[], Answer]:
    return lambda: _ask(repository, lambda: begun.add(repository))


def _within(limit: float, actions: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Results of actions that run at the same time, the exception of those that fail, None for those that
    need longer.

    The threads are not waited for: the resolution of a name cannot be interrupted.
    """
    results: dict[Any, Any] = dict.fromkeys(actions)

    def run(key: Any) -> None:
        try:
            results[key] = actions[key]()
        except Exception as error:  # the client raises many types
            results[key] = error

    threads = [threading.Thread(target=run, args=(key,), daemon=True) for key in actions]
    deadline = time.monotonic() + limit
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(results)


def _ask(repository: Repository, on_begin: Callable[[], None]) -> Answer:
    """`_ask_once`, again after a connection that was closed without an answer. on_begin: called once the hub
    has begun to answer."""
    try:
        return _ask_once(repository, on_begin)
    except Exception as error:
        if not CLOSED & {cls.__name__ for cls in type(error).__mro__}:
            raise
    return _ask_once(repository, on_begin)


def _ask_once(repository: Repository, on_begin: Callable[[], None]) -> Answer:
    try:
        headers = _headers()
    except OSError as error:
        return Answer("token", f"its file cannot be read: {_failure(error)}")
    if not headers.get("authorization", "").isascii():
        return Answer("token", "it has characters that no token has")
    url = f"{endpoint()}/api/{repository.type}s/{quote(repository.name)}"
    if repository.revision is not None:
        url += f"/revision/{quote(repository.revision, safe='')}"
    if repository.with_sizes:
        url += "?blobs=true"
    response = _request("GET", url, headers, on_begin)
    if response.status // 100 == 2:
        try:
            information = parse_object(response.body)
        except (ValueError, RecursionError):
            return Answer("not a hub", "its answer is not that of a hub")
        return _read_information(repository, information, headers)
    if response.status in (404, 405, 501) and "x-error-code" not in response.headers:
        # a mirror of files may lack this address
        file = "README.md" if repository.type == "dataset" else repository.file or "config.json"
        response = _head(repository, file, headers)
        if response.status == 404 and "x-error-code" not in response.headers:
            return Answer("missing", UNLIKE_A_HUB)
    return _interpret(response, "authorization" in headers)


def _read_information(repository: Repository, information: JsonObject, headers: Mapping[str, str]) -> Answer:
    """The answer for a repository that exists: files of a gated one need more rights than its information."""
    siblings = information.get("siblings")
    files: dict[str, int | None] = {}
    for sibling in siblings if isinstance(siblings, list) else ():
        if isinstance(sibling, dict) and isinstance(sibling.get("rfilename"), str):
            size = sibling.get("size")
            files[sibling["rfilename"]] = size if isinstance(size, int) else None
    sizes = {name: size for name, size in files.items() if size is not None}
    answer = Answer("ok")
    if information.get("gated") is not False:
        answer = _check_access(repository, list(files), headers)
    return replace(answer, files=sizes, parameters=_parameters(information))


def _check_access(repository: Repository, files: Sequence[str], headers: Mapping[str, str]) -> Answer:
    """Whether the files of a gated repository may be read; by one of them where a mirror cannot say it."""
    url = f"{endpoint()}/api/{repository.type}s/{quote(repository.name)}/auth-check"
    response = _request("GET", url, headers)
    file = _file_to_check(repository, files)
    is_unclear = response.status in (405, 501)
    if response.status // 100 == 4 and response.status not in (408, 429):
        is_unclear = response.status == 404 or "x-error-code" not in response.headers
    if file is not None and is_unclear:
        response = _head(repository, file, headers)
    return _interpret(response, "authorization" in headers)


def _file_to_check(repository: Repository, files: Sequence[str]) -> str | None:
    wanted = repository.file or ""
    if wanted in files:
        return wanted
    closed = [name for name in files if name.rpartition("/")[2] not in OPEN_FILES]
    return next((name for name in closed if name.startswith(wanted)), next(iter(closed), None))


def _parameters(information: JsonObject) -> int | None:
    """The number of parameters that the hub has counted."""
    counted = information.get("safetensors")
    total = counted.get("total") if isinstance(counted, dict) else None
    return total if isinstance(total, int) and total > 0 else None


def _head(repository: Repository, file: str, headers: Mapping[str, str]) -> _Response:
    revision = quote(repository.revision or "main", safe="")
    return _request(
        "HEAD", f"{endpoint()}/{quote(repository.page)}/resolve/{revision}/{quote(file)}", headers
    )


def _headers() -> dict[str, str]:
    from huggingface_hub import constants, get_token

    headers = {"user-agent": "flora_train", "accept-encoding": "identity"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token:
        headers["authorization"] = f"Bearer {token}"
    return headers


def _request(
    method: str, url: str, headers: Mapping[str, str], on_begin: Callable[[], None] = lambda: None
) -> _Response:
    """One request. A redirect is followed on the same server only: no other one may see the token."""
    from huggingface_hub.utils import get_session

    for _ in range(MOST_REDIRECTS):
        options: dict[str, Any] = {
            "headers": dict(headers),
            "timeout": time_limit(),
            "follow_redirects": False,
        }
        with get_session().stream(method, url, **options) as response:
            on_begin()
            body = b""
            for chunk in response.iter_bytes():
                body += chunk
                if len(body) > LONGEST_ANSWER:
                    raise ValueError("the answer is too long")
            names = {name.lower(): value for name, value in response.headers.items()}
            result = _Response(response.status_code, names, body)
        target = urljoin(url, result.headers.get("location", ""))
        if result.status not in (301, 302, 303, 307, 308) or not _same_server(url, target):
            return result
        url = target
    return result


def _same_server(url: str, other: str) -> bool:
    a, b = urlsplit(url), urlsplit(other)
    return (a.scheme, a.hostname, a.port) == (b.scheme, b.hostname, b.port)


def _interpret(response: _Response, with_token: bool) -> Answer:
    """What a status and the hub's headers mean. A redirect to another server leads to the content."""
    status, code = response.status, response.headers.get("x-error-code", "")
    message = response.headers.get("x-error-message", "")[:200]
    if status < 400 or code == "EntryNotFound":
        return Answer("ok")
    if status in (408, 429) or status >= 500:
        return Answer("busy", f"answered {status}", status=status)
    if code == "GatedRepo":
        if status == 401 or not with_token:
            return Answer("login", message)
        return Answer("terms", message)
    if status == 401 and with_token:
        return Answer("token", message)
    if status == 401:
        return Answer("hidden", message)
    if status == 404:
        return Answer("revision" if code == "RevisionNotFound" else "missing", message)
    return Answer("refused", f"answered {status} {message}".strip())


def _failure(error: Exception | None) -> str:
    """Why no server answered, in a few words."""
    if error is None or "timeout" in type(error).__name__.lower():
        return f"no answer within {time_limit():g}s"
    text = first_line(error)
    if text.startswith("[Errno"):
        text = text.partition("] ")[2] or text
    return text
