"""What is told of a training: sums over all steps, a line every few steps, evaluations, and which of them was best.

Knows nothing of models, files, or where it is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ray_qa.options import QATrainArgs

if TYPE_CHECKING:
    from ray_qa.optimization import StepReport

Line = dict[str, float]
_NOT_KEPT = ("args", "peak_flops", "_now")


class Journal:
    """The same on every rank, but for what is measured in seconds.

    Args:
        peak_flops: the best rate of all ranks together, FLOP/s; 0 where it is not known.
    """

    def __init__(self, args: QATrainArgs, *, peak_flops: float = 0.0) -> None:
        self.args = args
        self.peak_flops = peak_flops
        self.lines: list[Line] = []
        self.evaluations: list[Line] = []
        self.num_windows = 0
        self.num_steps = 0
        self.loss_sum = self.first_loss = self.last_loss = 0.0
        self.seconds = self.saving_seconds = 0.0
        self.flops = 0.0
        self.resumed_at_steps: list[int] = []
        self.best: Line | None = None
        self.num_evaluations_without_gain = 0
        self._line_loss = self._line_seconds = self._line_flops = 0.0
        self._line_steps = self._line_windows = 0
        self._now = time.monotonic()

    def add(self, report: StepReport, flops: float = 0.0) -> Line | None:
        """One step; gives the line that it completes. ``flops`` are the step's, over all ranks and without padding."""
        self._tick()
        if self.num_steps == 0:
            self.first_loss = report.loss
        self.num_steps += 1
        self.last_loss = report.loss
        self.loss_sum += report.loss
        self.num_windows += report.num_windows
        self.flops += flops
        self._line_loss += report.loss
        self._line_steps += 1
        self._line_windows += report.num_windows
        self._line_flops += flops
        if (report.step + 1) % self.args.logging_steps:
            return None
        seconds = max(self._line_seconds, 1e-9)
        line = {
            "step": report.step + 1, "loss": self._line_loss / self._line_steps,
            "learning_rate": report.learning_rate, "gradient_norm": report.gradient_norm,
            "windows_per_second": self._line_windows / seconds, "share_of_peak": self._share(self._line_flops, seconds),
        }
        self.lines.append(line)
        self._line_loss, self._line_steps, self._line_windows = 0.0, 0, 0
        self._line_seconds = self._line_flops = 0.0
        return line

    def evaluated(self, step: int, figures: Mapping[str, float]) -> Line:
        """An evaluation after ``step`` steps (loss, exact_match, f1, num_rows); its time is not the training's."""
        line = {"step": step, **figures}
        self.evaluations.append(line)
        metric = self.args.metric_for_best_model or "loss"
        value, best = figures[metric], math.nan if self.best is None else self.best[metric]
        gain = best - value if metric == "loss" else value - best
        is_first = math.isnan(best)
        # As transformers' Trainer and its EarlyStoppingCallback: any gain makes a new best, only one above the
        # threshold is worth going on for.
        self.num_evaluations_without_gain += 1
        if is_first or gain > self.args.early_stopping_threshold:
            self.num_evaluations_without_gain = 0
        if is_first or gain > 0:
            self.best = line
        self._now = time.monotonic()
        return line

    @property
    def should_stop(self) -> bool:
        """Whether the last evaluations were in vain for long enough."""
        patience = self.args.early_stopping_patience
        return patience is not None and self.num_evaluations_without_gain >= patience

    def saved(self, seconds: float) -> None:
        """The loop stood still for so long to have a checkpoint written."""
        self.saving_seconds += seconds

    def finish(self) -> None:
        self._tick()

    @property
    def share_of_peak(self) -> float:
        """FLOPs of tokens without padding, forward and backward, as a share of what the ranks could multiply."""
        return self._share(self.flops, self.seconds)

    def _share(self, flops: float, seconds: float) -> float:
        return flops / (self.peak_flops * seconds) if self.peak_flops and seconds else 0.0

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._now
        self._line_seconds += now - self._now
        self._now = now

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _NOT_KEPT}

    def restore(self, value: Mapping[str, Any], step: int) -> None:
        """Go on with what an earlier attempt had told after ``step`` steps."""
        vars(self).update(value)
        self.resumed_at_steps = [*self.resumed_at_steps, step]
        self._now = time.monotonic()
