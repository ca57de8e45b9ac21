"""Input and output on a real S3 server: moto's, in a process of its own, with a log of the requests it served."""

from __future__ import annotations

import csv
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
import ray

from ray_qa import cli, open_results, parquet_files, reading, results
from ray_qa.errors import InputError, ModelError, OptionError, OutputError, WorkError
from ray_qa.folder_lock import FolderLock
from ray_qa.model import resolve_model
from ray_qa.prediction import predict
from ray_qa.storage import Location, expand, locate

BUCKET = "ray-qa"
ENVIRONMENT = [
    "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE",
]


@dataclass(frozen=True)
class Server:
    endpoint: str
    log: Path

    @property
    def options(self) -> dict[str, object]:
        return {"endpoint_override": self.endpoint, "access_key": "key", "secret_key": "secret", "region": "us-east-1"}

    def requests(self, path: str) -> list[str]:
        """Methods and queries of the requests for an object, in order."""
        found = re.findall(rf'"([A-Z]+) /{re.escape(path)}(\?\S*)? HTTP', self.log.read_text())
        return [method + query for method, query in found]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("s3") / "log"
    with open(log, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=stream, stderr=stream
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        server = Server(f"http://127.0.0.1:{port}", log)
        plain = pafs.S3FileSystem(
            endpoint_override=f"127.0.0.1:{port}", scheme="http", access_key="key", secret_key="secret",
            region="us-east-1", allow_bucket_creation=True,
        )
        plain.create_dir(BUCKET)
        yield server
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


def write_rows(location: Location, first: int, num_rows: int) -> None:
    rows = "".join(f'"Ann has {i},\nBob none.",who has {i}?\n' for i in range(first, first + num_rows))
    location.publish(f"context,question\n{rows}".encode())


def test_publishing_is_one_put_that_replaces_the_whole_object(server: Server) -> None:
    target = locate(f"s3://{BUCKET}/one/put.bin", storage_options=server.options)
    assert not target.exists()
    target.publish(b"first, and longer")
    target.publish(pa.py_buffer(b"second"))
    assert target.read_bytes().to_pybytes() == b"second" and target.read_bytes(1, 3).to_pybytes() == b"ec"
    puts = [request for request in server.requests(f"{BUCKET}/one/put.bin") if not request.startswith(("GET", "HEAD"))]
    assert len(puts) == 2 and all(put.startswith("PUT") and "uploads" not in put for put in puts), puts


def test_a_folder_needs_its_bucket_and_leaves_nothing_behind(server: Server) -> None:
    folder = locate(f"s3://{BUCKET}/fresh/deep", storage_options=server.options)
    folder.make_folder()
    assert folder.list() == []
    with pytest.raises(OutputError, match="s3://no-such-bucket/out: cannot be used as an output folder"):
        locate("s3://no-such-bucket/out", storage_options=server.options).make_folder()
    assert not locate("s3://no-such-bucket", storage_options=server.options).exists()


def test_folders_globs_and_missing_files(server: Server) -> None:
    for name in ("b.csv", "a.csv", "c.txt", "_hidden.csv", "sub/x.csv"):
        locate(f"s3://{BUCKET}/many/{name}", storage_options=server.options).publish(b"x")

    def names(path: str) -> list[str]:
        return [found.uri for found in expand(path, suffixes=(".csv",), storage_options=server.options)]

    prefix = f"s3://{BUCKET}/many"
    assert names(prefix) == names(f"{prefix}/") == [f"{prefix}/a.csv", f"{prefix}/b.csv"]
    assert names(f"{prefix}/?.csv") == [f"{prefix}/a.csv", f"{prefix}/b.csv"]
    with pytest.raises(InputError, match="none.csv: no such file"):
        names(f"{prefix}/none.csv")
    with pytest.raises(OptionError, match="no_such_option"):
        locate(prefix, storage_options=server.options | {"no_such_option": 1})


def test_the_drivers_environment_travels_with_a_location(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    locate(f"s3://{BUCKET}/env.bin", storage_options=server.options).publish(b"there")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-driver")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_ENDPOINT_URL", server.endpoint)
        location = locate(f"s3://{BUCKET}/env.bin")
    assert "secret" not in repr(location) and "key-of-the-driver" not in repr(location)
    data = pickle.dumps(location)
    assert b"key-of-the-driver" in data
    # A fresh interpreter without the environment stands for a worker on another machine.
    program = "import pickle, sys; print(pickle.load(sys.stdin.buffer).read_bytes().to_pybytes().decode())"
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
    assert done.stdout.strip() == b"there"


def test_a_result_folder_is_taken_up_again(server: Server) -> None:
    location = locate(f"s3://{BUCKET}/results", storage_options=server.options)
    plan: dict[str, object] = {"input": "x"}
    tables = [
        pa.table({
            "row_index": pa.array([i]), "answer": ["a"], "score": pa.array([1.0], pa.float32()),
            "start": pa.array([0]), "end": pa.array([1]), "error": pa.array([None], pa.string()),
        }) for i in range(2)
    ]
    first = results.begin(location, plan, overwrite=False).publish_part(tables[0], 0, 1)
    folder = results.begin(location, plan, overwrite=False)
    assert folder.published() == {0: first}
    folder.finish(plan, [first, folder.publish_part(tables[1], 1, 1)], 2)
    assert [answer.answer for answer in results.Answers(location)] == ["a", "a"]
    with pytest.raises(OutputError, match="another run"):
        results.begin(location, {"input": "y"}, overwrite=False)


def test_one_job_at_a_time_in_a_folder(server: Server) -> None:
    location = locate(f"s3://{BUCKET}/locked", storage_options=server.options)
    with FolderLock(location, beat=0.2) as lock:
        other = FolderLock(location, lease=30)
        other._owner["machine"] = "another"  # it cannot ask for the process, and has to watch the claim
        with pytest.raises(OutputError, match=f"process {os.getpid()} on"):
            other.__enter__()
        lock.check()
    assert not location.list()
    # The claim of a job that died elsewhere.
    (location / "_lock.dead.json").publish(b'{"machine": "another", "pid": 1}')
    begin = time.monotonic()
    with FolderLock(location, beat=0.1, lease=1.0):
        assert time.monotonic() - begin >= 1.0
        assert len(location.list()) == 1


def test_many_parts_are_verified_and_become_one_object(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    location = locate(f"s3://{BUCKET}/verified", storage_options=server.options)
    plan: dict[str, object] = {"input": "x"}
    folder = results.begin(location, plan)
    parts = []
    for i in range(20):
        parts.append(folder.publish_part(pa.table({
            "row_index": pa.array([i]), "answer": ["a"], "score": pa.array([1.0], pa.float32()),
            "start": pa.array([0]), "end": pa.array([1]), "error": pa.array([None], pa.string()),
        }), i, 1))
    assert folder.published() == {part.first_row: part for part in parts}
    folder.finish(plan, parts, 20)
    assert results.verify(location.uri, storage_options=server.options).num_parts == 20
    answers = pickle.loads(pickle.dumps(results.Answers(location)))
    single = f"s3://{BUCKET}/single-file/all.parquet"
    monkeypatch.setattr(parquet_files, "GROUP_ROWS", 5)
    assert answers.write_parquet(single, storage_options=server.options) is True
    target = locate(single, storage_options=server.options)
    table = pq.read_table(target.path, filesystem=target.filesystem)
    assert table.equals(answers.to_table())
    assert answers.write_parquet(single, storage_options=server.options) is False
    (location / results.part_name(7)).delete()
    with pytest.raises(WorkError, match="missing .*part-000000000007"):
        results.verify(location.uri, storage_options=server.options)
    # What an object store shows of a file that could not be finished is taken away.
    other = f"s3://{BUCKET}/single-file/other.parquet"
    with pytest.raises(OutputError, match="part-000000000007.parquet: cannot be read"):
        answers.write_parquet(other, storage_options=server.options)
    assert not locate(other, storage_options=server.options).exists()


@pytest.mark.usefixtures("ray_session")
def test_workers_read_and_write_with_the_drivers_options(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    folder = f"s3://{BUCKET}/rows"
    for number in range(2):
        write_rows(locate(f"{folder}/{number}.csv", storage_options=server.options), number * 300, 300)
    location = locate(f"{folder}/1.csv", storage_options=server.options)
    assert ray.get(ray.remote(lambda location: location.info().size).remote(location)) == location.info().size

    rows = sorted(reading.read_csv(folder, storage_options=server.options).take_all(), key=lambda row: row["row_index"])
    assert [row["question"] for row in rows] == [f"who has {i}?" for i in range(600)]
    assert rows[599] == {"row_index": 599, "context": "Ann has 599,\nBob none.", "question": "who has 599?"}

    local = tmp_path / "rows.csv"
    with open(local, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("context", "question"), *((row["context"], row["question"]) for row in rows)])
    output = f"s3://{BUCKET}/answers"
    done = predict(folder, model=tiny_model, output_path=output, storage_options=server.options)
    assert (done.num_rows, done.num_errors, done.output_path) == (600, 0, output)
    assert list(done.answers) == list(predict(local, model=tiny_model).answers)
    lost = locate(f"{output}/{results.part_name(300)}", storage_options=server.options)
    lost.delete()
    locate(f"{output}/_manifest.json", storage_options=server.options).delete()
    again = predict(folder, model=tiny_model, output_path=output, storage_options=server.options)
    assert 0 < again.num_resumed_rows < 600
    assert list(open_results(output, storage_options=server.options)) == list(done.answers)


def test_models_at_uris_that_are_refused(server: Server, tiny_model: Path) -> None:
    folder = locate(f"s3://{BUCKET}/models/pickled", storage_options=server.options)
    with pytest.raises(ModelError, match="models/none.: there is no such folder"):
        resolve_model(f"s3://{BUCKET}/models/none", storage_options=server.options)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).publish((tiny_model / name).read_bytes())
    (folder / "pytorch_model.bin").publish(b"whatever a pickle does")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which can run code"):
        resolve_model(folder.uri, storage_options=server.options)
    assert not [request for request in server.requests(folder.path + "/pytorch_model.bin") if request.startswith("GET")]
    (folder / "pytorch_model.bin").delete()
    (folder / "model.safetensors").publish((tiny_model / "model.safetensors").read_bytes())
    found = resolve_model(folder.uri, storage_options=server.options)
    assert found.name == folder.uri and found.has_head
    assert (found.directory / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    before = server.requests(folder.path + "/model.safetensors")
    assert resolve_model(folder.uri, storage_options=server.options) == found
    assert server.requests(folder.path + "/model.safetensors") == before  # it is fetched once


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_model_goes_from_store_to_store(
    server: Server, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows, model, checkpoints and the tuned model on S3, by the jobs with ``--endpoint-url``; then evaluated there."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")

    def at(path: str) -> str:
        return f"s3://{BUCKET}/tuning/{path}"

    def run(job: str, *arguments: str) -> dict[str, Any]:
        assert cli.main([job, *arguments, "--endpoint-url", server.endpoint]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    row = '"Ann has 3,\nBob none.",who has 3?,Ann,0\n'
    locate(at("rows.csv"), storage_options=server.options).publish(
        ("context,question,answer_text,answer_start\n" + row * 4).encode()
    )
    for file in tiny_model.iterdir():
        locate(at(f"start/{file.name}"), storage_options=server.options).publish(file.read_bytes())
    trained = run(
        "train", "--input", at("rows.csv"), "--model", at("start"), "--output", at("tuned"), "--storage-path",
        at("home"), "--max-steps", "2", "--batch-size", "2", "--save-steps", "1", "--precision", "fp32",
    )
    assert (trained["num_rows"], trained["num_steps"], trained["model_directory"]) == (4, 2, at("tuned"))
    saved = re.findall(r'"PUT /ray-qa/tuning/home/checkpoints/\w+/step-000000000001/([\w.]+)', server.log.read_text())
    assert {"model.safetensors", "optimizer.safetensors", "checkpoint.json"} <= set(saved)
    figures = run("eval", "--input", at("rows.csv"), "--model", at("tuned"), "--output", at("evaluation"))
    assert figures["num_rows"] == 4 and figures["loss"] < trained["first_loss"]
    stored = locate(at("evaluation/eval.json"), storage_options=server.options).read_bytes().to_pybytes()
    assert json.loads(stored)["loss"] == figures["loss"]
