"""Model files travel whole, once per node, and only those that are safe to load."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ray_qa.model_transfer import (
    FinishedModel,
    hand_over,
    local_directory,
    node_id,
    share_directory,
    take_over,
)
from ray_qa.storage import locate

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 5000)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "merges.txt").write_text("")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_drivers_node_uses_the_folder_itself(folder: Path) -> None:
    assert local_directory(share_directory(folder, "digest-1")) == folder


def test_another_node_gets_a_copy_of_the_safe_files_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_QA_HOME", str(tmp_path / "home"))
    shared = dataclasses.replace(share_directory(folder, "digest-2"), node_id="another")
    copy = local_directory(shared)
    assert copy == tmp_path / "home" / "models" / "digest-2"
    expected = contents(folder)
    del expected["pytorch_model.bin"]
    assert contents(copy) == expected
    inode = (copy / "config.json").stat().st_ino
    assert local_directory(shared) == copy and (copy / "config.json").stat().st_ino == inode
    assert [child.name for child in copy.parent.iterdir()] == ["digest-2"]


@pytest.mark.parametrize("driver", ["here", "elsewhere"])
def test_a_finished_model_reaches_the_drivers_folder(driver: str, folder: Path, tmp_path: Path) -> None:
    before = contents(folder)
    finished: FinishedModel = hand_over(folder, node_id() if driver == "here" else "elsewhere")
    assert bool(finished.files) == (driver == "elsewhere")
    take_over(finished, locate(tmp_path / "output"))
    assert contents(tmp_path / "output") == before
