"""The lock on a folder: other processes, real deaths, disk and S3 (tests/test_storage_s3.py)."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_qa.errors import OutputError, WorkError
from ray_qa.folder_lock import FolderLock
from ray_qa.storage import locate

HOLDER = """
import sys, time
from ray_qa.folder_lock import FolderLock
from ray_qa.storage import locate
with FolderLock(locate(sys.argv[1]), beat=0.1):
    print("held", flush=True)
    time.sleep(600)
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_the_second_of_two_jobs_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    with FolderLock(locate(tmp_path)):
        with pytest.raises(OutputError, match=rf"process {os.getpid()} on \S+, since 20\d\d-.*another folder"):
            FolderLock(locate(tmp_path)).__enter__()
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())
    with FolderLock(locate(tmp_path)):
        pass


def test_the_lock_of_a_killed_job_is_taken_over_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(OutputError, match=f"process {process.pid} on"):
            FolderLock(locate(tmp_path)).__enter__()
        process.send_signal(signal.SIGKILL)
        process.wait()
        with FolderLock(locate(tmp_path)):
            assert len(list(tmp_path.iterdir())) == 1


def elsewhere(folder: Path) -> None:
    """Make the only claim in the folder one of a machine that this one cannot ask."""
    (claim,) = folder.glob("_lock.*.json")  # it may have been stopped while it wrote another
    claim.write_text(json.dumps(json.loads(claim.read_text()) | {"machine": "another", "host": "far-away"}))


def test_the_lock_of_another_machine_is_watched(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(OutputError, match=f"process {process.pid} on"):
            # It beats; a claim that does is alive, wherever it is.
            watcher = FolderLock(locate(tmp_path), lease=30)
            watcher._owner["machine"] = "another"
            watcher.__enter__()
        process.send_signal(signal.SIGSTOP)
        elsewhere(tmp_path)
        begin = time.monotonic()
        with FolderLock(locate(tmp_path), beat=0.1, lease=1.0):
            assert time.monotonic() - begin >= 1.0


def test_a_job_that_lost_its_folder_is_told(tmp_path: Path) -> None:
    with FolderLock(locate(tmp_path), beat=0.05) as lock:
        lock.check()
        (claim,) = tmp_path.iterdir()
        for _ in range(200):  # between two beats the file may be put back once
            claim.unlink(missing_ok=True)
            if lock._lost:
                break
            time.sleep(0.05)
        with pytest.raises(WorkError, match="took the folder over"):
            lock.check()


def test_of_many_jobs_that_start_at_once_one_gets_the_folder(tmp_path: Path) -> None:
    """Sixteen threads, which stand for jobs of other machines: each must tell the others' claims by watching."""
    import threading

    holders, refused, start = [], [], threading.Barrier(16)

    def job(number: int) -> None:
        lock = FolderLock(locate(tmp_path), beat=0.1, lease=20)
        lock._owner["machine"] = f"machine {number}"
        start.wait()
        try:
            lock.__enter__()
        except OutputError:
            refused.append(number)
            return
        holders.append(lock)

    threads = [threading.Thread(target=job, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(holders) == 1 and len(refused) == 15
    holders[0].__exit__()
