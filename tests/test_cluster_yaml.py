"""cluster.yaml fits Ray's schema and says what the project promises of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "cluster.yaml").read_text())


def test_it_fits_the_schema_of_ray_up(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(Exception, match="max_workerz"):
        validate_config(prepare_config(copy.deepcopy(config) | {"max_workerz": 3}))


def test_the_head_does_no_work_and_workers_start_from_none(config: dict[str, Any]) -> None:
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}
    assert all(kind["min_workers"] == 0 for name, kind in types.items() if name != config["head_node_type"])


def test_the_dashboard_is_on_loopback_and_every_node_asks_for_the_token(config: dict[str, Any]) -> None:
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    starts = [line for line in commands if "ray start" in line]
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


def test_nodes_install_the_tested_versions(config: dict[str, Any]) -> None:
    (install,) = [line for line in config["setup_commands"] if "pip install" in line]
    assert "--constraint ~/ray_qa_source/constraints.txt ~/ray_qa_source" in install
