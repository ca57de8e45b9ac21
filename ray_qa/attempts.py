"""Workers that die: what they were at is counted outside of them, and cut in pieces until the killing row is alone.

Ray starts a dead worker again and gives it the same work, for ever. So a worker that finds itself started again says
what it is about to do, and asks how often that killed a worker before:

    a part whose worker died             is tried again, `PART_DEATHS` times more
    a part that goes on killing          is answered in `PIECES` pieces, these in pieces again, each tried once
    a single row that kills              is tried again, and then gets an error instead of an answer

A part that nobody dies of costs nothing; pieces that were answered are kept until the part is done. A part of n rows
with one row that kills costs at most ``PART_DEATHS + log(n) / log(PIECES) + ROW_DEATHS`` deaths and one more, which
found the worker unprepared: 7 for 32,768 rows. Two halves instead of many pieces would cost 19, and each death costs
loading the model.

Knows nothing of models, files or Ray Data.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_qa.errors import WorkError

T = TypeVar("T")

#: Deaths, while its worker was watched, after which a part is cut in pieces.
PART_DEATHS = 2
#: Pieces of a part, or of a piece, that killed.
PIECES = 32
#: Deaths after which a single row gets an error.
ROW_DEATHS = 2
#: Deaths of one worker in a row, with nothing finished between them, that end the run.
FRUITLESS_DEATHS = 40

#: First row of a part, and a stretch of the positions of its rows; the stop is exclusive.
Unit = tuple[int, int, int]


class Ledger:
    """Who is at what, and how often it killed; an actor beside the driver, which dies with the run."""

    def __init__(self) -> None:
        self._process_of: dict[str, str] = {}
        self._unit_of: dict[str, Unit] = {}
        self._fruitless: dict[str, int] = {}
        self._deaths: dict[Unit, int] = {}
        self._kept: dict[Unit, bytes] = {}

    def arrive(self, worker: str, process: str) -> int:
        """How often in a row ``worker`` died without finishing anything; 0 for one that never died."""
        before = self._process_of.get(worker)
        self._process_of[worker] = process
        if before is None or before == process:
            return self._fruitless.get(worker, 0)
        unit = self._unit_of.pop(worker, None)
        if unit is not None:
            self._deaths[unit] = self._deaths.get(unit, 0) + 1
        self._fruitless[worker] = self._fruitless.get(worker, 0) + 1
        return self._fruitless[worker]

    def begin(self, worker: str, unit: Unit) -> tuple[int, bytes | None]:
        """``worker`` is about to do ``unit``: deaths that it cost so far, or what was kept of it."""
        if unit not in self._kept:
            self._unit_of[worker] = unit
        return self._deaths.get(unit, 0), self._kept.get(unit)

    def end(self, worker: str, unit: Unit, result: bytes | None = None) -> None:
        self._unit_of.pop(worker, None)
        self._fruitless[worker] = 0
        if result is not None:
            self._kept[unit] = result

    def close(self, first_row: int) -> None:
        """A part is done: forget it."""
        for store in (self._deaths, self._kept):
            for unit in [unit for unit in store if unit[0] == first_row]:
                del store[unit]  # type: ignore[attr-defined]


def start_ledger() -> Any:
    """A ledger for one run, on the driver's node where that is possible. End it with `ray.kill`."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
    return ray.remote(Ledger).options(**options).remote()


def _ask(reference: Any) -> Any:
    return ray.get(reference)


class Watch:
    """One worker's side of the ledger.

    ``worker`` must be the same name when the worker is started again, such as the id of an actor or a task.
    """

    def __init__(self, ledger: Any, worker: str) -> None:
        self._ledger = ledger
        self._worker = worker
        process = f"{ray.get_runtime_context().get_node_id()}-{os.getpid()}"
        self._fruitless: int = _ask(ledger.arrive.remote(worker, process))

    @property
    def is_needed(self) -> bool:
        """Whether this worker has died before."""
        return self._fruitless > 0

    def check(self) -> None:
        """Raise WorkError where starting again has become pointless."""
        if self._fruitless >= FRUITLESS_DEATHS:
            raise WorkError(
                f"a worker died {self._fruitless} times in a row and finished nothing in between; the model, or the "
                "memory of the node, is not up to these rows"
            )

    def kills(self, unit: Unit, deaths: int = PART_DEATHS) -> bool:
        """Whether ``unit`` has killed that often; if not, it is begun, and `finished` has to follow."""
        found, _ = _ask(self._ledger.begin.remote(self._worker, unit))
        return found >= deaths

    def finished(self, unit: Unit) -> None:
        _ask(self._ledger.end.remote(self._worker, unit))

    def run(
        self, first_row: int, num_rows: int, *, compute: Callable[[int, int], T], give_up: Callable[[int, str], T],
        join: Callable[[T, T], T], pack: Callable[[T], bytes], unpack: Callable[[bytes], T],
    ) -> T:
        """``compute(0, num_rows)``, or in pieces where that kills: ``compute(start, stop)`` of stretches, joined.

        A row that kills alone becomes ``give_up(position, reason)``.
        """
        def stretch(start: int, stop: int) -> T:
            if start == stop:
                return compute(start, stop)
            unit = (first_row, start, stop)
            is_part, is_row = stop - start == num_rows, stop - start == 1
            deaths, kept = _ask(self._ledger.begin.remote(self._worker, unit))
            if kept is not None:
                return unpack(kept)
            if deaths >= (ROW_DEATHS if is_row else PART_DEATHS if is_part else 1):
                if is_row:
                    result = give_up(start, f"its worker died {deaths} times while it answered this row alone")
                else:
                    count = min(PIECES, stop - start)
                    cuts = [start + (stop - start) * i // count for i in range(count + 1)]
                    result = reduce(join, map(stretch, cuts, cuts[1:]))
            else:
                result = compute(start, stop)
            _ask(self._ledger.end.remote(self._worker, unit, None if is_part else pack(result)))
            return result

        result = stretch(0, num_rows)
        _ask(self._ledger.close.remote(first_row))
        return result
