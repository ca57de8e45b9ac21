"""A model hub of one model, for tests: the few requests of huggingface_hub that finding and fetching it takes.

    python -m tests.hub_server FOLDER HOST PORT        serves the files of FOLDER as the model org/tiny, logs requests
"""

from __future__ import annotations

import hashlib
import json
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MODEL = "org/tiny"
COMMIT = "c0ffee" + 34 * "0"


class Handler(BaseHTTPRequestHandler):
    def __init__(self, folder: Path, *args: object) -> None:
        self.folder = folder
        super().__init__(*args)  # type: ignore[arg-type]

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        if path in (f"/api/models/{MODEL}/revision/main", f"/api/models/{MODEL}/revision/{COMMIT}"):
            self._send_json({
                "id": MODEL, "modelId": MODEL, "sha": COMMIT, "private": False, "gated": False, "tags": [],
                "siblings": [{"rfilename": file.name} for file in files],
            }, with_body)
            return
        if path == f"/api/models/{MODEL}/tree/{COMMIT}":
            self._send_json([
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": hashlib.sha1(b"").hexdigest()}
                for file in files
            ], with_body)
            return
        for revision in ("main", COMMIT):
            file = self.folder / path.removeprefix(f"/{MODEL}/resolve/{revision}/")
            if path.startswith(f"/{MODEL}/resolve/{revision}/") and file.is_file():
                data = file.read_bytes()
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                self._send(200, data, headers, with_body)
                return
        self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, with_body)

    def _send_json(self, value: object, with_body: bool) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"}, with_body)

    def _send(self, code: int, data: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.wfile.write(data)


def main() -> None:
    folder, host, port = sys.argv[1:]
    ThreadingHTTPServer((host, int(port)), partial(Handler, Path(folder))).serve_forever()


if __name__ == "__main__":
    main()
