"""A model goes to the hub: a local stand-in of its HTTP API receives what the real client sends."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ray_qa import hub
from ray_qa.errors import OptionError
from tests.conftest import REPOSITORY

TOKEN = "hf_of_the_test"


class Hub:
    """Repositories in memory: what the stand-in was asked for and what it holds."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.commits = 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None: ...

            def do_GET(self) -> None:
                self._answer(404, {"error": "not found"})

            def do_POST(self) -> None:
                if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self._answer(401, {"error": "no valid token"})
                    return
                path = self.path.partition("?")[0]
                if path == "/api/repos/create":
                    asked = json.loads(self._body())
                    hub.created.append(asked)
                    self._answer(200, {"url": f"{hub.address}/{asked['organization'] or 'me'}/{asked['name']}"})
                elif path == "/api/validate-yaml":
                    self._body()
                    self._answer(200, {"errors": [], "warnings": []})
                elif "/preupload/" in path:
                    files = json.loads(self._body())["files"]
                    self._answer(200, {"files": [
                        {"path": file["path"], "shouldIgnore": False,
                         "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular"}
                        for file in files
                    ]})
                elif path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(self._body())["objects"]
                    self._answer(200, {"transfer": "basic", "objects": [
                        {"oid": one["oid"], "size": one["size"], "actions": {
                            "upload": {"href": f"{hub.address}/objects/{one['oid']}", "header": {}}
                        }} for one in objects
                    ]})
                elif "/commit/" in path:
                    self._commit(self._body().decode())
                    self._answer(200, {
                        "success": True, "commitOid": "0" * 40, "hookOutput": "",
                        "commitUrl": f"{hub.address}/me/our-model/commit/{'0' * 40}",
                    })
                else:
                    self._answer(404, {"error": path})

            def do_PUT(self) -> None:
                data = self._body()
                if hashlib.sha256(data).hexdigest() == self.path.rpartition("/")[2]:
                    hub.objects[hashlib.sha256(data).hexdigest()] = data
                self._answer(200, {})

            def _commit(self, lines: str) -> None:
                for line in map(json.loads, lines.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[value["path"]] = hub.objects[value["oid"]]
                hub.commits += 1

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline(), 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def _answer(self, code: int, value: Any) -> None:
                data = json.dumps(value).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture()
def stand_in() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever)
    thread.start()
    yield hub
    hub.server.shutdown()
    thread.join()
    hub.server.server_close()


def push(stand_in: Hub, program: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """Run a program with the stand-in for its hub; huggingface_hub reads the address when it is imported."""
    environment = {
        "HF_ENDPOINT": stand_in.address, "HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_DISABLE_XET": "1",  # large files then go by Git LFS, which a few lines can stand in for
    }
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | environment, capture_output=True, text=True, timeout=120,
        check=False,
    )


def test_every_file_of_the_model_arrives(stand_in: Hub, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "tuned"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    (folder / "training.png").write_bytes(b"\x89PNG" + bytes(2000))
    (folder / "runs").mkdir()
    (folder / "runs" / "events").write_text("stay here")
    done = push(stand_in, (
        "from ray_qa import HappyQuestionAnswering\n"
        f"qa = HappyQuestionAnswering(load_path={str(folder)!r})\n"
        "print(qa.push('our-model'))\n"
        "print(qa.push('team/open', private=False))\n"
    ))
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{stand_in.address}/me/our-model\n{stand_in.address}/team/open\n"
    private = [asked.get("visibility", asked.get("private")) for asked in stand_in.created]
    assert private in (["private", "public"], [True, False]), stand_in.created
    sent = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert "model.safetensors" in sent and stand_in.files == sent
    assert stand_in.commits == 2
    assert TOKEN not in done.stderr


def test_a_refusal_is_said_and_the_token_is_not(stand_in: Hub, tiny_model: Path) -> None:
    done = push(stand_in, f"from ray_qa import hub\nhub.push_folder({str(tiny_model)!r}, 'mine')", token="hf_wrong")
    assert done.returncode == 1 and stand_in.files == {}
    last = done.stderr.strip().splitlines()[-1]
    assert f"could not be sent to mine on {stand_in.address}" in done.stderr and "HF_TOKEN" in last
    assert "hf_wrong" not in done.stderr


def test_names_that_are_not_possible() -> None:
    hub.check_repository("team/model")
    with pytest.raises(OptionError, match=r"'a/b/c' is not possible"):
        hub.check_repository("a/b/c")
