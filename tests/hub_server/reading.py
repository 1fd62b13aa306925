"""Endpoints that read: repository information, trees, paths, references, and files with ranges."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, quote, urlencode

from tests.hub_server.faults import Fault
from tests.hub_server.storage import (
    MAIN,
    Content,
    Hub,
    Repo,
    Tree,
    entry,
    etag,
    folder_entry,
    is_lfs,
    read,
    sha256,
    size_of,
)


class Reading:
    """Part of the handler."""

    hub: Hub
    command: str
    headers: Any
    parts: list[str]
    query: dict[str, str]
    damage: Fault | None
    refuse: Any
    say: Any
    say_file: Any

    def read_api(self, key: str, rest: list[str], body: bytes) -> None:
        """/api/models/ORG/NAME/... and /api/datasets/ORG/NAME/..."""
        repo = self.hub.repos[key]
        if rest[:1] == ["refs"]:
            return self._references(repo)
        if rest == ["auth-check"]:  # not permitted requests were refused before
            return self.say(200, b"OK")
        revision = rest[1] if len(rest) > 1 else MAIN
        commit = repo.resolve(revision)
        if commit is None:
            return self.refuse("revision", "")
        tree = repo.history[commit]
        if rest[:1] == ["tree"]:
            return self._tree(tree, "/".join(rest[2:]))
        if rest[:1] == ["paths-info"]:
            return self._paths(tree, body)
        if rest[:1] == ["commits"]:
            about = {"authors": [], "title": "a commit", "message": "", "date": "2026-01-01T00:00:00.000Z"}
            return self.say(200, [{"id": commit, **about}])
        if rest and rest[0] != "revision":
            return self.refuse("entry", "")
        return self._information(key, repo, commit)

    def _information(self, key: str, repo: Repo, commit: str) -> None:
        name = key.removeprefix("datasets/")
        siblings: list[dict[str, Any]] = []
        for path, content in repo.history[commit].items():
            sibling: dict[str, Any] = {"rfilename": path}
            if self.query.get("blobs", "").lower() == "true":
                listed = entry(path, content)
                sibling |= {"size": listed["size"], "blobId": listed["oid"]}
                if "lfs" in listed:
                    lfs = listed["lfs"]
                    sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": 130}
            siblings.append(sibling)
        information = {
            "_id": "0" * 24,
            "id": name,
            "author": name.split("/")[0],
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "sha": commit,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": siblings,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }
        if not key.startswith("datasets/"):
            information["modelId"] = name
        self.say(200, information)

    def _references(self, repo: Repo) -> None:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": repo.commit_of(name)}
            for name in repo.branches
        ]
        self.say(200, {"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def _tree(self, tree: Tree, folder: str) -> None:
        prefix = f"{folder}/" if folder else ""
        if prefix and not any(path.startswith(prefix) for path in tree):
            return self.refuse("entry", "")
        expand = self.query.get("expand", "").lower() == "true"
        recursive = self.query.get("recursive", "").lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for path in sorted(tree):
            if not path.startswith(prefix):
                continue
            parents = path.removeprefix(prefix).split("/")[:-1]
            for depth in range(1, len(parents) + 1 if recursive else min(len(parents), 1) + 1):
                parent = prefix + "/".join(parents[:depth])
                entries.setdefault(parent, folder_entry(parent, expand=expand))
            if recursive or not parents:
                entries[path] = entry(path, tree[path], expand=expand)
        size = min(int(self.query.get("limit", self.hub.page_size)), self.hub.page_size)
        start = int(self.query.get("cursor", 0))
        headers: dict[str, str] = {}
        if start + size < len(entries):
            path = "/".join(quote(part, safe="") for part in self.parts)
            query = urlencode(self.query | {"cursor": str(start + size)})
            headers["Link"] = f'<{self.hub.url}/{path}?{query}>; rel="next"'
        self.say(200, list(entries.values())[start : start + size], headers)

    def _paths(self, tree: Tree, body: bytes) -> None:
        if (self.headers.get("Content-Type") or "").startswith("application/json"):
            requested = json.loads(body)
            paths, expand = requested["paths"], bool(requested.get("expand"))
        else:
            form = parse_qs(body.decode())
            paths, expand = form.get("paths", []), form.get("expand", [""])[0].lower() == "true"
        entries = []
        for path in paths:
            if path in tree:
                entries.append(entry(path, tree[path], expand=expand))
            elif any(known.startswith(f"{path}/") for known in tree):
                entries.append(folder_entry(path, expand=expand))
        self.say(200, entries)

    def file(self, key: str, rest: list[str]) -> None:
        """A file: /resolve/, the relative redirect of small files, and the content network of LFS files."""
        repo = self.hub.repos[key]
        is_final = self.parts[:2] == ["api", "resolve-cache"]
        is_cdn = self.parts[0] == "cdn"
        if not is_final:  # .../resolve/REVISION/PATH
            rest = rest[1:]
        commit = repo.resolve(rest[0])
        if commit is None:
            return self.refuse("revision", "")
        path = "/".join(rest[1:])
        content = repo.history[commit].get(path)
        if content is None:
            message = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.say(404, {"error": "Entry not found"}, {**message, "X-Repo-Commit": commit})
        tag = etag(path, content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if is_cdn and self.headers.get("Authorization"):  # as a store of signed URLs
            return self.say(400, {"error": "Only one auth mechanism allowed"})
        if is_cdn or is_final:
            return self._bytes(content, headers)
        target = "/".join(quote(part) for part in [key, "resolve", commit, *rest[1:]])
        if is_lfs(path, content):
            linked = {"X-Linked-Size": str(size_of(content)), "X-Linked-ETag": f'"{tag}"'}
            location = f"{self.hub.cdn_url}/cdn/{target}?Signature={sha256(content)}"
            headers["ETag"] = f'"{commit[:32]}"'
            return self.say(302, b"", {**headers, **linked, "Location": location})
        kind = "datasets" if key.startswith("datasets/") else "models"
        name = key.removeprefix("datasets/")
        target = "/".join(quote(part) for part in [name, commit, *rest[1:]])
        return self.say(307, b"", {**headers, "Location": f"/api/resolve-cache/{kind}/{target}"})

    def _bytes(self, content: Content, headers: dict[str, str]) -> None:
        """A file, or its range that is requested, damaged if a fault says so."""
        if self.damage is not None and self.damage.kind in ("resize", "corrupt"):
            whole = read(content)
            if self.damage.kind == "resize":
                content = whole + b"more\n"
                headers["ETag"] = '"changed"'
            else:
                middle = len(whole) // 2
                content = whole[:middle] + bytes(255 - byte for byte in whole[middle : middle + 64])
                content += whole[middle + 64 :]
        size = size_of(content)
        headers["Content-Type"] = "application/octet-stream"
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if match is None or not any(match.groups()):
            return self.say_file(content, 0, size, status=200, headers=headers)
        first, last = match.groups()
        start = int(first) if first else max(0, size - int(last))
        end = min(size, int(last) + 1) if first and last else size
        if start >= size or start >= end:
            return self.say(416, b"", {**headers, "Content-Range": f"bytes */{size}"})
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        return self.say_file(content, start, end, status=206, headers=headers)
