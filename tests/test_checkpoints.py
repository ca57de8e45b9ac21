"""Checkpoints: whole or not at all, the newest kept, and resuming from one is exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ray_qa.checkpoints import CheckpointWriter, find_checkpoints
from ray_qa.errors import OutputError
from ray_qa.storage import locate


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"weight": torch.full((3, 4), value)}, "optimizer": {"step": torch.tensor(value)}}


def test_what_was_saved_is_read_back_and_the_newest_are_kept(tmp_path: Path) -> None:
    folder = locate(tmp_path / "checkpoints")
    assert find_checkpoints(folder) == []
    writer = CheckpointWriter(folder, keep=2)
    for step in (5, 10, 100):
        writer.save(step, tensors(step), {"losses": [1.5, step]})
    writer.close()
    found = find_checkpoints(folder)
    assert [checkpoint.step for checkpoint in found] == [10, 100]
    assert found[-1].position == {"losses": [1.5, 100]}
    assert torch.equal(found[-1].read("model")["weight"], torch.full((3, 4), 100.0))
    assert found[-1].read("optimizer")["step"].item() == 100
    assert sorted(child.name for child in (tmp_path / "checkpoints").iterdir()) == [
        "step-000000000010", "step-000000000100",
    ]


def test_one_that_is_named_is_kept_besides_the_newest(tmp_path: Path) -> None:
    folder = locate(tmp_path)
    writer = CheckpointWriter(folder, keep=1)
    steps = []
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, None)):
        writer.save(step, tensors(step), {}, keep_step=best)
        writer.close()
        steps.append([checkpoint.step for checkpoint in find_checkpoints(folder)])
    assert steps == [[1], [1, 2], [1, 3], [4], [4, 5], [6]]


def test_saving_copies_before_the_loop_goes_on(tmp_path: Path) -> None:
    folder = locate(tmp_path)
    weight = torch.zeros(1000)
    writer = CheckpointWriter(folder, keep=1)
    writer.save(1, {"model": {"weight": weight}}, {})
    weight += 1
    writer.close()
    assert not find_checkpoints(folder)[0].read("model")["weight"].any()


@pytest.mark.parametrize("damage", ["no end", "short file", "no file"])
def test_half_a_checkpoint_does_not_count(damage: str, tmp_path: Path) -> None:
    writer = CheckpointWriter(locate(tmp_path), keep=5)
    writer.save(1, tensors(1), {})
    writer.save(2, tensors(2), {})
    writer.close()
    newest = tmp_path / "step-000000000002"
    if damage == "no end":
        (newest / "checkpoint.json").unlink()
    elif damage == "short file":
        (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:-1])
    else:
        (newest / "optimizer.safetensors").unlink()
    assert [checkpoint.step for checkpoint in find_checkpoints(locate(tmp_path))] == [1]


def test_a_checkpoint_that_cannot_be_written_is_an_error_at_the_next_save(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    writer = CheckpointWriter(locate(blocked / "inner"), keep=1)
    writer.save(1, tensors(1), {})
    with pytest.raises(OutputError, match="a checkpoint cannot be written"):
        writer.close()
