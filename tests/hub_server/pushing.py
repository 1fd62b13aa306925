"""Endpoints that write: repositories, LFS uploads, commits and collections."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

from tests.hub_server.storage import ME, Hub, Repo, etag


class Pushing:
    """Part of the handler."""

    hub: Hub
    refuse: Any
    say: Any

    def push(self, path: str, parts: list[str], body: bytes) -> None:
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
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
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

    def write_api(self, name: str, rest: list[str], body: bytes) -> None:
        """/api/models/ORG/NAME/preupload and /commit."""
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.refuse("missing", "")
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
        return self.refuse("entry", "")

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


def mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


def oid(path: str, repo: Repo) -> str | None:
    """As the hub tells it: SHA-256 of LFS files, git's SHA-1 of others."""
    tree = repo.tree("main")
    return etag(path, tree[path]) if path in tree else None
