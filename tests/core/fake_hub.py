# SPDX-License-Identifier: Apache-2.0
"""A model hub on loopback: enough of the protocol for huggingface_hub to download from it.

It can also fail and lie: a `Fault` says how, file by file.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

_NAME = r"([\w.-]+(?:/[\w.-]+)?)"
_INFO = re.compile(rf"/api/models/{_NAME}(?:/revision/([^/]+))?")
_TREE = re.compile(rf"/api/models/{_NAME}/tree/([^/]+)")
_FILE = re.compile(rf"/{_NAME}/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d+)-")


@dataclass(frozen=True)
class Fault:
    """What the hub does wrong with a file.

    Attributes:
        tree, head, get: bytes added to its size in the list of files, before and with the download.
        stop: the connection breaks when so many bytes of the file have been sent.
        silent: the connection does not break then, but nothing more comes.
    """

    tree: int = 0
    head: int = 0
    get: int = 0
    stop: int | None = None
    silent: bool = False


@dataclass
class FakeRepo:
    """The files of one model; `gated` lets everybody list them and nobody fetch them."""

    files: dict[str, bytes]
    gated: bool = False
    branches: tuple[str, ...] = ("main",)
    faults: dict[str, Fault] = field(default_factory=dict)

    @property
    def sha(self) -> str:
        """What stands for the commit."""
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()

    def fault(self, path: str) -> Fault:
        """What goes wrong with a file."""
        return self.faults.get(path, Fault())


@dataclass
class FakeHub:
    """Serve `repos` while the context lasts; `requests` keeps method and path of each question."""

    repos: dict[str, FakeRepo]
    requests: list[str] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def fetched(self, name: str) -> list[str]:
        """The files of a model that were asked for, each once, sorted."""
        start = f"GET /{name}/resolve/"
        paths = [request for request in self.requests if request.startswith(start)]
        return sorted({path.removeprefix(start).partition("/")[2] for path in paths})


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep quiet: the hub keeps its own list."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        for pattern, answer in ((_TREE, self._tree), (_INFO, self._info), (_FILE, self._file)):
            match = pattern.fullmatch(path)
            if match is None:
                continue
            name, revision, *rest = match.groups()
            repo = self.hub.repos.get(name)
            if repo is None:
                return self._refuse(404, "RepoNotFound", "Repository not found")
            if revision not in (None, repo.sha, *repo.branches):
                return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return answer(name, repo, *rest)
        return self._refuse(404, "NotFound", "No such route")

    def _info(self, name: str, repo: FakeRepo) -> None:
        files = [{"rfilename": file} for file in repo.files]
        self._json({"_id": "0", "id": name, "sha": repo.sha, "private": False, "siblings": files})

    def _tree(self, name: str, repo: FakeRepo) -> None:
        self._json(
            [
                {
                    "type": "file",
                    "path": path,
                    "size": len(data) + repo.fault(path).tree,
                    "oid": _digest(data),
                }
                for path, data in repo.files.items()
            ]
        )

    def _file(self, name: str, repo: FakeRepo, path: str) -> None:
        if repo.gated:
            return self._refuse(403, "GatedRepo", "Access to this model is restricted")
        if path not in repo.files:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        data, fault = repo.files[path], repo.fault(path)
        headers = {"X-Repo-Commit": repo.sha, "ETag": f'"{_digest(data)}"'}
        if self.command == "HEAD":
            return self._send(200, b"", headers, len(data) + fault.head)
        match = _RANGE.match(self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        announced = len(data) + fault.get
        if match:
            headers["Content-Range"] = f"bytes {start}-{announced - 1}/{announced}"
        if start > len(data) or (match and start == len(data)):
            return self._refuse(416, "RangeNotSatisfiable", "There is no more")
        body = data[start : None if fault.stop is None else max(fault.stop, start)]
        return self._send(206 if match else 200, body, headers, announced - start, fault.silent)

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str],
        announced: int | None = None,
        silent: bool = False,
    ) -> None:
        """Answer; a body that is not as long as announced ends the connection."""
        length = len(body) if announced is None else announced
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.close_connection = len(body) != length
            if silent and self.close_connection:
                self.wfile.flush()
                self.hub.closing.wait()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
