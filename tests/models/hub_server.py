"""A hub on this machine: what the hub's library asks of huggingface.co, for one small repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`refusal`: the status of every answer, and the hub's name for the reason. `breaks`: how many
    downloads of a file end in its middle. `stuck`: files of which only the first half comes. `ranges`:
    the parts of files that were asked for."""

    repository: str
    files: Mapping[str, bytes]
    token: str = ""
    refusal: tuple[int, str] | None = None
    breaks: dict[str, int] = field(default_factory=dict)
    stuck: tuple[str, ...] = ()
    released: threading.Event = field(default_factory=threading.Event)
    fetched: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        api, files = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
        if hub.refusal is not None:
            self._send(hub.refusal[0], b"", body, {"X-Error-Code": hub.refusal[1]})
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._send(401, b"", body, {"X-Error-Code": "GatedRepo"})
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
            self._send(200, _json({"id": hub.repository, "sha": COMMIT, "siblings": siblings}), body)
        elif path == f"{api}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": _digest(data)}
                for name, data in hub.files.items()
            ]
            self._send(200, _json(tree), body)
        elif (
            path.startswith(files) and (name := path.removeprefix(files).partition("/")[2]) in hub.files
        ):
            self._file(name, body)
        else:
            self._send(404, b"", body, {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str, body: bool) -> None:
        hub, data = self.hub, self.hub.files[name]
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not body:
            self._send(200, data, False, headers)
            return
        hub.fetched.append(name)
        asked, start = self.headers.get("Range"), 0
        if asked is not None:
            hub.ranges.append((name, asked))
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if name in hub.stuck:
            self._send(200, data, True, headers, len(data) // 2)
            hub.released.wait()
            self.close_connection = True
            return
        if hub.breaks.get(name, 0):
            hub.breaks[name] -= 1
            self.close_connection = True
            headers["Connection"] = "close"
            self._send(
                200 if asked is None else 206, data[start:], True, headers, len(data[start:]) // 2
            )
            return
        self._send(200 if asked is None else 206, data[start:], True, headers)

    def _send(
        self,
        status: int,
        data: bytes,
        body: bool,
        headers: Mapping[str, str] = {},
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
            self.wfile.flush()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
