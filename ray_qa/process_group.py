"""Torch's process groups on the network that Ray's nodes know each other by.

gloo listens where the machine's own name points to, and on many machines that is the loopback, where no other machine
reaches it.

Knows nothing of models or training.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from typing import Any

import ray
from ray.train.torch import TorchConfig

_SIOCGIFADDR = 0x8915


class NodeTorchConfig(TorchConfig):
    """`TorchConfig` whose workers talk through the interface that has their node's address."""

    @property
    def backend_cls(self) -> Any:
        return _NodeTorchBackend


class _NodeTorchBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(use_interface_of_node)
        super().on_start(worker_group, backend_config)


def use_interface_of_node() -> None:
    """Tell gloo, in this process, the interface of the node's address; unless the environment says another."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    here = ray.get_runtime_context().get_node_id()
    for address in (node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here):
        name = interface_of(address)
        if name is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = name


def interface_of(address: str) -> str | None:
    """The name of the network interface that has this IPv4 address; None where none has."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(asked.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:  # it has no address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
