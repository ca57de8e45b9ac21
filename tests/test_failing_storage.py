"""Storage that fails while a job works: a disk that is full, one that can be written no more, a store with hiccups."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray.train import ScalingConfig

from benchmarks.kills import Job, make_slow_model, write_rows
from ray_qa import open_results, results
from ray_qa.errors import OutputError, WorkError
from ray_qa.prediction import predict
from ray_qa.schema import PREDICTIONS
from ray_qa.storage import locate
from tests.test_storage_s3 import BUCKET, Server
from tests.test_storage_s3 import server as server  # a fixture


class Disk:
    """A file system in memory, of a size that can be changed, and that can be made read-only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("size=1m")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], check=True, capture_output=True)

    def change(self, options: str) -> None:
        self._mount(f"remount,{options}")

    def end(self) -> None:
        subprocess.run(["umount", "-l", self.path], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() or shutil.which("mount") is None:
        pytest.skip("only root may mount a file system of its own")
    try:
        disk = Disk(tmp_path / "disk")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.decode()}")
    yield disk
    disk.end()


def test_a_full_disk_ends_the_work_and_the_same_call_goes_on(
    ray_session: None, tiny_model: Path, disk: Disk, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["context", "question"])
        writer.writerows([f"Ann has {i},\nBob has {i % 7}.", f"who has {i}?"] for i in range(10 * 256))
    scaling = ScalingConfig(num_workers=1)
    disk.change("size=72k")
    with pytest.raises(WorkError, match="No space left on device"):
        predict(path, model=tiny_model, output_path=disk.path / "out", scaling=scaling)
    there = list((disk.path / "out").glob("part-*"))
    assert 0 < len(there) < 10
    for part in there:
        assert pq.read_table(part).num_rows == 256  # no half file under a part's name
    with pytest.raises(OutputError, match="no finished results"):
        open_results(disk.path / "out")
    disk.change("size=1m")
    done = predict(path, model=tiny_model, output_path=disk.path / "out", scaling=scaling)
    # A worker may have published one more before it was ended.
    assert done.num_resumed_rows >= len(there) * 256
    assert results.verify(disk.path / "out").num_rows == 10 * 256
    assert pq.read_table(disk.path / "out")["row_index"].to_pylist() == list(range(10 * 256))
    assert not [name for name in os.listdir(disk.path / "out") if name.startswith("_part")]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_any_more_midway(ray_session: None, disk: Disk, tmp_path: Path) -> None:
    model = make_slow_model(tmp_path / "model", 0.3)
    rows = write_rows(tmp_path / "rows.csv", 12 * 256)
    address = ray.get_runtime_context().gcs_address
    log = tmp_path / "log"
    job = Job(address, rows, model, disk.path / "out", log)
    job.wait_for(2, 300)
    while True:
        try:
            disk.change("ro")
            break
        except subprocess.CalledProcessError:  # a part is being written
            time.sleep(0.01)
    assert job.process.wait(120) == 1
    there = len(job.parts())
    assert 2 <= there < 12
    assert "Read-only file system" in log.read_text()
    assert "Traceback" not in log.read_text()
    disk.change("rw")
    again = Job(address, rows, model, disk.path / "out", log).result(300)
    assert again["status"] == "done" and again["num_resumed_rows"] >= there * 256
    assert results.verify(disk.path / "out").num_rows == 12 * 256


# --- an object store that fails now and then ----------------------------------------------------------


class Hiccups(threading.Thread):
    """Hands connections on to the S3 server, byte by byte; of the requests on them it fails every so many."""

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(daemon=True)
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.every = 5
        self.num_requests = self.num_failed = 0
        self._lock = threading.Lock()

    def run(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def end(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        self._listener.close()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError), client, socket.create_connection(self._target) as server:
            threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
            while data := client.recv(1 << 16):
                if data.startswith((b"GET ", b"HEAD ", b"PUT ", b"POST ", b"DELETE ")) and self._fails():
                    if data.startswith((b"GET ", b"HEAD ")):
                        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    else:  # cut off
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                server.sendall(data)

    def _fails(self) -> bool:
        with self._lock:
            self.num_requests += 1
            fails = self.num_requests % self.every == 0
            self.num_failed += fails
            return fails

    @staticmethod
    def _answer(server: socket.socket, client: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 16):
                client.sendall(data)


@pytest.fixture
def hiccups(server: Server) -> Iterator[tuple[Hiccups, dict[str, object]]]:
    """The proxy, and storage options that lead through it."""
    host, _, port = server.endpoint.removeprefix("http://").partition(":")
    proxy = Hiccups((host, int(port)))
    proxy.start()
    yield proxy, server.options | {"endpoint_override": f"http://127.0.0.1:{proxy.port}"}
    proxy.end()


def predictions(first_row: int, num_rows: int) -> pa.Table:
    rows = range(first_row, first_row + num_rows)
    columns = [list(rows), [f"a{row}" for row in rows], [0.5] * num_rows, [0] * num_rows, [1] * num_rows]
    return pa.table([*columns, pa.nulls(num_rows, pa.string())], schema=PREDICTIONS)


def test_storage_that_fails_now_and_then(server: Server, hiccups: tuple[Hiccups, dict[str, object]]) -> None:
    proxy, options = hiccups
    location = locate(f"s3://{BUCKET}/hiccups", storage_options=options)
    plan = {"number": 1}
    folder = results.begin(location, plan)
    parts = [folder.publish_part(predictions(first, 4), first, 4) for first in range(0, 32, 4)]
    assert set(folder.published()) == set(range(0, 32, 4))
    folder.finish(plan, parts, 32)
    assert results.verify(f"s3://{BUCKET}/hiccups", storage_options=options).num_rows == 32
    assert proxy.num_failed > 4
    # And seen past the proxy, nothing is there but the parts, the plan and the manifest.
    names = {info.base_name for info in locate(f"s3://{BUCKET}/hiccups", storage_options=server.options).list()}
    assert len(names) == 10 and {"_manifest.json", "_plan.json"} < names


@pytest.mark.slow
def test_storage_that_stays_away_is_a_clear_error(
    server: Server, hiccups: tuple[Hiccups, dict[str, object]]
) -> None:
    proxy, options = hiccups
    location = locate(f"s3://{BUCKET}/away", storage_options=options)
    folder = results.begin(location, {"number": 1})
    folder.publish_part(predictions(0, 4), 0, 4)
    proxy.every = 1
    begin = time.monotonic()
    with pytest.raises(OutputError, match=r"s3://ray-qa/away/.*(cannot be read|cannot be written)"):
        folder.publish_part(predictions(4, 4), 4, 4)
    print(f"given up after {time.monotonic() - begin:.0f} s")
    proxy.every = 5
    folder.publish_part(predictions(4, 4), 4, 4)
    assert json.loads((location / "_plan.json").read_bytes().to_pybytes())["plan"] == {"number": 1}
    assert set(folder.published()) == {0, 4}
