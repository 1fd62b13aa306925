"""A hub on loopback for huggingface_hub's client: login, repositories, LFS, commits, files, collections.

It holds everything in memory and breaks when told to: `faults` is a list of [method, part of the path,
answer, how many times more], where an answer is a status, "drop", which closes the connection without a word,
or (status, content, headers).
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_secret"
ME, OTHERS = "me", "somebody"


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()


@dataclass
class Hub:
    """What is stored, and what was asked: (method, path)."""

    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    collections: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[list[Any]] = field(default_factory=list)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def handle_any(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path))
        for fault in self.hub.faults:
            method, part, answer, left = fault
            if left and method == self.command and part in path:
                fault[3] -= 1
                if isinstance(answer, tuple):  # status, content and headers as they are
                    return self.say(*answer)
                if answer == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return None
                return self.say(
                    answer, {"error": "out of order"}, {"Retry-After": "0"} if answer == 429 else {}
                )
        if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.say(401, {"error": "Invalid username or password."})
        return self.answer(path, body)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def answer(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/whoami-v2":
            return self.say(200, {"name": ME, "type": "user", "orgs": []})
        if path == "/api/validate-yaml":
            return self.say(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path.startswith("/lfs/"):
            if hashlib.sha256(body).hexdigest() != parts[1]:
                return self.say(400, {"error": "another content"})
            self.hub.lfs[parts[1]] = body
            return self.say(200, {})
        if parts[:2] == ["api", "collections"]:
            return self.collect(parts[2:], body)
        if parts[:2] == ["api", "models"]:
            return self.repo_api("/".join(parts[2:4]), parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if len(parts) > 4 and parts[2] == "resolve":
            return self.resolve("/".join(parts[:2]), "/".join(parts[4:]))
        return self.say(404, {"error": f"no {path}"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or ME}/{asked['name']}"
        if name in self.hub.repos:
            return self.say(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
        if not name.startswith(f"{ME}/"):
            return self.say(403, {"error": "not yours"})
        self.hub.repos[name] = Repo(
            asked.get("private", asked.get("visibility") == "private"),
            {".gitattributes": b"*.safetensors filter=lfs\n"},
        )
        return self.say(200, {"url": f"{self.hub.url}/{name}", "name": name, "id": "1"})

    def repo_api(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.say(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest[:1] == ["preupload"]:
            files = [file["path"] for file in json.loads(body)["files"]]
            return self.say(
                200,
                {
                    "files": [
                        {
                            "path": path,
                            "uploadMode": mode(path),
                            "shouldIgnore": False,
                            "oid": oid(path, repo),
                        }
                        for path in files
                    ]
                },
            )
        if rest[:1] == ["commit"]:
            if not name.startswith(f"{ME}/"):
                return self.say(403, {"error": "not yours"})
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "header":
                    repo.commits.append(line["value"]["summary"])
                elif line["key"] == "file":
                    repo.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    repo.files[line["value"]["path"]] = self.hub.lfs[line["value"]["oid"]]
            head = repo.head
            return self.say(
                200, {"commitUrl": f"{self.hub.url}/{name}/commit/{head}", "commitOid": head, "success": True}
            )
        if rest[:1] == ["tree"]:
            return self.say(
                200,
                [
                    {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
                    for path, content in repo.files.items()
                ],
            )
        siblings = [{"rfilename": path} for path in repo.files]
        return self.say(
            200,
            {
                "id": name,
                "modelId": name,
                "private": repo.private,
                "sha": repo.head,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
            },
        )

    def batch(self, asked: dict[str, Any]) -> None:
        objects = [
            {"oid": o["oid"], "size": o["size"]}
            | (
                {}
                if o["oid"] in self.hub.lfs
                else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}}}
            )
            for o in asked["objects"]
        ]
        return self.say(200, {"transfer": "basic", "objects": objects})

    def resolve(self, name: str, path: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None or path not in repo.files:
            return self.say(
                404,
                {"error": "Entry not found"},
                {"X-Error-Code": "EntryNotFound" if repo else "RepoNotFound"},
            )
        content = repo.files[path]
        etag = hashlib.sha256(content).hexdigest()
        return self.say(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": repo.head})

    def collect(self, rest: list[str], body: bytes) -> None:
        if not rest:
            asked = json.loads(body)
            slug = f"{asked['namespace']}/{asked['title']}-1"
            if slug in self.hub.collections:
                return self.say(409, {"slug": slug, "error": "exists"})
            about = {
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "position": 0,
                "theme": "blue",
                "upvotes": 0,
                "owner": asked["namespace"],
            }
            self.hub.collections[slug] = {
                "slug": slug,
                "title": asked["title"],
                "private": asked["private"],
                "items": [],
                **about,
            }
            return self.say(200, self.hub.collections[slug])
        collection = self.hub.collections["/".join(rest[:2])]
        if rest[2:] == ["items"]:
            item = json.loads(body)["item"]
            if any(known["id"] == item["id"] for known in collection["items"]):
                return self.say(409, {"error": "is in it"})
            collection["items"].append(
                {"_id": str(len(collection["items"])), "id": item["id"], "type": item["type"], "position": 0}
            )
        return self.say(200, collection)

    def say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunks(self) -> bytes:
        found = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().strip() or b"0", 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return found


def mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def oid(path: str, repo: Repo) -> str | None:
    """As the hub tells it: SHA-256 of LFS files, git's SHA-1 of others."""
    if path not in repo.files:
        return None
    content = repo.files[path]
    if mode(path) == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    handler = type("HandlerOfOneHub", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
