"""cluster.yaml on several hosts: `ray up`, `ray job submit`, results on a store, cables that are pulled.

A head that does no work, two workers with one CPU each, a laptop and a store, see `hosts` and `local_cluster`. The
tests stand in the order of a cluster's life; each can run alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import REPOSITORY, missing
from tests.cluster.local_cluster import (
    ACCESS_KEY,
    BUCKET,
    SECRET_KEY,
    LocalCluster,
    background,
    local_cluster,
    patiently,
)
from tests.conftest import EXAMPLES
from tests.hub_server import MODEL

lacking = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(bool(lacking), reason=f"hosts as namespaces need {', '.join(lacking)}"),
]

#: Rows that take two workers with one CPU each about half a minute.
NUM_ROWS = 6_000
HUB_PORT = 5001


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[LocalCluster]:
    work = tmp_path_factory.mktemp("cluster")
    work.chmod(0o755)
    _write_data(work / "data", tiny_model)
    with local_cluster(work) as found:
        found.wait_for_nodes([host.address for host in (found.head, *found.workers)])
        upload = (
            "import boto3, pathlib\n"
            f"s3 = boto3.client('s3', endpoint_url={found.endpoint!r}, region_name='us-east-1',"
            " aws_access_key_id='a', aws_secret_access_key='b')\n"
            f"root = pathlib.Path({str(work / 'data')!r})\n"
            f"[s3.upload_file(str(file), {BUCKET!r}, str(file.relative_to(root))) for file in root.rglob('*.*')]\n"
        )
        found.store.run("python", "-c", upload)
        yield found


def _write_data(folder: Path, tiny_model: Path) -> None:
    for source, target in ((tiny_model, folder / "model"), (EXAMPLES, folder)):
        target.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if file.suffix in (".json", ".safetensors", ".csv"):
                (target / file.name).write_bytes(file.read_bytes())
    filler = " Nobody else was there, and nothing more was said about it that day." * 2
    rows = "".join(f'"Ann has {i} and Bob has none, said Eve.{filler}",who has {i}?\n' for i in range(NUM_ROWS))
    (folder / "many.csv").write_text(f"context,question\n{rows}")


def at(path: str) -> str:
    return f"s3://{BUCKET}/{path}"


def job(cluster: LocalCluster, name: str, *words: object) -> list[str]:
    """The words of a job whose files are on the store; the driver finds the keys in a file of the head's."""
    return ["python", "-m", f"jobs.{name}", *map(str, words), "--endpoint-url", cluster.endpoint]


def result(log: str) -> dict[str, Any]:
    """The JSON line that a job's output ends in."""
    lines = [line for line in log.splitlines() if line.startswith("{")]
    assert lines, log
    return dict(json.loads(lines[-1]))


def store_log(cluster: LocalCluster) -> str:
    return (cluster.work / "store.log").read_text()


def senders(cluster: LocalCluster, method: str, path: str) -> set[str]:
    """Addresses of the hosts that sent the store such a request."""
    found = re.findall(rf'^([\d.]+) - - \[[^\]]*\] "(?:\x1b\[\d+m)*{method} /{BUCKET}/{path}', store_log(cluster), re.M)
    return set(found)


def wait_until(what: Callable[[], bool], seconds: float = 120) -> None:
    for _ in patiently(seconds):
        if what():
            return
    pytest.fail(f"it did not come about in {seconds} s")


def parts_published(cluster: LocalCluster, folder: str) -> int:
    return len(set(re.findall(rf"PUT /{BUCKET}/{folder}/(part-\d+\.parquet)", store_log(cluster))))


def test_the_door(cluster: LocalCluster) -> None:
    """Nobody enters without the token, and nobody but the owner reads it."""
    strangers = {"another token": {"RAY_AUTH_TOKEN": "0" * 64}, "no token": {"RAY_AUTH_MODE": "disabled"}}
    for name, stranger in strangers.items():
        command = ["ray", "job", "submit", "--", "true"]
        done = cluster.laptop.run(*command, environment=cluster.environment | stranger, check=False)
        assert done.returncode != 0, name
        assert re.search("[Aa]uthentication|Unauthorized|401", done.stdout + done.stderr), done.stdout + done.stderr
    # From a host of the same network: the dashboard is not there, and the head's own port wants the token too.
    reach = f"exec 3<>/dev/tcp/{cluster.head.address}/8265"
    assert cluster.store.run("bash", "-c", reach, check=False).returncode != 0
    join = ["timeout", 60, "ray", "start", f"--address={cluster.head.address}:6379", "--num-cpus=1"]
    done = cluster.store.run(
        *join, environment={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, check=False
    )
    assert done.returncode != 0, done.stdout
    assert cluster.store.address not in cluster.nodes()
    for host in (cluster.laptop, cluster.head, *cluster.workers):
        modes = host.run("stat", "-c", "%a", ".ray/auth_token").stdout.split()
        assert modes == ["600"], (host.name, modes)


def test_training_on_two_hosts_survives_a_cut_cable(cluster: LocalCluster) -> None:
    words = job(
        cluster, "train", "--input", at("train.csv"), "--model", at("model"), "--output", at("tuned"),
        "--storage-path", at("work"), "--num-workers", 2, "--max-steps", 120, "--batch-size", 32,
        "--learning-rate", "2e-3", "--save-steps", 20, "--wait-for-workers", 300,
    )
    cluster.submit("train", *words, wait=False)
    wait_until(lambda: "/checkpoint.json" in store_log(cluster), 180)
    worker = cluster.workers[0]
    worker.cut()
    time.sleep(5)
    worker.mend()
    info = cluster.wait("train", 400)
    log = cluster.logs("train")
    assert info["status"] == "SUCCEEDED", log
    done = result(log)
    assert (done["num_steps"], done["num_workers"], done["model_directory"]) == (120, 2, at("tuned"))
    assert done["last_loss"] < done["first_loss"]
    # Both hosts staged the windows from the store.
    assert {host.address for host in cluster.workers} <= senders(cluster, "GET", r"work/windows/\w+/shard-")


def test_evaluation_and_answers_on_two_hosts(cluster: LocalCluster) -> None:
    workers = {host.address for host in cluster.workers}
    words = job(cluster, "eval", "--input", at("eval.csv"), "--model", at("model"), "--output", at("figures"))
    done = result(cluster.submit("eval", *words).stdout)
    assert (done["status"], done["num_rows"], done["num_workers"]) == ("done", 400, 2)
    assert senders(cluster, "PUT", "figures/details/part-") <= workers

    words = job(cluster, "test", "--input", at("many.csv"), "--model", at("model"), "--output", at("answers"))
    done = result(cluster.submit("test", *words).stdout)
    assert (done["num_rows"], done["num_errors"], done["num_workers"]) == (NUM_ROWS, 0, 2)
    assert senders(cluster, "PUT", "answers/part-") == workers


def test_a_model_from_the_hub_is_downloaded_once(cluster: LocalCluster) -> None:
    """By the driver, which hands it on; and no node but the head has a cache of the hub."""
    log = cluster.work / "hub.log"
    command = ["python", "-m", "tests.hub_server", cluster.work / "data/model", cluster.store.address, HUB_PORT]
    with background(cluster.store.command(command, environment={"PYTHONPATH": str(REPOSITORY)}), log):
        wait_until(lambda: cluster.store.run(
            "bash", "-c", f"exec 3<>/dev/tcp/{cluster.store.address}/{HUB_PORT}", check=False
        ).returncode == 0)
        environment = {"env_vars": {"HF_ENDPOINT": f"http://{cluster.store.address}:{HUB_PORT}"}}
        words = job(cluster, "test", "--input", at("eval.csv"), "--model", MODEL, "--output", at("of-hub"))
        done = result(cluster.submit(
            "hub", *words, options=[f"--runtime-env-json={json.dumps(environment)}"]
        ).stdout)
    assert (done["num_rows"], done["num_errors"]) == (400, 0)
    fetched = re.findall(r'"GET /org/tiny/resolve/\w+/(\S+) HTTP', log.read_text())
    assert sorted(fetched) == sorted({*fetched}) and "model.safetensors" in fetched
    assert cluster.head.run("ls", ".cache/huggingface", check=False).returncode == 0
    for host in cluster.workers:
        assert host.run("ls", ".cache/huggingface", check=False).returncode != 0


def test_disks_that_are_not_shared(cluster: LocalCluster) -> None:
    """Each job refuses input and output on a disk of the head before any work, and says what to use."""
    cluster.head.run("bash", "-c", "cp ray_qa_source/examples/*.csv .")
    here = str(Path.home())
    model = ["--model", at("model"), "--endpoint-url", cluster.endpoint]
    jobs = {
        "input of eval": ["eval", "--input", f"{here}/eval.csv"],
        "output of eval": ["eval", "--input", at("eval.csv"), "--output", f"{here}/figures"],
        "input of test": ["test", "--input", f"{here}/eval.csv", "--output", at("none")],
        "output of test": ["test", "--input", at("eval.csv"), "--output", f"{here}/answers"],
        "input of prepare": ["prepare", "--input", f"{here}/train.csv"],
        "output of prepare": ["prepare", "--input", at("train.csv"), "--output", f"{here}/plan"],
        "input of train": [
            "train", "--input", f"{here}/train.csv", "--output", at("none"), "--storage-path", at("work")
        ],
        "output of train": [
            "train", "--input", at("train.csv"), "--output", f"{here}/tuned", "--storage-path", at("work")
        ],
        "storage of train": ["train", "--input", at("train.csv"), "--output", at("none")],
    }
    before = set(cluster.head.run("ls").stdout.split())
    # All in one process, which costs a tenth; the command itself is what `ray-qa` runs.
    program = (
        "import contextlib, io, json, sys; from ray_qa.cli import main\n"
        "for name, words in json.load(sys.stdin).items():\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stdout(said): code = main(words)\n"
        "    print(json.dumps([name, code, json.loads(said.getvalue().splitlines()[-1])]))\n"
    )
    done = cluster.head.run(
        "ray_qa_env/bin/python", "-c", program, data=json.dumps({name: words + model for name, words in jobs.items()}),
        environment={"RAY_AUTH_MODE": "token", "RAY_ADDRESS": "auto"},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in answers] == list(jobs)
    for name, code, answer in answers:
        where = "storage_path" if name == "storage of train" else name.split()[0]
        assert code == 2 and "on 2 of 2 nodes" in answer["error"], (name, answer)
        assert (f"the {where} is not the same" if where == "input" else f"{where} ") in answer["error"], (name, answer)
        assert "a folder that all nodes share" in answer["error"] and "s3://" in answer["error"]
        assert cluster.workers[0].address in answer["error"]
    assert set(cluster.head.run("ls").stdout.split()) == before
    assert not senders(cluster, "PUT", "none/part-")


def test_stop_and_go_on(cluster: LocalCluster) -> None:
    """`ray job stop`: how far it got is said, and the same command goes on. More than can ever be is refused."""
    words = job(cluster, "test", "--input", at("many.csv"), "--model", at("model"), "--output", at("stopped"))
    cluster.submit("stopped", *words, wait=False)
    wait_until(lambda: parts_published(cluster, "stopped") >= 3)
    cluster.ray("job", "stop", "stopped")
    assert cluster.info("stopped")["status"] == "STOPPED"
    log = cluster.logs("stopped")
    stopped = result(log)
    assert stopped["status"] == "stopped" and 0 < stopped["num_rows_done"] < NUM_ROWS, log
    done = result(cluster.submit("goes-on", *words).stdout)
    assert (done["status"], done["num_rows"]) == ("done", NUM_ROWS)
    assert done["num_resumed_rows"] >= stopped["num_rows_done"]

    refused = cluster.submit("never", *words, "--num-workers", "9", wait=True, check=False)
    assert refused.returncode == 1 and cluster.info("never")["driver_exit_code"] == 2
    assert "9 workers with 1 CPU each can never be there at once" in result(refused.stdout)["error"]


def test_two_jobs_share_the_cluster(cluster: LocalCluster) -> None:
    """One from the clone, one from the wheel that the nodes have."""
    first = job(cluster, "prepare", "--input", at("train.csv"), "--model", at("model"))
    second = ["--input", at("eval.csv"), "--model", at("model"), "--endpoint-url", cluster.endpoint]
    cluster.submit("shares-1", *first, wait=False)
    cluster.ray("job", "submit", "--no-wait", "--submission-id=shares-2", "--", "ray-qa", "eval", *second)
    for name in ("shares-1", "shares-2"):
        assert cluster.wait(name)["status"] == "SUCCEEDED", cluster.logs(name)


def test_no_secret_is_told(cluster: LocalCluster) -> None:
    """After all of these jobs: neither the store's key nor the token stands in a log, a runtime_env or on the store."""
    secrets = (SECRET_KEY, cluster.token)
    told = cluster.ask("/api/jobs/") + store_log(cluster).replace(ACCESS_KEY, "")
    for secret in secrets:
        assert secret not in told
    for host in (cluster.head, *cluster.workers):
        patterns = [word for secret in secrets for word in ("-e", secret)]
        found = host.run("grep", "-rlaF", *patterns, "/tmp/ray/session_latest/logs", check=False)
        assert found.returncode == 1, (host.name, found.stdout, found.stderr)
    search = (
        "import boto3, sys\n"
        f"s3 = boto3.client('s3', endpoint_url={cluster.endpoint!r}, region_name='us-east-1',"
        " aws_access_key_id='a', aws_secret_access_key='b')\n"
        f"pages = s3.get_paginator('list_objects_v2').paginate(Bucket={BUCKET!r})\n"
        "for page in pages:\n"
        "    for thing in page.get('Contents', ()):\n"
        f"        data = s3.get_object(Bucket={BUCKET!r}, Key=thing['Key'])['Body'].read()\n"
        "        assert not any(secret.encode() in data for secret in sys.argv[1:]), thing['Key']\n"
    )
    cluster.store.run("python", "-c", search, *secrets)


def test_a_host_dies_in_mid_job(cluster: LocalCluster) -> None:
    """Last, because the host does not come back."""
    words = job(cluster, "test", "--input", at("many.csv"), "--model", at("model"), "--output", at("survived"))
    cluster.submit("survives", *words, wait=False)
    wait_until(lambda: parts_published(cluster, "survived") >= 3)
    cluster.workers[1].kill()
    before = parts_published(cluster, "survived")
    info = cluster.wait("survives", 400)
    log = cluster.logs("survives")
    assert info["status"] == "SUCCEEDED", log
    done = result(log)
    assert (done["num_rows"], done["num_errors"], done["num_resumed_rows"]) == (NUM_ROWS, 0, 0)
    assert before < done["num_parts"] == parts_published(cluster, "survived")
