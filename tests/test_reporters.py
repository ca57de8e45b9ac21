"""The history reaches TensorBoard, MLflow and Weights & Biases, all of them without a network."""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from ray_qa import reporters
from ray_qa.errors import OptionError
from ray_qa.storage import Location, locate
from tests.conftest import REPOSITORY


def events_in(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Step and figures of all events, in the order of the files; read as TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for file in sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    return found


def test_event_files_hold_every_figure(tmp_path: Path) -> None:
    with reporters.opened(("tensorboard",), locate(tmp_path), "id", {}) as told:
        told.begin(0)
        told.log("train", {"step": 5, "loss": 1.5, "windows_per_second": 3.0})
        told.log("eval", {"step": 5, "f1": 50.0})
    figures = [(step, values) for step, values in events_in(tmp_path / "runs") if values]
    assert figures == [(5, {"train/loss": 1.5}), (5, {"train/windows_per_second": 3.0}), (5, {"eval/f1": 50.0})]


def test_steps_that_come_again_take_the_place_of_the_lost_ones(tmp_path: Path) -> None:
    """A file that begins after a restart says from which step on earlier ones do not count."""
    with reporters.opened(("tensorboard",), locate(tmp_path), "id", {}) as told:
        told.begin(0)
        for step in (1, 2, 3):
            told.log("train", {"step": step, "loss": float(step)})
        told.begin(2)
        told.log("train", {"step": 3, "loss": 9.0})
    steps = [step for step, values in events_in(tmp_path / "runs")]
    # Version, three lines; version, the restart at 3, the line again.
    assert steps[:5] == [0, 1, 2, 3, 0] and set(steps[5:]) == {3} and len(steps) > 6
    assert events_in(tmp_path / "runs")[-1] == (3, {"train/loss": 9.0})


def test_event_files_for_an_object_store_come_at_the_end(tmp_path: Path) -> None:
    store = Location(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "out", "store://out")
    store.filesystem.create_dir("out/runs", recursive=True)
    with reporters.opened(("tensorboard",), store, "id", {}) as told:
        told.begin(0)
        told.log("train", {"step": 1, "loss": 2.0})
        assert not list((tmp_path / "out" / "runs").iterdir())
    assert (1, {"train/loss": 2.0}) in events_in(tmp_path / "out" / "runs")


def test_a_reporter_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def begin(self, step: int) -> None: ...
        def log(self, kind: str, line: object) -> None:
            raise ConnectionError("no way there")
        def end(self, succeeded: bool) -> None:
            raise AssertionError("was told of the end")

    good = reporters.TensorBoard(locate(tmp_path))
    told = reporters.Reporters([Broken(), good])
    told.begin(0)
    told.log("train", {"step": 1, "loss": 2.0})
    told.end(True)
    assert "Broken is told no more: ConnectionError: no way there" in caplog.text
    assert (1, {"train/loss": 2.0}) in events_in(tmp_path)


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reporters.check_installed(("tensorboard",))
    with pytest.raises(OptionError, match=r"'mlflow', which is not installed; allowed: pip install ray-qa\[mlflow\]"):
        reporters.check_installed(("tensorboard", "mlflow"))


_PROGRAM = """
import sys
from ray_qa import reporters

for begin in (0, 2):  # the second time as after the death of the driver
    with reporters.opened((sys.argv[1],), None, "0123abcd", {"learning_rate": 1e-3, "report_to": ("mlflow",)}) as told:
        told.begin(begin)
        for step in range(begin + 1, begin + 4):
            told.log("train", {"step": step, "loss": 1 / step})
        told.log("eval", {"step": step, "f1": 50.0})
"""


def run_program(reporter: str, folder: Path, **environment: str) -> str:
    program = textwrap.dedent(_PROGRAM)
    done = subprocess.run(
        [sys.executable, "-c", program, reporter], cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "HOME": str(folder)} | environment, check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "told no more" not in done.stderr, done.stderr
    return done.stdout


def test_mlflow_gets_one_run_however_often_it_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    address = f"file://{tmp_path}/mlruns"
    run_program("mlflow", tmp_path, MLFLOW_TRACKING_URI=address, MLFLOW_ALLOW_FILE_STORE="true")
    look = (
        "import json, mlflow\n"
        "client = mlflow.MlflowClient()\n"
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list')\n"
        "history = client.get_metric_history\n"
        "losses = [[(m.step, m.value) for m in history(run.info.run_id, 'train/loss')] for run in runs]\n"
        "print(json.dumps([[run.info.status, run.data.params, run.data.metrics] for run in runs] + losses))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=120,
        env=os.environ | {"MLFLOW_TRACKING_URI": address, "MLFLOW_ALLOW_FILE_STORE": "true"},
    )
    (status, params, metrics), losses = json.loads(done.stdout)
    assert status == "FINISHED" and params["learning_rate"] == "0.001"
    assert metrics == {"train/loss": 0.2, "eval/f1": 50.0}
    assert [step for step, _ in losses] == [1, 2, 3, 3, 4, 5]


def test_wandb_gets_the_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    run_program("wandb", tmp_path, WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    runs = sorted((tmp_path / "wandb").glob("offline-run-*/run-0123abcd.wandb"))
    assert len(runs) == 2  # offline both parts stand by themselves; `wandb sync` puts them under their id
    data = b"".join(run.read_bytes() for run in runs)
    assert b"train/loss" in data and b"eval/f1" in data and b"learning_rate" in data
