from __future__ import annotations

import copy
import logging
import math

import pytest
import ray
import yaml
from ray.util.placement_group import placement_group, remove_placement_group

from ray_qa import cluster, room
from ray_qa.errors import OptionError, WorkError
from ray_qa.room import Growth, NodeType
from tests.conftest import REPOSITORY


def test_what_fits_on_a_node() -> None:
    node = {"CPU": 16.0, "GPU": 2.0, "memory": 1e9}
    assert room.fits(node, {"CPU": 3}) == 5
    assert room.fits(node, {"CPU": 1, "GPU": 1}) == 2
    assert room.fits(node, {"CPU": 0, "GPU": 0.5}) == 4
    assert room.fits(node, {"TPU": 1}) == 0


def test_what_an_autoscaler_may_add() -> None:
    """Each type up to its own limit, all types together up to the cluster's."""
    more = Growth((NodeType({"CPU": 16}, 8), NodeType({"CPU": 4, "GPU": 1}, 8)), max_nodes=10)
    assert more.most({"CPU": 4}) == 8 * 4 + 2
    assert more.most({"CPU": 1, "GPU": 1}) == 8
    assert more.most({"CPU": 17}) == 0
    assert more.has("GPU") and not more.has("TPU")
    assert Growth(is_known=False).most({"CPU": 1}) == math.inf


def test_the_configuration_that_ray_up_leaves_on_the_head() -> None:
    from ray.autoscaler._private.util import prepare_config

    config = prepare_config(yaml.safe_load((REPOSITORY / "cluster.yaml").read_text()))
    # What `ray up` finds out about instances before it writes the file.
    resources = {"head": {"CPU": 0}, "cpu_worker": {"CPU": 16}, "gpu_worker": {"CPU": 4, "GPU": 1}}
    for name, amounts in resources.items():
        config["available_node_types"][name]["resources"] = amounts
    more = room._growth_of_bootstrap(yaml.safe_dump(config))
    assert more == Growth((NodeType({"CPU": 16}, 8), NodeType({"CPU": 4, "GPU": 1}, 8)), max_nodes=16)
    unknown = copy.deepcopy(config)
    unknown["available_node_types"]["gpu_worker"]["resources"] = {}
    found = room._growth_of_bootstrap(yaml.safe_dump(unknown))
    assert found is not None and not found.is_known
    assert room._growth_of_bootstrap(None) is None
    garbage = room._growth_of_bootstrap("- 1")
    assert garbage is not None and not garbage.is_known


@pytest.mark.usefixtures("ray_session")
def test_more_than_there_can_be_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cpus = sum(cluster.cpus_per_node())
    room.check(cpus, {"CPU": 1})
    with pytest.raises(OptionError, match=rf"{cpus + 1} workers with 1 CPU each can never .* at most {cpus} such w"):
        room.check(cpus + 1, {"CPU": 1})
    room.check(cpus + 1, {"CPU": 1}, wait_seconds=60)  # somebody may add nodes by hand
    more = Growth((NodeType({"CPU": 4, "GPU": 1}, 3),), max_nodes=3)
    monkeypatch.setattr(room, "growth", lambda: more)
    room.check(3, {"CPU": 1, "GPU": 1})
    with pytest.raises(OptionError, match=r"autoscaler may add at most 3 nodes \(3 times 4 CPUs and 1 GPU\); allowed"):
        room.check(4, {"CPU": 1, "GPU": 1}, wait_seconds=60)
    with pytest.raises(OptionError, match="no GPU yet, and its autoscaler may add some"):
        cluster.prediction_workers(None, at_most=1)
    with pytest.raises(OptionError, match="no GPU yet, and its autoscaler may add some"):
        cluster.training_scaling(None)


@pytest.mark.usefixtures("ray_session")
def test_waiting_says_so_and_gives_up(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another job holds every CPU, then lets go of them."""
    monkeypatch.setattr(room, "_SAY_FIRST", 0.0)
    caplog.set_level(logging.INFO, logger="ray_qa")
    cpus = sum(cluster.cpus_per_node())
    other = placement_group([{"CPU": cpus}])
    try:
        assert other.wait(30)
        with pytest.raises(WorkError, match=r"waited \d s for room for 1 worker with 1 CPU, in vain: the cluster has"):
            room.wait(1, {"CPU": 1}, 0.5)
        assert "waiting for room for 1 worker with 1 CPU" in caplog.text
    finally:
        remove_placement_group(other)
    room.wait(cpus, {"CPU": 1}, 30)
    # What was only asked for is given back.
    again = placement_group([{"CPU": cpus}])
    assert again.wait(30)
    remove_placement_group(again)


@pytest.mark.usefixtures("ray_session")
def test_a_job_for_cpus_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, float]] = []
    monkeypatch.setattr(room, "wait", lambda count, worker, *_, **__: asked.append(dict(worker)))
    monkeypatch.setattr(room, "worker_nodes", list)
    monkeypatch.setattr(room, "growth", lambda: Growth((NodeType({"CPU": 4}, 1), NodeType({"GPU": 1}, 1)), 2))
    cluster.wait_for_a_node()
    assert asked == [{"CPU": 1}]
    assert ray.is_initialized()
