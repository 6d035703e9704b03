"""A stand-in for the hub's API, as `huggingface_hub` calls it: repositories, branches, commits and files, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """``commits``: {repository: {commit: {path: content}}};  ``branches``: {repository: {branch: commit}}."""

    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    branches: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, authorisation
    address: str = ""

    def at(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.commits.get(repo)
        if commits is None:
            return None
        commit = self.branches[repo].get(revision, revision)
        return (commit, commits[commit]) if commit in commits else None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        found = self.at(repo, revision)
        assert found is not None
        return found[1]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def answer(self, status: int, body: Any = None, **headers: str) -> None:
            content = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                parts = []
                while size := int(self.rfile.readline(), 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def take(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            return path

        def missing(self, what: str) -> None:
            self.answer(404, {"error": f"{what} not found"}, X_Error_Code=f"{what}NotFound", X_Error_Message=f"{what} not found")

        def do_POST(self) -> None:
            path, body = self.take(), self.body()
            if self.headers.get("Authorization") == "Bearer hf_reader":
                return self.answer(403, {"error": "this token may not write"})
            if path == "/api/validate-yaml":
                return self.answer(200, {"errors": [], "warnings": []})
            if path == "/api/repos/create":
                asked = json.loads(body)
                repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                if repo in hub.commits:
                    return self.answer(409, {"error": "exists", "url": f"{hub.address}/{repo}"})
                hub.commits[repo], hub.branches[repo] = {"0" * 40: {}}, {"main": "0" * 40}
                return self.answer(200, {"url": f"{hub.address}/{repo}", "name": repo})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
                repo, branch = found.groups()
                hub.branches[repo].setdefault(branch, hub.branches[repo]["main"])
                return self.answer(200)
            if found := re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/.+", path):
                files = json.loads(body)["files"]
                return self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
                repo, branch = found.groups()
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                files = dict(hub.files(repo, branch))
                for line in lines:
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                commit = hashlib.sha1(body + hub.branches[repo][branch].encode()).hexdigest()
                hub.commits[repo][commit], hub.branches[repo][branch] = files, commit
                return self.answer(200, {"commitUrl": f"{hub.address}/{repo}/commit/{commit}", "commitOid": commit, "success": True})
            return self.answer(404, {"error": path})

        def do_GET(self) -> None:
            path = self.take()
            if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path):
                repo, what, revision = found.groups()
                there = hub.at(repo, revision)
                if there is None:
                    return self.missing("Revision" if repo in hub.commits else "Repo")
                commit, files = there
                listed = [
                    {"type": "file", "path": n, "rfilename": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                    for n, c in files.items()
                ]
                return self.answer(200, listed if what == "tree" else {"id": repo, "sha": commit, "siblings": listed})
            if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                repo, revision, name = found.groups()
                there = hub.at(repo, revision)
                if there is None or name not in there[1]:
                    return self.missing("Entry")
                content = there[1][name]
                return self.answer(200, content, X_Repo_Commit=there[0], ETag=f'"{hashlib.sha1(content).hexdigest()}"')
            return self.answer(404, {"error": path})

        do_HEAD = do_GET

    return Handler


@contextmanager
def hub_here() -> Iterator[Hub]:
    """A hub of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
