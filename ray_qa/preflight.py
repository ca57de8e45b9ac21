"""Before any work: does every node see the input and the output as the driver does?

A path on a disk names another file on every machine, and credentials may be there on one and not on the other. So the
driver writes a probe into the output, and every node that takes work reads it, and the beginning and the end of the
input files.

Knows nothing of rows, models or parts.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import xxhash
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_qa import room
from ray_qa.errors import InputError, OutputError, UserError
from ray_qa.storage import Location

#: Input files that are looked at, evenly spread: a folder of many files is one mount, or one bucket.
_FILES = 16
#: Bytes that are compared at either end of a file.
_END_BYTES = 4096
#: Nodes that are named in a message.
_NAMED = 5

_SHARED = "a folder that all nodes share (NFS, EFS, Filestore, ...), or an object store such as s3://bucket/folder"


def check_nodes(*, inputs: Sequence[Location] = (), outputs: Mapping[str, Location | None] | None = None) -> None:
    """Read ``inputs`` (files) and probes in ``outputs`` (folders that are there) on every node that takes work.

    The keys of ``outputs`` are what messages call them; those that are None are skipped.

    Nodes that an autoscaler adds later are not looked at. On a single machine this costs nothing.

    Raises:
        InputError, OutputError: a node does not see what the driver sees; says which nodes, and what to use instead.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in room.worker_nodes() if node["NodeID"] != here]
    if not nodes:
        return
    step = max(1, -(-len(inputs) // _FILES))
    files = list(inputs[::step])
    folders = {name: folder for name, folder in (outputs or {}).items() if folder is not None}
    probes = [folder / f"_probe.{uuid.uuid4().hex}" for folder in folders.values()]
    try:
        for probe in probes:
            probe.publish(probe.name.encode())
        expected = _look([*files, *probes])
        found = _look_on(nodes, [*files, *probes])
    finally:
        for probe in probes:
            probe.delete()
    for number, location in enumerate([*files, *probes]):
        blind = {address: seen[number] for address, seen in found.items() if seen[number] != expected[number]}
        if not blind:
            continue
        if number < len(files):
            raise InputError(_message(location, f"{location.uri}: the input is not the same", blind, len(nodes)))
        name, folder = list(folders.items())[number - len(files)]
        what = f"{name} {folder.uri}: what the driver writes there is not seen"
        raise OutputError(_message(folder, what, blind, len(nodes)))


def _look_on(nodes: Sequence[dict[str, Any]], locations: Sequence[Location]) -> dict[str, list[str]]:
    """What each node sees, by its address; nodes that are lost meanwhile are left out."""
    call = ray.remote(num_cpus=0, max_retries=0)(_look)
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        address = f"{node['NodeManagerAddress']} ({node['NodeManagerHostname']})"
        asked[address] = call.options(scheduling_strategy=there).remote(locations)
    found = {}
    for address, reference in asked.items():
        try:
            found[address] = ray.get(reference)
        except RayError:
            if any(address.startswith(f"{node['NodeManagerAddress']} ") for node in room.worker_nodes()):
                raise
    return found


def _look(locations: Sequence[Location]) -> list[str]:
    """Size and ends of files as one word each, or why they cannot be read."""
    return [_describe(location) for location in locations]


def _describe(location: Location) -> str:
    try:
        size = location.info().size
        if size is None:
            return "no such file"
        ends = xxhash.xxh3_64()
        ends.update(location.read_bytes(0, min(size, _END_BYTES)))
        ends.update(location.read_bytes(max(0, size - _END_BYTES), size))
        return f"{size} bytes {ends.hexdigest()}"
    except OSError as error:
        return f"cannot be read ({error})"
    except UserError as error:
        return str(error)


def _message(location: Location, what: str, blind: dict[str, str], num_nodes: int) -> str:
    named = "; ".join(f"{address}: {_difference(seen)}" for address, seen in itertools.islice(blind.items(), _NAMED))
    more = f"; and {len(blind) - _NAMED} more" if len(blind) > _NAMED else ""
    allowed = f"each machine has a disk of its own; allowed on several: {_SHARED}"
    if not location.is_local:
        allowed = (
            "allowed: credentials and an endpoint that hold on every node: the roles of the machines, or "
            "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL where the driver runs, which hands them on"
        )
    return f"{what} on {len(blind)} of {num_nodes} nodes ({named}{more}); {allowed}"


def _difference(seen: str) -> str:
    return "another file of that name" if " bytes " in seen else seen
