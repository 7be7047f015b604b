"""A stand-in for the model hub's HTTP interface on 127.0.0.1: as much of it as an upload needs."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml


class Hub(ThreadingHTTPServer):
    """`repos` maps an id to its visibility and files; `tokens` are those it lets in."""

    def __init__(self, token: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.repos: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Hub

    def do_POST(self) -> None:
        """Everything but the bytes of large files."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                }
                for file in files
            ]
            self._answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif self.path.endswith("/commit/main"):
            self._commit(self.path.removeprefix("/api/models/").removesuffix("/commit/main"), body)
        else:
            self._answer(404, {"error": "no such page"})

    def do_PUT(self) -> None:
        """The bytes of a large file."""
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.stored[self.path.rpartition("/")[2]] = data
        self._answer(200, {})

    def log_message(self, *_: object) -> None:
        """Says nothing."""

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not name.startswith("me/"):
            self._answer(403, {"error": f"You don't have the rights to create {name}"})
            return
        there = name in self.server.repos
        self.server.repos.setdefault(name, {"visibility": asked.get("visibility"), "files": {}})
        self._answer(409 if there else 200, {"url": f"{self.server.url}/{name}", "id": name})

    def _validate(self, card: str) -> None:
        head = yaml.safe_load(card.split("---\n")[1])
        good = isinstance(head.get("license"), str) and isinstance(head.get("tags"), list)
        errors = [] if good else [{"message": '"license" must be a string'}]
        self._answer(200 if good else 400, {"errors": errors, "warnings": []})

    def _commit(self, name: str, body: bytes) -> None:
        files = self.server.repos[name]["files"]
        for line in body.decode().splitlines():
            one = json.loads(line)
            value = one["value"]
            if one["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif one["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        said = {"success": True, "commitOid": "0" * 40, "hookOutput": "", "commitUrl": "",
                "pullRequestUrl": None}  # fmt: skip
        self._answer(200, {**said, "commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}"})

    def _answer(self, code: int, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def hub(token: str) -> Iterator[Hub]:
    """A hub that runs meanwhile."""
    server = Hub(token)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
