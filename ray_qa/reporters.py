"""The history of a training as it grows: TensorBoard event files, MLflow, Weights & Biases.

A reporter is told of the run (`begin`), of every line (`log`), and of the end (`end`). When a training goes on from a
checkpoint the steps after it come again: TensorBoard hides what was written of them before, the other two go on in the
run that has the same id, where they can.

Knows nothing of Ray, or of what a figure means.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ray_qa.errors import OptionError
from ray_qa.options import Reporter as Name
from ray_qa.storage import Location

logger = logging.getLogger("ray_qa")

RUNS = "runs"
PROJECT = "ray_qa"
_MODULES = {"mlflow": "mlflow", "wandb": "wandb"}


class Reporter(Protocol):
    def begin(self, step: int) -> None:
        """The run (re)starts with ``step`` steps done; told before any line."""

    def log(self, kind: str, line: Mapping[str, float]) -> None:
        """Figures of ``kind`` ("train", "eval"); ``line["step"]`` is the number of steps done."""

    def end(self, succeeded: bool) -> None:
        """Nothing more comes."""


def check_installed(report_to: Sequence[Name]) -> None:
    """Raise OptionError where a reporter's library is missing."""
    for name in report_to:
        if name in _MODULES and importlib.util.find_spec(_MODULES[name]) is None:
            raise OptionError(f"report_to names {name!r}, which is not installed; allowed: pip install ray-qa[{name}]")


class Reporters:
    """All reporters of a run; one that fails is left out from then on, and the training goes on."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = list(reporters)

    def begin(self, step: int) -> None:
        self._tell("begin", step)

    def log(self, kind: str, line: Mapping[str, float]) -> None:
        self._tell("log", kind, line)

    def end(self, succeeded: bool) -> None:
        self._tell("end", succeeded)

    def _tell(self, what: str, *values: Any) -> None:
        for reporter in list(self._reporters):
            try:
                getattr(reporter, what)(*values)
            except Exception as error:  # whatever a third party's library raises: a figure less is no training less
                self._reporters.remove(reporter)
                logger.warning("%s is told no more: %s: %s", type(reporter).__name__, type(error).__name__, error)


@contextlib.contextmanager
def opened(
    report_to: Sequence[Name], output: Location | None, run_id: str, options: Mapping[str, Any]
) -> Iterator[Reporters]:
    """The reporters that ``report_to`` names. TensorBoard takes an ``output`` folder; without one it is left out."""
    made: list[Reporter] = []
    for name in report_to:
        if name == "tensorboard" and output is not None:
            made.append(TensorBoard(output / RUNS))
        elif name == "mlflow":
            made.append(MLflow(run_id, options))
        elif name == "wandb":
            made.append(WeightsAndBiases(run_id, options))
    reporters = Reporters(made)
    try:
        yield reporters
    except BaseException:
        reporters.end(False)
        raise
    reporters.end(True)


class TensorBoard:
    """Event files in a folder; those for an object store lie on the driver's disk until the end."""

    def __init__(self, folder: Location) -> None:
        self._folder = folder
        self._staged = None if folder.is_local else tempfile.TemporaryDirectory(prefix="ray_qa_runs_")
        self._writer: Any = None

    def begin(self, step: int) -> None:
        from tensorboardX import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        directory = self._folder.path if self._staged is None else self._staged.name
        # What stands there of later steps was lost with the workers that did them.
        # The library names files by the second, and would write over one that is as young.
        self._writer = SummaryWriter(
            directory, purge_step=step + 1 if step else None, flush_secs=10, filename_suffix=f".{uuid.uuid4().hex[:8]}"
        )

    def log(self, kind: str, line: Mapping[str, float]) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(f"{kind}/{name}", value, int(line["step"]))

    def end(self, succeeded: bool) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._staged is not None:
            for file in Path(self._staged.name).iterdir():
                (self._folder / file.name).publish(file.read_bytes())
            self._staged.cleanup()


class MLflow:
    """A run under MLFLOW_TRACKING_URI; its experiment is MLFLOW_EXPERIMENT_NAME, else `PROJECT`."""

    _TAG = "ray_qa.run"

    def __init__(self, run_id: str, options: Mapping[str, Any]) -> None:
        self._run_id, self._options = run_id, options
        self._is_open = False

    def begin(self, step: int) -> None:
        import mlflow

        if self._is_open:
            return
        found = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        wanted = f"tags.`{self._TAG}` = '{self._run_id}'"
        earlier = mlflow.search_runs([found.experiment_id], wanted, max_results=1, output_format="list")
        if earlier:
            mlflow.start_run(earlier[0].info.run_id)
        else:
            mlflow.start_run(run_name=self._run_id[:8], tags={self._TAG: self._run_id})
            mlflow.log_params(dict(self._options))
        self._is_open = True

    def log(self, kind: str, line: Mapping[str, float]) -> None:
        import mlflow

        mlflow.log_metrics(_named(kind, line), step=int(line["step"]))

    def end(self, succeeded: bool) -> None:
        import mlflow

        if self._is_open:
            mlflow.end_run("FINISHED" if succeeded else "FAILED")


class WeightsAndBiases:
    """A run of WANDB_PROJECT, else `PROJECT`; WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, run_id: str, options: Mapping[str, Any]) -> None:
        self._run_id, self._options = run_id, options
        self._run: Any = None

    def begin(self, step: int) -> None:
        import wandb

        if self._run is None:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), id=self._run_id, resume="allow",
                config=dict(self._options), settings=wandb.Settings(silent=True),
            )
            # Steps that come again after a kill would be refused as wandb's own step, which only grows.
            self._run.define_metric("*", step_metric="step")

    def log(self, kind: str, line: Mapping[str, float]) -> None:
        self._run.log(_named(kind, line) | {"step": int(line["step"])})

    def end(self, succeeded: bool) -> None:
        if self._run is not None:
            self._run.finish(exit_code=0 if succeeded else 1)


def _named(kind: str, line: Mapping[str, float]) -> dict[str, float]:
    return {f"{kind}/{name}": value for name, value in line.items() if name != "step"}
