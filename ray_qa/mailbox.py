"""Messages from workers to a driver that waits for them in one long call of Ray's.

The workers' own log lines stay on their nodes. What a person who waits should see goes through an actor beside the
driver, which a thread of the driver empties.

Knows nothing of what a message says.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

#: Seconds between two looks; messages beyond the newest few are dropped when nobody looks.
_PERIOD = 0.5
_KEPT = 10_000


class Mailbox:
    """Holds messages until they are taken; an actor."""

    def __init__(self) -> None:
        self._messages: deque[Any] = deque(maxlen=_KEPT)

    def put(self, message: Any) -> None:
        self._messages.append(message)

    def take(self) -> list[Any]:
        messages = list(self._messages)
        self._messages.clear()
        return messages


@contextlib.contextmanager
def opened(on_message: Callable[[Any], None]) -> Iterator[Any]:
    """An actor handle for workers (``handle.put.remote(message)``); messages come to ``on_message`` in a thread.

    What is there at the end still comes. A mailbox that dies takes no more messages, and harms nothing else.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
    done = threading.Event()

    def listen() -> None:
        is_last = False
        while not is_last:
            is_last = done.wait(_PERIOD)
            try:
                messages = ray.get(mailbox.take.remote(), timeout=60)
            except Exception:
                return
            for message in messages:
                on_message(message)

    thread = threading.Thread(target=listen, name="mailbox", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        done.set()
        thread.join()
        ray.kill(mailbox)
