"""Defences that docs/security.md names and that have no better place; and that all those it names are there."""

from __future__ import annotations

import ast
import gzip
import json
import logging
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ray_qa import cli, preparation
from ray_qa.errors import CSVError, ModelError
from ray_qa.model import resolve_model
from ray_qa.preparation import _published, shard_name
from ray_qa.storage import locate
from tests.conftest import EXAMPLES, REPOSITORY

PACKAGE = REPOSITORY / "ray_qa"


def test_every_defence_has_the_test_that_is_named() -> None:
    text = (REPOSITORY / "docs" / "security.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    assert len(named) > 20
    for file, name in named:
        assert re.search(rf"^def {name}\(", (REPOSITORY / file).read_text(), re.M), (file, name)
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| threat")]
    assert all("`" in row.split("|")[3] or row.split("|")[3].strip() == "below" for row in rows)


_UNPICKLERS = {
    "pickle.load", "pickle.loads", "torch.load", "joblib.load", "dill.loads", "yaml.load", "np.load", "marshal.loads",
}


def test_nothing_that_is_read_is_unpickled() -> None:
    """`pickle.loads` stands in one function, for cells between driver and workers; torch.load and its like nowhere."""
    found = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                if name in _UNPICKLERS:
                    found.add((file.name, name))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec", "compile"), file
    assert found == {("cluster.py", "pickle.loads")}


class _Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_a_model_folder_is_never_loaded(tiny_model: Path, tmp_path: Path) -> None:
    from ray_qa.model import load_model

    folder, trap = tmp_path / "model", tmp_path / "sprung"
    shutil.copytree(tiny_model, folder)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "model.pkl"):
        (folder / name).write_bytes(pickle.dumps(_Trap(trap)))
    load_model(resolve_model(folder).directory)
    assert not trap.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="which can run code"):
        resolve_model(folder)
    assert not trap.exists()
    with pytest.raises(FileExistsError):  # it would have
        trap.mkdir()
        pickle.loads((folder / "model.pkl").read_bytes())


def test_a_compressed_bomb_is_streamed(tmp_path: Path) -> None:
    """Less than two megabytes that are 300: indexed in bounded memory."""
    bomb = tmp_path / "bomb.csv.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as stream:
        stream.write(b"context,question\n")
        for _ in range(300):
            stream.write(b"a" * (1 << 20) + b",q\n")
    assert bomb.stat().st_size < 2 << 20
    program = (
        "import resource, sys; from ray_qa.csv_index import index_csv; from ray_qa.storage import locate\n"
        "from ray_qa.errors import RayQAError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: print(index_csv([locate(sys.argv[1])], required_columns=['context']).num_rows)\n"
        "except RayQAError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, bomb]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    rows, kilobytes = done.stdout.split("\n")[:2]
    assert rows == "300" and int(kilobytes) < 150_000


def test_an_endless_header_is_refused(tmp_path: Path) -> None:
    from ray_qa.csv_index import index_csv

    endless = tmp_path / "endless.csv"
    endless.write_bytes(b"a" * (17 << 20))
    with pytest.raises(CSVError, match="the header does not end within 16 MiB"):
        index_csv([locate(endless)], required_columns=())


def test_columns_cannot_name_files(tmp_path: Path) -> None:
    """Only row numbers make names, and those are digits."""
    from ray_qa.results import part_name

    assert re.fullmatch(r"part-\d{12}\.parquet", part_name(7)) and re.fullmatch(r"shard-\d{12}\.arrow", shard_name(7))
    for make in (part_name, shard_name):
        with pytest.raises(ValueError):
            make("../../x")  # type: ignore[arg-type]


@pytest.mark.parametrize("name, first_row", [("../../escaped", 0), (shard_name(1), 0), (shard_name(0), "0")])
def test_a_manifest_cannot_name_files(tmp_path: Path, name: str, first_row: object) -> None:
    """Somebody who may write to the work folder cannot make workers write elsewhere."""
    (tmp_path / "work").mkdir()
    (tmp_path / "escaped").write_bytes(b"12345")
    (tmp_path / "work" / shard_name(0)).write_bytes(b"12345")
    shard = dict(name=name, first_row=first_row, num_rows=1, num_windows=1, num_tokens=1, num_bad=0, num_bytes=5)
    report = preparation.PreparationReport().to_json()
    manifest = {"shards": [shard], "report": report}
    (tmp_path / "work" / preparation.MANIFEST).write_text(json.dumps(manifest))

    class Maker:
        template, max_seq_length, doc_stride = None, 8, 2

    assert _published(locate(tmp_path / "work"), "key", Maker(), None) is None  # type: ignore[arg-type]
    good = shard | {"name": shard_name(0), "first_row": 0}
    (tmp_path / "work" / preparation.MANIFEST).write_text(json.dumps(manifest | {"shards": [good]}))
    assert _published(locate(tmp_path / "work"), "key", Maker(), None) is not None  # type: ignore[arg-type]


class _Forbids(BaseHTTPRequestHandler):
    """A store that lets nobody in."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def forbidden() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Forbids) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_no_credentials_in_what_a_job_says(
    forbidden: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_ENDPOINT_URL", forbidden)
    secret = "s3cr3t-key"
    for words in (
        ["eval", "--input", f"s3://key-1:{secret}@bucket/rows.csv", "--model", str(EXAMPLES)],
        ["eval", "--input", str(EXAMPLES / "eval.csv"), "--model", f"s3://key-1:{secret}@bucket/model"],
        ["test", "--verify", f"s3://key-1:{secret}@bucket/answers"],
        ["eval", "--input", f"nosuch://key-1:{secret}@bucket/rows.csv", "--model", str(EXAMPLES)],
    ):
        assert cli.main(words) in (1, 2), words
        said = capsys.readouterr()
        assert '"status": "failed"' in said.out
        assert secret not in said.out + said.err + caplog.text and "key-1" not in said.out + said.err, words


def test_the_hub_token_is_not_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
    assert cli.main(["eval", "--input", str(EXAMPLES / "eval.csv"), "--model", "nobody/nothing"]) == 2
    said = capsys.readouterr()
    assert "nobody/nothing" in said.err and "hf_s3cr3t" not in said.out + said.err + caplog.text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_a_cluster_with_tls(tmp_path: Path) -> None:
    """A head with TLS and token: a task runs on it; without the certificates it cannot be reached."""
    from tests.test_jobs import BIN, free_ports

    key, certificate = tmp_path / "node.key", tmp_path / "node.crt"
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost", "-addext",
         names, "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )
    port, agent = free_ports(2)
    plain = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2, "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    tls = plain | {
        "RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": str(certificate), "RAY_TLS_SERVER_KEY": str(key),
        "RAY_TLS_CA_CERT": str(certificate),
    }
    start = [
        "ray", "start", "--head", f"--port={port}", "--node-ip-address=127.0.0.1", "--include-dashboard=false",
        "--num-cpus=1", "--disable-usage-stats", f"--temp-dir=/tmp/tls-{port}", "--block",
        f"--dashboard-agent-listen-port={agent}",
    ]
    program = (
        f"import ray; ray.init(address='127.0.0.1:{port}', logging_level='ERROR', log_to_driver=False,"
        " _node_ip_address='127.0.0.1'); print(ray.get(ray.remote(lambda: 6 * 7).remote()))"
    )
    with open(tmp_path / "head.log", "w") as log:
        head = subprocess.Popen(start, env=tls, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(30):
            done = subprocess.run([sys.executable, "-c", program], env=tls, capture_output=True, text=True, timeout=120)
            if done.returncode == 0:
                break
            assert head.poll() is None, (tmp_path / "head.log").read_text()
        assert done.stdout.strip() == "42", done.stderr
        refused = subprocess.run(
            ["timeout", "40", sys.executable, "-c", program], env=plain, capture_output=True, text=True
        )
        assert refused.returncode != 0 and "42" not in refused.stdout
    finally:
        head.terminate()
        try:
            head.wait(60)
        finally:
            head.kill()
