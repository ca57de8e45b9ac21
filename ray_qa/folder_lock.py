"""One job at a time in a folder, on a disk and on an object store alike.

Each job writes a claim of its own, ``_lock.<random>.json``, and then lists the folder. Whoever finds another living
claim takes its own away again; so two jobs can both see each other and both go, but never both stay: of two claims
the later written one finds the earlier one. That needs a listing that shows what was written before it began, as
local disks, S3, Google Cloud Storage and Azure give it (NFS with cached attributes may not), and no conditional
writes.

A job that holds the folder rewrites its claim every `BEAT` seconds. The claim of a job that died is taken over: at
once where it stands on this machine and its process is gone, else when it was watched for `LEASE` seconds and did
not change. No clock of another machine is believed.

What is not promised: a job that is stopped for longer than the lease (SIGSTOP, a frozen virtual machine) and then goes
on may overlap with its successor until its next beat; it then fails. What its workers publish in the meantime is of the
same plan, or is refused (see `results.ResultFolder.publish_part`).

Knows nothing of what the folder holds.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from ray_qa.errors import OutputError, WorkError
from ray_qa.storage import Location

PREFIX = "_lock."
#: Seconds between two beats of a claim, and without any after which its job counts as dead.
BEAT, LEASE = 10.0, 60.0
#: Seconds between two looks at a claim that is watched.
_LOOK = 1.0
#: Tries of jobs that start at the same time and give way to each other.
_TRIES = 20


class FolderLock:
    """Holds a folder for this process; a context manager.

    Raises on entering:
        OutputError: another job holds the folder; the message says who.
    """

    def __init__(self, folder: Location, *, beat: float = BEAT, lease: float = LEASE) -> None:
        self._folder = folder
        self._beat, self._lease = beat, lease
        self._claim = folder / f"{PREFIX}{uuid.uuid4().hex}.json"
        self._owner: dict[str, Any] = _this_process() | {
            "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        }
        self._beats = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost = False

    def __enter__(self) -> FolderLock:
        for _ in range(_TRIES):
            self._write()
            others = self._others()
            if not others:
                self._thread = threading.Thread(target=self._keep, name="folder-lock", daemon=True)
                self._thread.start()
                return self
            self._claim.delete()
            for name, content in others.items():
                if self._is_dead(name, content):
                    # And what it was writing when it died; see `Location.publish`.
                    for left in [name, *self._names(f"_{name}.")]:
                        (self._folder / left).delete()
            # Two that gave way to each other must not come back at the same moment.
            time.sleep(random.uniform(0.05, 0.5))
        raise OutputError(f"{self._folder.uri}: many jobs claim the folder at once; start one of them")

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            self._claim.delete()

    def check(self) -> None:
        """Raise WorkError where the folder was lost to another job while this one could not beat."""
        if self._lost:
            raise WorkError(f"{self._folder.uri}: another job took the folder over while this one stood still")

    def _write(self) -> None:
        self._beats += 1
        self._claim.publish(json.dumps(self._owner | {"beats": self._beats}).encode())

    def _others(self) -> dict[str, bytes]:
        """Name and content of all claims but this one; those that go away while they are read are none."""
        found = {}
        for name in self._names(PREFIX):
            content = None if name == self._claim.name else _read(self._folder / name)
            if content is not None:
                found[name] = content
        return found

    def _names(self, prefix: str) -> list[str]:
        return [info.base_name for info in self._folder.list() if info.base_name.startswith(prefix)]

    def _is_dead(self, name: str, content: bytes) -> bool:
        """Whether the job of a claim is gone.

        Raises:
            OutputError: it is not.
        """
        owner = _parse(content)
        if owner.get("machine") == self._owner["machine"]:
            if _start_of(int(owner.get("pid", 0))) != owner.get("started"):
                return True
            raise self._held_by(owner)
        waited_from = time.monotonic()
        while time.monotonic() - waited_from < self._lease:
            time.sleep(min(_LOOK, self._beat))
            now = _read(self._folder / name)
            if now is None:
                return True
            if now != content:
                raise self._held_by(owner)
        return True

    def _held_by(self, owner: dict[str, Any]) -> OutputError:
        return OutputError(
            f"{self._folder.uri}: another job is at work in this folder: process {owner.get('pid')} on "
            f"{owner.get('host')}, since {owner.get('since')}; allowed: wait for it, end it, or another folder"
        )

    def _keep(self) -> None:
        while not self._stop.wait(self._beat):
            try:
                if not self._claim.exists():
                    self._lost = True
                    return
                self._write()
            except (OSError, OutputError):
                pass  # storage that fails now and then: the next beat is soon enough


def _this_process() -> dict[str, Any]:
    """Who holds it, for people; and ``machine``: where a process number means what it means here."""
    return {
        "host": socket.gethostname(), "pid": os.getpid(), "started": _start_of(os.getpid()),
        "machine": f"{_text('/proc/sys/kernel/random/boot_id')} {_of(lambda: os.readlink('/proc/self/ns/pid'))}",
    }


def _start_of(pid: int) -> str:
    """When a process began, in ticks since boot; "" where there is none: numbers of processes are used again."""
    fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    # A process that ended and was not waited for yet is a zombie.
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else ""


def _text(path: str) -> str:
    def read() -> str:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read().strip()

    return _of(read)


def _of(call: Callable[[], str]) -> str:
    try:
        return call()
    except OSError:
        return ""


def _read(location: Location) -> bytes | None:
    try:
        data: pa.Buffer = location.read_bytes()
    except FileNotFoundError:
        return None
    return data.to_pybytes()


def _parse(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except ValueError:
        return {}
