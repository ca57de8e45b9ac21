"""mailbox.py: what workers put in arrives in the driver, in order, to the last one."""

from __future__ import annotations

import pytest
import ray

from ray_qa import mailbox


@pytest.mark.usefixtures("ray_session")
def test_messages_of_a_worker_arrive_in_order_and_all() -> None:
    found: list[int] = []

    def work(box) -> int:
        for number in range(40):
            ray.get(box.put.remote(number))
        return 40

    with mailbox.opened(found.append) as box:
        assert ray.get(ray.remote(work).remote(box)) == 40
    assert found == list(range(40))


@pytest.mark.usefixtures("ray_session")
def test_a_dead_mailbox_harms_nothing() -> None:
    with mailbox.opened(print) as box:
        ray.kill(box)
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(box.take.remote())
