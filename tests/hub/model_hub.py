"""A Hub on this machine that takes models and gives them back, for the real client: enough of its HTTP interface."""

import base64
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(token: str, models: dict[str, dict[str, bytes]] | None = None) -> Iterator["ModelHub"]:
    """Serve a Hub that lets `token` write."""
    hub = ModelHub(token, models or {})
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class ModelHub(http.server.ThreadingHTTPServer):
    def __init__(self, token: str, models: dict[str, dict[str, bytes]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.models = models  # repository -> file name -> content
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}  # large files, by sha256

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """What makes the client talk to this Hub."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
        }

    def take_over(self, monkeypatch, token: str) -> None:
        """Let `dssk.publish` talk to this Hub in this process."""
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("dssk.hub.publish.get_token", lambda: token)
        monkeypatch.setattr("dssk.hub.publish.HfApi", lambda: HfApi(endpoint=self.url, token=token))


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ModelHub

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        repository, _, rest = path.removeprefix("/api/models").strip("/").partition("/resolve/")
        if path.startswith("/api/models/") and repository in self.server.models:
            private = self.server.private.get(repository, False)
            siblings = [{"rfilename": name} for name in self.server.models[repository]]
            self._json(
                {"id": repository, "sha": COMMIT, "private": private, "siblings": siblings, "tags": []}
            )
        elif content := self.server.models.get(repository, {}).get(rest.partition("/")[2]):
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            self._reply(content, 200, headers)
        else:
            self._reply(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urllib.parse.urlsplit(self.path).path
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._reply(b'{"error": "Invalid username or password."}', 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            self._json(
                {
                    "files": [
                        {"path": name, "uploadMode": mode, "shouldIgnore": False}
                        for name, mode in zip(names, modes, strict=True)
                    ]
                }
            )
        elif path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = [{"upload": {"href": f"{self.server.url}/blobs/{entry['oid']}"}} for entry in wanted]
            objects = [{**entry, "actions": actions} for entry, actions in zip(wanted, upload, strict=True)]
            self._json({"transfer": "basic", "objects": objects})
        elif "/commit/" in path:
            self._commit(path.removeprefix("/api/models/").partition("/commit/")[0], body)
        else:
            self._reply(b"{}", 404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._reply(b"", 200)

    def _create(self, wanted: dict) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.server.models:
            known = {"error": "You already created this model repo", "url": f"{self.server.url}/{name}"}
            self._reply(json.dumps(known).encode(), 409)
            return
        self.server.models[name] = {}
        self.server.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
        self._json({"url": f"{self.server.url}/{name}", "name": name})

    def _commit(self, repository: str, body: bytes) -> None:
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                self.server.models[repository][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                self.server.models[repository][value["path"]] = self.server.blobs[value["oid"]]
        url = f"{self.server.url}/{repository}/commit/{COMMIT}"
        self._json({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def _json(self, value: object) -> None:
        self._reply(json.dumps(value).encode(), 200, {"Content-Type": "application/json"})

    def _reply(self, body: bytes, code: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
