"""Jobs that are killed and stopped: real processes, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray

from benchmarks.kills import Job, make_slow_model, write_rows
from ray_qa.results import open_results, verify
from tests.conftest import REPOSITORY

NUM_ROWS = 16 * 256


def campaign(*arguments: object) -> dict[str, object]:
    command = [sys.executable, REPOSITORY / "benchmarks" / "kills.py", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_a_worker_a_node_and_a_driver_are_killed() -> None:
    found = campaign("--runs", 3, "--kinds", "worker,node,driver", "--parts", 6)
    assert found["kills"] == {"worker": 1, "node": 1, "driver": 1}


@pytest.mark.slow
def test_fifty_kills() -> None:
    assert campaign("--runs", 52)["runs"] == 52


@pytest.mark.slow
def test_sigterm_ends_a_job_cleanly_and_it_goes_on_later(ray_session: None, tmp_path: Path) -> None:
    address = ray.get_runtime_context().gcs_address
    model = make_slow_model(tmp_path / "model", 0.5)
    rows = write_rows(tmp_path / "rows.csv", NUM_ROWS)
    job = Job(address, rows, model, tmp_path / "out")
    job.wait_for(2, 300)
    job.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert job.process.wait(60) == 143
    seconds = time.monotonic() - begin
    said = job.said()
    assert said["status"] == "stopped" and said["num_rows"] == NUM_ROWS
    assert 2 * 256 <= said["num_rows_done"] < NUM_ROWS
    assert f"stopped at {said['num_rows_done']:,} of {NUM_ROWS:,} rows" in said["error"]
    assert "the same command goes on" in said["error"] and "Traceback" not in job.log.read_text()
    names = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("_")}
    assert {name for name in names if not name.startswith("_part-")} == {"_plan.json"}
    print(f"ended {seconds:.1f} s after SIGTERM")

    again = Job(address, rows, model, tmp_path / "out").result(300)
    assert again["status"] == "done" and again["num_resumed_rows"] >= said["num_rows_done"]
    assert verify(tmp_path / "out").num_rows == len(open_results(tmp_path / "out")) == NUM_ROWS
