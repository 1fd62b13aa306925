"""Dispatch of a request: injected faults, the token, and the endpoint that answers it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.hub_server.faults import TRANSIENT_KINDS, Fault
from tests.hub_server.pushing import Pushing
from tests.hub_server.reading import Reading
from tests.hub_server.storage import STRANGER, TOKEN, Content, Hub, read, repo_key, size_of, to_json

TYPES = {"models": "model", "datasets": "dataset"}
OPEN_FILES = ("README.md", ".gitattributes")
"""Files of a gated repository that everybody may read, as on the hub."""
WITHOUT_LOGIN = ("/lfs/", "/cdn/", "/_injected")


class Handler(Reading, Pushing, BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        url = urlsplit(self.path)
        self.query = dict(parse_qsl(url.query))
        self.parts = [unquote(part) for part in url.path.strip("/").split("/")]
        self.damage: Fault | None = None
        path = unquote(url.path)
        with self.hub.lock:
            self.hub.asked.append((self.command, path))
            fault = self._next_fault(path)
        if fault is not None and self._fail(fault, path):
            return
        if self._may_answer(path):
            self.answer(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def _next_fault(self, path: str) -> Any:
        """The first fault that strikes. Every matching fault counts the request."""
        striking = None
        for fault in self.hub.faults:
            if isinstance(fault, Fault):
                strikes = striking is None and fault.strikes(self.command, path)
                if strikes:
                    self.hub.injected[fault.kind] += 1
            else:
                method, part, _, left = fault
                strikes = striking is None and bool(left) and method == self.command and part in path
                if strikes:
                    fault[3] -= 1
            if strikes:
                striking = fault
        return striking

    def _fail(self, fault: Any, path: str) -> bool:
        """Inject a fault. Returns whether the request has been answered with it."""
        if not isinstance(fault, Fault):
            answer = fault[2]
            if isinstance(answer, tuple):  # status, content and headers as they are
                self.say(*answer)
            elif answer == "drop":
                self._hang_up()
            else:
                headers = {"Retry-After": "0"} if answer == 429 else {}
                self.say(answer, {"error": "out of order"}, headers)
            return True
        if fault.kind in TRANSIENT_KINDS:
            headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            self.say(int(fault.kind), {"error": "out of order"}, headers)
        elif fault.kind in ("login", "terms", "missing"):
            self.refuse({"login": "gated 401", "terms": "gated 403", "missing": "missing"}[fault.kind], path)
        elif fault.kind == "refuse":
            self._hang_up()
        elif fault.kind.endswith("redirect"):
            start = self.hub.url if fault.kind == "redirect" else ""
            self.say(307, b"", {"Location": start + self.path})
        else:
            if fault.kind == "slow":
                sleep(1)
            elif fault.kind == "commit":
                self._change(path)
            else:
                self.damage = fault
            return False
        return True

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _change(self, path: str) -> None:
        """Add a commit in which the requested file is half as long."""
        key, rest = self._split(self.parts)
        if key not in self.hub.repos or rest[:1] != ["resolve"]:
            return
        repo, name = self.hub.repos[key], "/".join(rest[2:])
        with self.hub.lock:
            content = repo.tree("main").get(name, b"")
            self.hub.commit(key, {name: read(content, 0, size_of(content) // 2), "NEWS": b"a change\n"})

    def _split(self, parts: list[str]) -> tuple[str, list[str]]:
        """Key of the repository that a path names, and the parts after it."""
        if parts[:1] == ["cdn"]:
            parts = parts[1:]
        if parts[:1] == ["api"]:
            parts = parts[2:] if parts[1:2] == ["resolve-cache"] else parts[1:]
            key = repo_key("/".join(parts[1:3]), TYPES.get(parts[0], ""))
            return key, parts[3:]
        if parts[:1] == ["datasets"]:
            return "/".join(parts[:3]), parts[3:]
        return "/".join(parts[:2]), parts[2:]

    def _may_answer(self, path: str) -> bool:
        """Whether the token permits the request; otherwise it is answered with the reason."""
        if path.startswith(WITHOUT_LOGIN):
            return True
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token not in ("", TOKEN, STRANGER):
            self.refuse("token", path)
            return False
        key, rest = self._split(self.parts)
        repo = self.hub.repos.get(self.hub.renamed.get(key, key))
        is_file = rest[:1] in (["resolve"], ["auth-check"]) or self.parts[:2] == ["api", "resolve-cache"]
        if self.parts[:2] in (["api", "models"], ["api", "datasets"]) or is_file:
            reads = self.command in ("GET", "HEAD") or rest[:1] == ["paths-info"]
        else:
            reads = False
        if not reads:
            if token != TOKEN:
                self.refuse("login", path)
            return token == TOKEN
        if repo is None or (repo.private and token != TOKEN):
            self.refuse("missing" if token else "hidden", path)
            return False
        if repo.gated and token != TOKEN and is_file and rest[-1] not in OPEN_FILES:
            self.refuse("gated 403" if token else "gated 401", path)
            return False
        return True

    def refuse(self, reason: str, path: str) -> None:
        """Answer as the hub does to a request that it does not permit."""
        key, _ = self._split(self.parts)
        name = key.removeprefix("datasets/")
        restricted = f"Access to {name} is restricted"
        status, code, message = {
            "login": (401, "", "Invalid username or password."),
            "token": (401, "", "Invalid credentials in Authorization header"),
            "hidden": (401, "RepoNotFound", "Invalid username or password."),
            "missing": (404, "RepoNotFound", "Repository not found"),
            "gated 401": (401, "GatedRepo", f"{restricted}. You must have access to it. Please log in."),
            "gated 403": (403, "GatedRepo", f"{restricted} and you are not in the authorized list."),
            "revision": (404, "RevisionNotFound", "Invalid rev id"),
            "entry": (404, "EntryNotFound", "Entry not found"),
        }[reason]
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.say(status, {"error": message}, headers)

    def answer(self, path: str, body: bytes) -> None:
        key, rest = self._split(self.parts)
        if path == "/_injected":
            return self.say(200, dict(self.hub.injected))
        if key in self.hub.renamed:
            return self._redirect_renamed(key)
        if rest[:1] == ["resolve"] or self.parts[:2] == ["api", "resolve-cache"] or path.startswith("/cdn/"):
            return self.file(key, rest)
        if self.parts[0] == "api" and self.parts[1:2] in (["models"], ["datasets"]):
            if self.command == "GET" or rest[:1] == ["paths-info"]:
                return self.read_api(key, rest, body)
            return self.write_api(key, rest, body)
        return self.push(path, self.parts, body)

    def _redirect_renamed(self, key: str) -> None:
        new_name = self.hub.renamed[key].removeprefix("datasets/")
        old_name = key.removeprefix("datasets/")
        location = self.path.replace(f"/{quote(old_name)}", f"/{quote(new_name)}", 1)
        self.say(307, b"", {"Location": location})

    def say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else to_json(content)
        start = {"Content-Length": str(len(body)), "Content-Type": "application/json"}
        self._start(status, start | (headers or {}))
        if self.command != "HEAD":
            self._write(body)

    def say_file(
        self, content: Content, start: int, end: int, *, status: int, headers: dict[str, str]
    ) -> None:
        """Bytes start..end of a file, which is read in blocks."""
        self._start(status, {"Content-Length": str(end - start), **headers})
        if self.command == "HEAD":
            return
        drops = self.damage is not None and self.damage.kind == "drop"
        stop = (start + end) // 2 if drops else end
        for offset in range(start, stop, 1 << 20):
            self._write(read(content, offset, min(stop, offset + (1 << 20))))
        if drops:
            self.wfile.flush()
            self._hang_up()

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()

    def _write(self, body: bytes) -> None:
        try:
            self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):  # the client has read enough
            self.close_connection = True

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body


class Server(ThreadingHTTPServer):
    request_queue_size = 64
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that went away


@contextmanager
def serve(port: int = 0) -> Iterator[Hub]:
    """A hub on loopback, and its content network on another port, as LFS files are on another host."""
    hub = Hub()
    handler = type("HandlerOfOneHub", (Handler,), {"hub": hub})
    with ExitStack() as stack:
        hub.url = stack.enter_context(_running(handler, port))
        hub.cdn_url = stack.enter_context(_running(handler, 0))
        yield hub


@contextmanager
def _running(handler: type[Handler], port: int) -> Iterator[str]:
    server = Server(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
