"""A Hub on this machine with one data set, for the real client: enough of its HTTP interface and no more."""

import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(name: str, files: dict[str, bytes], gated: bool = False) -> Iterator["FakeHub"]:
    """Serve the data set `name` with these files; `gated`: refuse everybody, as without a login."""
    hub = FakeHub(name, files, gated)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class FakeHub(http.server.ThreadingHTTPServer):
    def __init__(self, name: str, files: dict[str, bytes], gated: bool):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.files, self.gated = name, files, gated
        self.bytes_sent = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        resolve, api = f"/datasets/{self.server.name}/resolve/", f"/api/datasets/{self.server.name}"
        if self.server.gated:
            self._reply(b"", 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif path.startswith(resolve):
            self._file(path.removeprefix(resolve).partition("/")[2])
        elif path.startswith(f"{api}/tree/"):
            self._json(self._tree(path.removeprefix(f"{api}/tree/").partition("/")[2]))
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json(
                {"id": self.server.name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            )
        else:
            self._reply(b"{}", 404)

    do_HEAD = do_GET

    def _file(self, name: str) -> None:
        content = self.server.files.get(name)
        headers = {"X-Repo-Commit": COMMIT}
        if content is None:
            self._reply(b"", 404, headers | {"X-Error-Code": "EntryNotFound"})
            return
        headers["ETag"] = f'"{hashlib.sha1(content).hexdigest()}"'
        if wanted := self.headers.get("Range"):
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            self._reply(content[first : last + 1], 206, headers)
        else:
            self._reply(content, 200, headers)

    def _tree(self, folder: str) -> list[dict]:
        """What lies directly in a folder."""
        prefix = f"{folder}/" if folder else ""
        below = {
            name.removeprefix(prefix): content
            for name, content in self.server.files.items()
            if name.startswith(prefix)
        }
        folders = {name.partition("/")[0] for name in below if "/" in name}
        entries = [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in sorted(folders)]
        return entries + [
            {
                "type": "file",
                "path": prefix + name,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
            }
            for name, content in below.items()
            if "/" not in name
        ]

    def _json(self, value: object) -> None:
        self._reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _reply(self, body: bytes, code: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
            self.server.bytes_sent += len(body)
