"""How many workers fit: on the nodes there are, on those that an autoscaler may add; and waiting until they do.

What an autoscaler may add is read where it is known: from the configuration that `ray up` leaves on the head, from what
a hosted Ray tells of itself, and, on Kubernetes, from the autoscaler's own verdict on a request.

Knows nothing of what the workers are for.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_qa.errors import OptionError, WorkError

#: Seconds to wait for workers where the caller does not say.
WAIT_SECONDS = 1800.0
#: Where `ray up` leaves a cluster's configuration, on its head.
BOOTSTRAP_CONFIG = "~/ray_bootstrap_config.yaml"

#: Seconds between two lines about waiting, and until the first.
_SAY_EVERY, _SAY_FIRST = 30.0, 3.0
_HEAD = "node:__internal_head__"

#: Amounts by the name of the resource, such as {"CPU": 1}; of a worker, or of a node.
Resources = Mapping[str, float]

logger = logging.getLogger("ray_qa")


@dataclass(frozen=True)
class NodeType:
    """A kind of node that an autoscaler may add, ``max_nodes`` at most."""

    resources: Resources
    max_nodes: int


@dataclass(frozen=True)
class Growth:
    """What an autoscaler may add: ``max_nodes`` of these types altogether.

    ``is_known`` is False where nobody says, ``judges`` True where the autoscaler says of a request that it cannot be
    met.
    """

    types: tuple[NodeType, ...] = ()
    max_nodes: int = 0
    is_known: bool = True
    judges: bool = False

    def most(self, worker: Resources) -> float:
        """Workers that fit on all nodes that may be added; infinite where that is not known."""
        if not self.is_known:
            return math.inf
        total, left = 0, self.max_nodes
        fitting_and_count = [(fits(kind.resources, worker), kind.max_nodes) for kind in self.types]
        for fitting, count in sorted(fitting_and_count, reverse=True):
            nodes = min(count, left)
            total, left = total + nodes * fitting, left - nodes
        return total

    def has(self, resource: str) -> bool:
        """Whether a node with this resource may be added."""
        return any(kind.max_nodes > 0 and kind.resources.get(resource, 0) > 0 for kind in self.types)


def worker_nodes() -> list[dict[str, Any]]:
    """The nodes that are alive and take work, as `ray.nodes` tells of them."""
    found = [node for node in ray.nodes() if node["Alive"]]
    return [node for node in found if node["Resources"].get("CPU") or node["Resources"].get("GPU")]


def fits(node: Resources, worker: Resources) -> int:
    """Workers that fit on one node with nothing else on it."""
    needed = {name: amount for name, amount in worker.items() if amount}
    if not needed:
        return 10**6
    return min(int(node.get(name, 0) / amount + 1e-9) for name, amount in needed.items())


def fit_now(worker: Resources) -> int:
    """Workers that fit on the nodes there are, with nothing else on them."""
    return sum(fits(node["Resources"], worker) for node in worker_nodes())


def growth() -> Growth | None:
    """What an autoscaler may add; None where there is none."""
    told = _growth_of_cluster_config()
    if told is not None:
        return told
    if os.environ.get("KUBERNETES_SERVICE_HOST") and os.environ.get("RAY_CLUSTER_NAME"):
        return Growth(is_known=False, judges=True)  # KubeRay: which pods it may add stands in the RayCluster alone
    return _growth_of_bootstrap(_on_head(_read_bootstrap))


def _growth_of_cluster_config() -> Growth | None:
    """From the configuration that a hosted Ray reports to its head."""
    try:
        config = ray._private.state.state.get_cluster_config()
    except (AttributeError, OSError, ValueError):  # of another version of Ray
        return None
    if config is None or not config.node_group_configs:
        return None
    unlimited = 10**6
    types = tuple(
        NodeType(dict(group.resources), unlimited if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
    )
    return Growth(types, sum(kind.max_nodes for kind in types))


def _read_bootstrap() -> str | None:
    with contextlib.suppress(OSError):
        return Path(BOOTSTRAP_CONFIG).expanduser().read_text()
    return None


def _on_head(read: Any) -> Any:
    """``read()`` on the head of the cluster."""
    heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and _HEAD in node["Resources"]]
    if not heads or heads[0] == ray.get_runtime_context().get_node_id():
        return read()
    there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    return ray.get(ray.remote(num_cpus=0)(read).options(scheduling_strategy=there).remote())


def _growth_of_bootstrap(text: str | None) -> Growth | None:
    if text is None:
        return None
    try:
        config = yaml.safe_load(text)
        kinds = [kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]]
        if config["provider"]["type"] == "local":
            # Machines that are there already; nobody knows what is in those that have not joined yet.
            return None if len(worker_nodes()) >= int(config["max_workers"]) else Growth(is_known=False)
        types = tuple(
            NodeType(dict(kind["resources"]), int(kind.get("max_workers", config["max_workers"]))) for kind in kinds
        )
        return Growth(types, int(config["max_workers"]), is_known=all(kind.resources for kind in types))
    except (KeyError, TypeError, ValueError, yaml.YAMLError):
        return Growth(is_known=False)


def check(count: int, worker: Resources, *, wait_seconds: float | None = None) -> None:
    """Refuse workers that the cluster can never hold.

    Args:
        count: workers that are needed at the same time.
        worker: what each of them takes.
        wait_seconds: how long the caller said to wait for them. Where no autoscaler is known somebody may add nodes by
            hand, so that then nothing is refused.

    Raises:
        OptionError: says what there is, what may be added, and what would fit.
    """
    now = fit_now(worker)
    if count <= now:
        return
    more = growth()
    if more is None and wait_seconds is not None:
        return
    most = now if more is None else max(now, more.most(worker))
    if count <= most:
        return
    grown = "no node can be added" if more is None else f"its autoscaler may add {describe_growth(more)}"
    raise OptionError(
        f"{describe(count, worker)} can never be there at once: {describe_nodes()}, and {grown}; allowed: at most "
        f"{most:g} such worker{'s' if most != 1 else ''}"
    )


def wait(
    count: int, worker: Resources, wait_seconds: float | None = None, *, strategy: str = "PACK"
) -> None:
    """Wait until ``count`` workers fit on the cluster at once, beside what others do there.

    The wait is a request that an autoscaler sees. It says so now and then.

    Raises:
        OptionError: the autoscaler says that it never can.
        WorkError: they did not fit within ``wait_seconds`` (None is `WAIT_SECONDS`).
    """
    seconds = WAIT_SECONDS if wait_seconds is None else wait_seconds
    bundle = {name: float(amount) for name, amount in worker.items() if amount}
    if not bundle:
        return
    started = time.monotonic()
    more = growth()
    group = placement_group([bundle] * count, strategy=strategy)
    try:
        said = -math.inf
        while not group.wait(_pause(started, seconds)):
            waited = time.monotonic() - started
            if more is not None and more.judges and _is_infeasible(group, [bundle] * count):
                raise OptionError(
                    f"{describe(count, worker)} can never be there at once, says the cluster's autoscaler: "
                    f"{describe_nodes()}; allowed: fewer or smaller workers, or more and larger nodes"
                )
            if waited >= seconds:
                raise WorkError(
                    f"waited {waited:.0f} s for room for {describe(count, worker)}, in vain: {describe_nodes()}, and "
                    f"{_describe_free()}; allowed: the same command later, fewer workers, or a longer wait "
                    "(--wait-for-workers)"
                )
            if waited >= _SAY_FIRST and time.monotonic() - said >= _SAY_EVERY:
                logger.info(
                    "waiting for room for %s: %s, and %s; %.0f of at most %.0f s", describe(count, worker),
                    describe_nodes(), _describe_free(), waited, seconds,
                )
                said = time.monotonic()
        if said > 0:
            logger.info("there is room after %.0f s", time.monotonic() - started)
    finally:
        remove_placement_group(group)


def _pause(started: float, seconds: float) -> float:
    """Until the next look: soon at first, and never after the end."""
    return max(0.05, min(2.0, started + seconds - time.monotonic()))


def _is_infeasible(group: PlacementGroup, bundles: Sequence[Resources]) -> bool:
    """Whether the autoscaler (the newer one, as on Kubernetes) lists the request among those that it cannot meet."""
    from ray.core.generated import autoscaler_pb2

    messages: Any = autoscaler_pb2
    worker: Any = ray._private.worker.global_worker
    try:
        reply = messages.GetClusterStatusReply()
        reply.ParseFromString(worker.gcs_client.get_cluster_status())
    except (AttributeError, RuntimeError, OSError, ValueError):
        return False
    for gang in reply.autoscaling_state.infeasible_gang_resource_requests:
        if group.id.hex() in gang.details:
            return True
        requests = [request for selector in gang.bundle_selectors for request in selector.resource_requests]
        found = [dict(request.resources_bundle) for request in [*gang.requests, *requests]]
        if found and found == [dict(bundle) for bundle in bundles]:
            return True
    return False


def describe(count: int, worker: Resources) -> str:
    """Such as "4 workers with 2 CPUs and 1 GPU each"."""
    what = " and ".join(_amount(name, amount) for name, amount in worker.items() if amount) or "nothing"
    return f"1 worker with {what}" if count == 1 else f"{count} workers with {what} each"


def describe_nodes() -> str:
    """Such as "the cluster has 3 nodes (8 CPUs; 8 CPUs; 4 CPUs and 1 GPU)"."""
    kinds: dict[str, int] = {}
    for node in worker_nodes():
        text = _describe(node["Resources"])
        kinds[text] = kinds.get(text, 0) + 1
    if not kinds:
        return "the cluster has no node that takes work yet"
    total = sum(kinds.values())
    listed = "; ".join(text if count == 1 else f"{count} times {text}" for text, count in kinds.items())
    return f"the cluster has {total} node{'s' if total != 1 else ''} for work ({listed})"


def describe_growth(more: Growth) -> str:
    """Such as "at most 16 nodes (8 times 16 CPUs; 8 times 4 CPUs and 1 GPU)"."""
    listed = "; ".join(f"{kind.max_nodes} times {_describe(kind.resources)}" for kind in more.types)
    return f"at most {more.max_nodes} nodes ({listed})"


def _describe_free() -> str:
    return f"{_describe(ray.available_resources())} of it free"


def _describe(resources: Resources) -> str:
    return " and ".join(_amount(name, resources[name]) for name in ("CPU", "GPU") if resources.get(name)) or "no CPU"


def _amount(name: str, amount: float) -> str:
    return f"{amount:g} {name}" if amount == 1 or name not in ("CPU", "GPU") else f"{amount:g} {name}s"
