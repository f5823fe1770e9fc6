"""A local server that speaks the Hugging Face hub's wire format for downloads, as huggingface_hub's client needs it.

Headers are those of ``https://huggingface.co/MODEL/resolve/REVISION/FILE``; errors carry the hub's ``X-Error-Code``.
Of the API there is what a snapshot asks for: ``/api/models/MODEL`` and its ``/revision/...`` and ``/tree/...``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from nanodit.files import sha256_file

API = re.compile(r"/api/models/(?P<model>[^/]+/[^/?]+)(/(?P<what>revision|tree)/(?P<revision>[^/?]+))?(\?.*)?")
RESOLVE = re.compile(r"/(?P<model>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass
class HubServer:
    """Models by name; ``commits`` maps (model, commit) to files, ``branches`` maps (model, branch) to a commit.

    A file is its bytes, or a path from which it is sent.
    """

    url: str = ""
    commits: dict[tuple[str, str], dict[str, bytes | Path]] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: dict[str, set[str]] = field(default_factory=dict)  # model -> tokens that may read it
    broken: set[str] = field(default_factory=set)  # files that are answered with 503
    after: dict[str, Callable[[], object]] = field(default_factory=dict)  # what happens once a file has been sent
    requests: list[tuple[str, str]] = field(default_factory=list)  # method, path

    def push(self, model: str, files: Mapping[str, bytes | Path] | Path) -> str:
        """A new commit on ``main``; returns its hash."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        content = "".join(f"{name}{_sha256(data)}" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{model}{content}".encode()).hexdigest()
        self.commits[model, commit] = dict(files)
        self.branches[model, "main"] = commit
        return commit

    def downloads(self) -> list[str]:
        """The paths of files that were sent, not only asked about."""
        return [path for method, path in self.requests if method == "GET"]


@cache
def _sha256(data: bytes | Path) -> str:
    return sha256_file(data) if isinstance(data, Path) else hashlib.sha256(data).hexdigest()


def _size(data: bytes | Path) -> int:
    return data.stat().st_size if isinstance(data, Path) else len(data)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.hub
        hub.requests.append((self.command, self.path))
        if (match := API.fullmatch(self.path)) and (match["model"], "main") in hub.branches:
            return self._describe(match["model"], match["revision"] or "main", match["what"] == "tree")
        match = RESOLVE.fullmatch(self.path)
        if match is None or not any(model == match["model"] for model, _ in hub.commits):
            return self._refuse(401, "RepoNotFound")  # the hub does not tell strangers what exists
        model, revision = match["model"], match["revision"]
        commit = hub.branches.get((model, revision), revision)
        if (model, commit) not in hub.commits:
            return self._refuse(404, "RevisionNotFound")
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if model in hub.gated and token not in hub.gated[model]:
            return self._refuse(403 if token else 401, "GatedRepo")
        if match["file"] in hub.broken:
            return self._refuse(503, "")
        data = hub.commits[model, commit].get(match["file"])
        if data is None:
            return self._refuse(404, "EntryNotFound", commit)
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_sha256(data)}"')
        self.send_header("Content-Length", str(_size(data)))
        self.end_headers()
        if body:
            with data.open("rb") if isinstance(data, Path) else io.BytesIO(data) as stream:
                shutil.copyfileobj(stream, self.wfile)
            if happens := hub.after.pop(match["file"], None):
                happens()
        return None

    def _describe(self, model: str, revision: str, tree: bool) -> None:
        commit = self.hub.branches.get((model, revision), revision)
        files = self.hub.commits[model, commit]
        entries = [
            {"type": "file", "path": name, "size": _size(data), "oid": _sha256(data)[:40]}
            for name, data in files.items()
        ]
        info = {"id": model, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        answer = json.dumps(entries if tree else info).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Keep the tests' output clean."""


def serve() -> tuple[HubServer, ThreadingHTTPServer]:
    """Start a hub on a free port; shut the second one down at the end."""
    hub = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return hub, server
