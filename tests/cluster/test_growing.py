"""A cluster that grows from nothing: Ray's own stand-in for a cloud starts nodes, on one host (see `hosts`)."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import PYTHON, REPOSITORY, Host, missing, network
from tests.conftest import EXAMPLES

lacking = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(bool(lacking), reason=f"hosts as namespaces need {', '.join(lacking)}"),
]

#: A head without CPUs, and up to two nodes with one each; what `ray up` would leave on the head.
_START = """
import json, pathlib
from ray.cluster_utils import AutoscalingCluster
types = {"cpu": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}}
cluster = AutoscalingCluster({"CPU": 0}, types, max_workers=2, idle_timeout_minutes=30)
pathlib.Path.home().joinpath("ray_bootstrap_config.yaml").write_text(json.dumps(cluster._config))
cluster.start()
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    work = tmp_path_factory.mktemp("growing")
    with network(work) as found:
        alone = found.add("alone")
        alone.run("python", "-c", _START)
        yield alone


@pytest.fixture(scope="module")
def model(host: Host, tiny_model: Path) -> str:
    """The model in the host's own home folder."""
    host.run("mkdir", "model")
    for file in tiny_model.glob("*.json"):
        host.write(f"model/{file.name}", file.read_text())
    weights = (tiny_model / "model.safetensors").read_bytes()
    host.write("model/weights.txt", base64.b64encode(weights).decode())
    host.run("bash", "-c", "base64 -d model/weights.txt > model/model.safetensors && rm model/weights.txt")
    return str(Path.home() / "model")


def job(host: Host, model: str, *words: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON line and log of a job on the host."""
    done = host.run(
        PYTHON, "-m", "ray_qa.cli", *words, "--model", model, check=False,
        environment={"RAY_ADDRESS": "auto", "PYTHONPATH": str(REPOSITORY)},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stdout + done.stderr
    return done.returncode, json.loads(lines[-1]), done.stderr


def test_what_can_never_be_there_is_refused_at_once(host: Host, model: str) -> None:
    rows = EXAMPLES / "train.csv"
    code, told, _ = job(host, model, "eval", "--input", rows, "--num-workers", 9)
    assert code == 2 and "9 workers with 1 CPU each can never be there at once" in told["error"]
    assert "its autoscaler may add at most 2 nodes (2 times 1 CPU); allowed: at most 2 such workers" in told["error"]
    code, told, _ = job(host, model, "eval", "--input", rows, "--num-workers", 1, "--cpus-per-worker", 2)
    assert code == 2 and "1 worker with 2 CPUs can never be there" in told["error"]
    code, told, _ = job(host, model, "eval", "--input", rows, "--num-workers", 1, "--use-gpu")
    assert code == 2 and "1 worker with 1 CPU and 1 GPU can never be there" in told["error"]
    code, told, _ = job(host, model, "eval", "--input", rows)
    assert code == 2 and "say how many workers to wait for" in told["error"]


def test_waiting_ends_after_the_given_time(host: Host, model: str) -> None:
    """The node that this asks for comes too late for it; the next test finds it."""
    words = ["eval", "--input", EXAMPLES / "eval.csv", "--num-workers", 1, "--wait-for-workers", 0.5]
    code, told, _ = job(host, model, *words)
    assert code == 1 and "for room for 1 worker with 1 CPU, in vain" in told["error"], told
    assert "--wait-for-workers" in told["error"]


def test_a_job_waits_for_the_nodes_that_it_asked_for(host: Host, model: str) -> None:
    words = ["eval", "--input", EXAMPLES / "train.csv", "--num-workers", 2, "--wait-for-workers", 300]
    code, told, log = job(host, model, *words)
    assert code == 0, (told, log)
    assert (told["num_rows"], told["num_workers"]) == (6000, 2)
    code, told, log = job(host, model, "prepare", "--input", EXAMPLES / "train.csv")
    assert code == 0 and told["num_usable_rows"] == 6000, (told, log)
