from __future__ import annotations

import contextlib
import logging
import os
import pty

import pytest

from ray_qa.progress import Progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def read_all(terminal: int) -> str:
    """What was written to the other end, which is closed."""
    found = b""
    with contextlib.suppress(OSError):  # EIO: nothing is left, and nobody writes
        while more := os.read(terminal, 10_000):
            found += more
    os.close(terminal)
    return found.decode()


def test_a_log_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray_qa")
    clock = Clock()
    with open(os.devnull, "w") as stream, Progress("test", 10_000, 2_000, 1, stream=stream, clock=clock) as progress:
        for _ in range(79):  # a hundred rows every second
            clock.now += 1
            progress.add(100, num_errors=1)
    assert [record.message for record in caplog.records] == [
        "test: 3,000 of 10,000 rows (30%), 100 rows/s, 1:10 left, 11 errors",
        "test: 5,000 of 10,000 rows (50%), 100 rows/s, 0:50 left, 31 errors",
        "test: 9,000 of 10,000 rows (90%), 100 rows/s, 0:10 left, 71 errors",
    ]


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ray_qa")
    clock = Clock()
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream, Progress("test", 4, stream=stream, clock=clock) as progress:
        for _ in range(4):
            clock.now += 0.5
            progress.add(1)
    shown = read_all(ours).split("\r")
    assert shown[1] == "[######..................] test: 1 of 4 rows (25%), 2 rows/s, 0:02 left"
    assert shown[-2] == "[########################] test: 4 of 4 rows (100%), 2 rows/s, 0:00 left"
    assert not caplog.records


def test_programs_that_want_no_log_lines_get_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ray_qa")
    clock = Clock()
    ours, theirs = pty.openpty()
    with open(theirs, "w") as stream, Progress("test", 0, stream=stream, clock=clock) as progress:
        clock.now += 1000
        progress.add(0)
        assert progress.text() == "test: 0 of 0 rows (100%)"
        stream.write("nothing\n")
    assert read_all(ours) == "nothing\r\n"


def test_long_and_slow_runs() -> None:
    clock = Clock()
    progress = Progress("test", 1_000_000_000, clock=clock)
    clock.now += 3600
    progress.add(3600 * 4)
    assert progress.text() == "test: 14,400 of 1,000,000,000 rows (0%), 4 rows/s, 69443:26:40 left"
