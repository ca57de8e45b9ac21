"""All three jobs through a Ray head with its dashboard, submitted as a user submits them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.conftest import EXAMPLES, REPOSITORY

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `ray job submit` reaches a head of its own, which asks for a token."""
    port, agent_port = free_ports(2)
    # Sockets under the session folder have short names only.
    folder = tmp_path_factory.mktemp("r", numbered=True)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    start = [
        "ray", "start", "--head", "--port=0", f"--dashboard-port={port}", "--num-cpus=4", "--disable-usage-stats",
        f"--dashboard-agent-listen-port={agent_port}",  # its usual one belongs to the Ray of the other tests
        f"--temp-dir=/tmp/{folder.name}-{port}", "--block",
    ]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(start, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with socket.socket() as probe:  # which costs less than to ask in vain
                if probe.connect_ex(("127.0.0.1", port)):
                    assert process.poll() is None, (folder / "head.log").read_text()
                    time.sleep(0.2)
                    continue
            listed = subprocess.run(["ray", "job", "list"], env=environment, capture_output=True, text=True)
            if listed.returncode == 0:
                break
            assert process.poll() is None, (folder / "head.log").read_text()
        else:
            pytest.fail(f"no head after two minutes\n{(folder / 'head.log').read_text()}")
        yield environment
    finally:
        process.terminate()  # a head that is killed leaves its address behind, and other programs would look for it
        try:
            process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def submit(head: dict[str, str], *command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", "python", "-m", *map(str, command)],
        cwd=REPOSITORY, env=head, capture_output=True, text=True, timeout=300, check=False,
    )


def lines_of(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The job's own output, out of what `ray job submit` prints around it."""
    text = done.stdout + done.stderr
    assert "Tailing logs until the job exits" in text, text
    lines = text.split("Tailing logs until the job exits", 1)[1].splitlines()[1:]
    rays = ("Job '", "Status message:", "Running entrypoint for job")
    return [
        line for line in lines
        if line.strip(" -") and not line.startswith(rays) and "job_manager.py" not in line
    ]


def last_json(lines: list[str]) -> dict[str, object]:
    return json.loads([line for line in lines if line.startswith("{")][-1])


def test_train_eval_and_test_by_submission(head: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    done = submit(
        head, "jobs.train", "--input", EXAMPLES / "train.csv", "--model", tiny_model, "--output", tuned,
        "--max-steps", 40, "--batch-size", 32, "--learning-rate", "2e-3", "--num-workers", 2,
    )
    lines = lines_of(done)
    assert done.returncode == 0, lines
    assert "train" in lines[0] and "2 " in lines[0] and "worker" in lines[0], lines[0]
    trained = last_json(lines)
    assert (trained["status"], trained["num_steps"], trained["num_workers"]) == ("done", 40, 2)
    assert (tuned / "model.safetensors").is_file() and (tuned / "config.json").is_file()

    done = submit(head, "jobs.eval", "--input", EXAMPLES / "eval.csv", "--model", tuned, "--output", tmp_path / "eval")
    lines = lines_of(done)
    assert done.returncode == 0 and " eval: " in lines[0] and "precision fp32" in lines[0], lines
    figures = last_json(lines)
    assert 0 < figures["loss"] < 5 and figures["num_rows"] > 0  # type: ignore[operator]
    assert json.loads((tmp_path / "eval" / "eval.json").read_text())["loss"] == figures["loss"]

    answers = tmp_path / "answers"
    done = submit(head, "jobs.test", "--input", EXAMPLES / "eval.csv", "--model", tuned, "--output", answers)
    lines = lines_of(done)
    assert done.returncode == 0 and " test: " in lines[0] and "parts" in lines[0], lines
    result = last_json(lines)
    assert result["num_rows"] == figures["num_rows"] and result["num_errors"] == 0
    assert pq.read_table(answers)["row_index"].to_pylist() == list(range(result["num_rows"]))  # type: ignore[call-overload]
    assert (answers / "_manifest.json").is_file()


def test_a_bad_job_ends_with_code_2(head: dict[str, str], tiny_model: Path, tmp_path: Path) -> None:
    done = submit(head, "jobs.eval", "--input", tmp_path / "none.csv", "--model", tiny_model)
    assert done.returncode == 1  # what Ray makes of any failure
    assert "no such file" in str(last_json(lines_of(done))["error"])
    program = (
        "from ray.job_submission import JobSubmissionClient\n"
        "print([job.driver_exit_code for job in JobSubmissionClient().list_jobs() if 'none.csv' in job.entrypoint])"
    )
    listed = subprocess.run([sys.executable, "-c", program], env=head, capture_output=True, text=True, check=True)
    assert listed.stdout == "[2]\n"


def test_without_the_token_a_submission_is_refused(head: dict[str, str]) -> None:
    done = submit(head | {"RAY_AUTH_TOKEN": "0" * 32}, "jobs.eval", "--help")
    assert done.returncode != 0 and "Authentication failed" in done.stderr


def test_what_a_submission_uploads(tmp_path: Path) -> None:
    """Ray's own packing of the working folder: the code, and neither history nor environments nor results."""
    import zipfile

    from ray._private.runtime_env.packaging import create_package

    package = tmp_path / "package.zip"
    create_package(str(REPOSITORY), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as opened:
        names = opened.namelist()
    assert {"jobs/train.py", "ray_qa/cli.py"} <= set(names)
    tops = {name.split("/")[0] for name in names}
    assert not tops & {".git", ".venv", "tests", "docs", "demo-output", ".hypothesis", ".mypy_cache"}, tops
    assert package.stat().st_size < 5 << 20  # Ray's limit is 500 MiB, at the dashboard of the head
