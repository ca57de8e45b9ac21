"""What a node sees; on nodes with disks of their own: tests/cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_qa import preflight
from ray_qa.storage import locate


def test_files_are_told_apart_by_size_and_ends(tmp_path: Path) -> None:
    one, same, other, short = (tmp_path / name for name in ("one", "same", "other", "short"))
    data = bytes(range(256)) * 100
    one.write_bytes(data)
    same.write_bytes(data)
    other.write_bytes(data[:-1] + b"x")
    short.write_bytes(b"a,b\n")
    (tmp_path / "empty").touch()
    names = ("one", "same", "other", "short", "empty", "none")
    seen = preflight._look([locate(tmp_path / name) for name in names])
    assert seen[0] == seen[1] and len({*seen}) == 5
    assert seen[0].startswith("25600 bytes ") and seen[4].startswith("0 bytes ") and seen[5] == "no such file"


def test_messages_name_nodes_and_say_what_to_use(tmp_path: Path) -> None:
    blind = {f"10.0.0.{i} (node-{i})": "no such file" for i in range(7)}
    text = preflight._message(locate(tmp_path), f"output {tmp_path}: what the driver writes is not seen", blind, 9)
    assert f"output {tmp_path}: what the driver writes is not seen on 7 of 9 nodes" in text
    assert "10.0.0.0 (node-0): no such file" in text and "and 2 more" in text and "node-6" not in text
    assert "a folder that all nodes share" in text and "s3://bucket/folder" in text
    keys = {"access_key": "key-1", "secret_key": "very-secret", "region": "r"}
    remote = locate("s3://bucket/x", storage_options=keys)
    text = preflight._message(remote, "s3://bucket/x: the input is not the same", {"10.0.0.1": "cannot be read (x)"}, 1)
    assert "AWS_ENDPOINT_URL where the driver runs" in text and "very-secret" not in text


@pytest.mark.usefixtures("ray_session")
def test_on_one_machine_nothing_is_asked(tmp_path: Path) -> None:
    preflight.check_nodes(inputs=[locate(tmp_path / "none.csv")], outputs={"output": locate(tmp_path), "other": None})
    assert not list(tmp_path.iterdir())
