from __future__ import annotations

from ray_qa.process_group import NodeTorchConfig, interface_of


def test_interfaces_are_found_by_their_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.77") is None


def test_the_configuration_is_torchs_with_another_start() -> None:
    config = NodeTorchConfig(backend="gloo", timeout_s=5)
    assert (config.backend, config.timeout_s) == ("gloo", 5)
    assert issubclass(config.backend_cls, NodeTorchConfig.__mro__[1]().backend_cls)
