"""How far a run is: rows done of all, rows a second, time left, errors; a bar on a terminal, a line in a log.

Knows nothing of what a row is.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TextIO

logger = logging.getLogger("ray_qa")

#: Seconds between two lines in a log: the first soon, to show that there is progress, later ones seldom.
_FIRST_LINE, _LONGEST_PAUSE = 10.0, 300.0
_BAR_SECONDS = 0.2
_BAR_WIDTH = 24


class Progress:
    """Counts rows, and tells of it while log lines at level INFO are wanted. A context manager.

    ``num_done`` of ``num_rows`` were found done; they count as rows, not towards the speed. ``note`` stands at the end
    of every line that is told from then on.
    """

    def __init__(
        self, name: str, num_rows: int, num_done: int = 0, num_errors: int = 0, *, unit: str = "rows",
        stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_rows, self.num_done, self.num_errors = num_rows, num_done, num_errors
        self.note = ""
        self._name = name
        self._unit = unit
        self._found = num_done
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._is_bar = self._stream.isatty()
        self._is_wanted = logger.isEnabledFor(logging.INFO)
        self._started = self._told = clock()
        self._pause = _FIRST_LINE
        self._length = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._length:
            self._write(self.text() if kind is None else "")
            self._stream.write("\n" if kind is None else "\r")
            self._stream.flush()

    def add(self, num_rows: int, num_errors: int = 0) -> None:
        """So many rows more are done."""
        self.num_done += num_rows
        self.num_errors += num_errors
        if not self._is_wanted:
            return
        now = self._clock()
        if self._is_bar:
            if now - self._told >= _BAR_SECONDS:
                self._told = now
                self._write(self.text())
        elif now - self._told >= self._pause and self.num_done < self.num_rows:
            self._told = now
            self._pause = min(self._pause * 2, _LONGEST_PAUSE)
            logger.info("%s", self.text())

    def text(self) -> str:
        """One line: ``test: 1,200 of 5,000 rows (24 %), 310 rows/s, 0:12 left, 3 errors``."""
        seconds = self._clock() - self._started
        speed = (self.num_done - self._found) / seconds if seconds > 0 else 0.0
        share = self.num_done / self.num_rows if self.num_rows else 1.0
        text = f"{self._name}: {self.num_done:,} of {self.num_rows:,} {self._unit} ({share:.0%})"
        if speed > 0:
            text += f", {speed:,.0f} {self._unit}/s" if speed >= 10 else f", {speed:.2g} {self._unit}/s"
            text += f", {_duration((self.num_rows - self.num_done) / speed)} left"
        if self.num_errors:
            text += f", {self.num_errors:,} error{'s' * (self.num_errors != 1)}"
        return f"{text}, {self.note}" if self.note else text

    def _write(self, text: str) -> None:
        filled = round(_BAR_WIDTH * self.num_done / self.num_rows) if self.num_rows else _BAR_WIDTH
        line = f"[{'#' * filled}{'.' * (_BAR_WIDTH - filled)}] {text}" if text else ""
        self._stream.write("\r" + line.ljust(self._length))
        self._stream.flush()
        self._length = len(line) or self._length


def _duration(seconds: float) -> str:
    """``1:02:03``, or ``2:03`` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
