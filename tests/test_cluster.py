from __future__ import annotations

import pickle

import pytest
from ray.train import ScalingConfig

from ray_qa import cluster
from ray_qa.cluster import Workers
from ray_qa.errors import CSVError, OptionError, WorkError

pytestmark = pytest.mark.usefixtures("ray_session")


def test_prediction_takes_a_one_thread_worker_per_cpu_but_none_that_would_idle() -> None:
    cpus = sum(cluster.cpus_per_node())
    assert cluster.prediction_workers(None, at_most=100) == Workers(cpus, False, 1)
    assert cluster.prediction_workers(None, at_most=1) == Workers(1, False, 1)


def test_prediction_follows_a_scaling_config() -> None:
    scaling = ScalingConfig(num_workers=1, resources_per_worker={"CPU": 2})
    assert cluster.prediction_workers(scaling, at_most=100) == Workers(1, False, 2)
    many = ScalingConfig(num_workers=1000)
    cpus = sum(cluster.cpus_per_node())
    assert cluster.prediction_workers(many, at_most=cpus).num_workers == cpus  # there is no work for more


def test_what_the_cluster_cannot_give_is_refused() -> None:
    with pytest.raises(OptionError, match="1 worker with 1 CPU and 1 GPU can never be there"):
        cluster.prediction_workers(ScalingConfig(num_workers=1, use_gpu=True), at_most=1)
    with pytest.raises(OptionError, match="1 worker with 999 CPUs can never be there"):
        cluster.prediction_workers(ScalingConfig(num_workers=1, resources_per_worker={"CPU": 999}), at_most=1)
    with pytest.raises(OptionError, match="1000 workers with 1 CPU each can never be there"):
        cluster.prediction_workers(ScalingConfig(num_workers=1000), at_most=1000)
    with pytest.raises(OptionError, match="2 workers with 999 CPUs each can never be there"):
        cluster.training_scaling(ScalingConfig(num_workers=2, resources_per_worker={"CPU": 999}))
    with pytest.raises(OptionError, match="num_workers is 0"):
        cluster.scaling_of(0)


def test_training_takes_a_worker_per_node_with_all_its_cpus() -> None:
    scaling = cluster.training_scaling(None)
    assert scaling.num_workers == len(cluster.cpus_per_node())
    assert scaling.resources_per_worker == {"CPU": min(cluster.cpus_per_node())}
    asked = ScalingConfig(num_workers=len(cluster.cpus_per_node()))
    assert cluster.training_scaling(asked) is asked


def test_flags() -> None:
    assert cluster.scaling_of(None) is None
    two = cluster.scaling_of(2, cpus_per_worker=1)
    assert two is not None and two.num_workers == 2 and two.resources_per_worker == {"CPU": 1.0}
    assert not two.use_gpu


def test_own_errors_are_found_and_survive_pickling() -> None:
    error = CSVError("a stray quote", file="a.csv", byte_offset=17, record=3, excerpt='5" y', allowed="quote it")
    outer = RuntimeError("wrapped")
    outer.__cause__ = pickle.loads(pickle.dumps(error))
    found = cluster.own_error(outer)
    assert isinstance(found, CSVError) and str(found) == str(error) and found.byte_offset == 17
    assert isinstance(cluster.own_error(RuntimeError("boom")), WorkError)
