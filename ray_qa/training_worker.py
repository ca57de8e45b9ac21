"""One worker of a training, from its model to its last step.

A worker opens the shards memory-mapped, asks the sampler which windows make up global step t, and computes its slice
of them (`optimization`). Between steps it evaluates, saves and tells the driver, as the options say. Nothing here
depends on the number of workers but the speed.

Knows nothing of CSV, tokens or gradients: those are `preparation`'s and `optimization`'s; nor of what becomes of the
model in the driver.
"""

from __future__ import annotations

import math
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train

from ray_qa import model_transfer
from ray_qa.batches import TrainingSampler, collate, rank_slice
from ray_qa.errors import RayQAError, UserError, WorkError
from ray_qa.journal import Journal, Line
from ray_qa.model_transfer import FinishedModel, SharedModel
from ray_qa.options import QATrainArgs
from ray_qa.preparation import Prepared
from ray_qa.prepared_windows import PreparedWindows
from ray_qa.rank_evaluation import EvalRows, RankEvaluation
from ray_qa.storage import Location, cache_home
from ray_qa.windows import Windows

if TYPE_CHECKING:
    import torch

    from ray_qa.checkpoints import CheckpointWriter
    from ray_qa.optimization import Optimization

# Rank 0 tells the driver how far it is about this often.
_TELL_S = 0.5


@dataclass(frozen=True)
class WorkerPlan:
    """What every worker is told; model files and windows travel by themselves."""

    model: SharedModel
    prepared: Prepared
    args: QATrainArgs
    precision: str
    dtype: str
    threads: int
    driver_node_id: str
    trust_remote_code: bool
    checkpoint_folder: Location | None
    eval_rows: EvalRows | None
    mailbox: Any = None
    """Takes a `Told` now and then."""


@dataclass(frozen=True)
class Told:
    """What rank 0 tells the driver while it trains."""

    num_done: int
    num_steps: int
    loss: float
    is_first: bool = False
    """The workers (re)start here."""
    line: Line | None = None
    """A new entry of the history."""
    evaluation: Line | None = None
    note: str = ""
    """A line of its own, for people."""


@dataclass(frozen=True)
class TrainedWindows:
    """What rank 0 gives back to the driver."""

    model: FinishedModel
    num_steps: int
    """Steps done: fewer than planned where the training stopped early."""
    steps_per_epoch: int
    model_step: int
    """Steps that the model has seen: fewer than ``num_steps`` where an earlier one was better."""
    journal: Journal
    num_workers: int
    device: str
    precision: str


def work(config: dict[str, Any]) -> TrainedWindows | RayQAError | None:
    """What Ray Train runs on every worker; rank 0 returns the result."""
    from ray_qa.optimization import DivergedError

    try:
        return _Worker(config["plan"]).train()
    except (DivergedError, UserError) as error:
        # Every rank is here. An exception would have Ray Train start the workers again, to the same end.
        return error


class _Worker:
    def __init__(self, plan: WorkerPlan) -> None:
        import torch
        from ray.train.torch import get_device

        from ray_qa.checkpoints import CheckpointWriter
        from ray_qa.flops import WindowFlops
        from ray_qa.model import default_tokens_per_batch, load_model
        from ray_qa.optimization import Optimization, num_steps_of

        self.plan = plan
        self.args = args = plan.args
        self.device = get_device()
        if self.device.type == "cpu":
            torch.set_num_threads(plan.threads)
        context = ray.train.get_context()
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.loaded = load_model(
            model_transfer.local_directory(plan.model), device=self.device, precision=plan.precision,
            for_training=True, trust_remote_code=plan.trust_remote_code,
        )
        self.model: torch.nn.Module = self.loaded.model
        self.model.to(getattr(torch, plan.dtype))
        self.windows = PreparedWindows(plan.prepared)
        self.sampler = TrainingSampler(self.windows.lengths, batch_size=args.batch_size, seed=args.seed)
        self.num_steps = num_steps_of(args, self.sampler.steps_per_epoch)
        tokens_per_batch = args.tokens_per_batch or default_tokens_per_batch(
            self.device, training=True, num_parameters=self.loaded.model.num_parameters(only_trainable=True)
        )
        self.optimization = Optimization(
            self.model, args, num_steps=self.num_steps, precision=plan.precision, make_inputs=self.loaded.inputs,
            tokens_per_batch=tokens_per_batch,
        )
        self.flops_of = WindowFlops(self.model)
        self.journal = Journal(args, peak_flops=self._peak_flops())
        self.first_step = 0
        self.writer: CheckpointWriter | None = None
        if plan.checkpoint_folder is not None:
            self.first_step = _restore(plan.checkpoint_folder, self.model, self.optimization, self.journal)
            if self.rank == 0:
                self.writer = CheckpointWriter(plan.checkpoint_folder, keep=args.save_total_limit)
        self.saved_at = self.told_at = -math.inf
        self.evaluate = None
        if plan.eval_rows is not None:
            self.evaluate = RankEvaluation(plan.eval_rows, args, self.loaded, self.rank, self.world_size)

    def train(self) -> TrainedWindows | None:
        done = self.first_step
        if done:
            self._tell(Told(done, self.num_steps, 0.0, note=f"train: going on at step {done:,}"))
        self._tell(Told(done, self.num_steps, 0.0, is_first=True))
        self.saved_at = time.monotonic()
        # What was decided at the checkpoint's own step is decided again.
        while done < self.num_steps and not self.journal.should_stop:
            loss = self._step(done)
            done += 1
            is_best = self._evaluate(done, loss)
            if self.writer is not None and done < self.num_steps:
                self._save(done, is_best)
        self.journal.finish()
        return self._finish(done) if self.rank == 0 else None

    def _step(self, step: int) -> float:
        batch = self.sampler.batch(step)
        lengths = self.windows.lengths
        mine, rows = self.windows.select(rank_slice(batch, self.rank, self.world_size, lengths))
        template = self.plan.prepared.template
        multiple = 8 if self.device.type == "cuda" else 1

        def make_batch(positions: np.ndarray, mine: Windows = mine) -> dict[str, np.ndarray]:
            return collate(
                mine, positions, template, template.pad_token_id, with_labels=True, pad_to_multiple=multiple
            )

        report = self.optimization.step(
            step, lengths=mine.lengths, rows=rows, make_batch=make_batch, num_windows=len(batch)
        )
        line = self.journal.add(report, self.flops_of(lengths[batch]))
        done = step + 1
        if line is not None or time.monotonic() - self.told_at >= _TELL_S or done == self.num_steps:
            self._tell(Told(done, self.num_steps, report.loss, line=line))
            self.told_at = time.monotonic()
        return report.loss

    def _evaluate(self, done: int, loss: float) -> bool:
        """Evaluate where it is time to; gives whether this is the best model so far, and worth keeping."""
        if self.evaluate is None or not self.args.evaluates_after(done, self.num_steps, self.sampler.steps_per_epoch):
            return False
        line = self.journal.evaluated(done, self.evaluate())
        note = (
            f"train: after step {done:,}: loss {line['loss']:.4f}, exact match {line['exact_match']:.2f}, F1 "
            f"{line['f1']:.2f} on {line['num_rows']:,} rows"
        )
        self._tell(Told(done, self.num_steps, loss, evaluation=line, note=note))
        if self.journal.should_stop:
            self._tell(Told(done, self.num_steps, loss, note="train: stopping early"))
        return self.args.keeps_best and self.journal.best is line

    def _save(self, done: int, is_best: bool) -> None:
        assert self.writer is not None
        begin = time.monotonic()
        by_steps = self.args.save_steps and done % self.args.save_steps == 0
        by_time = self.args.save_seconds and begin - self.saved_at >= self.args.save_seconds
        if not (by_steps or by_time or is_best):
            return
        best = self.journal.best if self.args.keeps_best else None
        self.writer.save(
            done, {"model": _weights(self.model), "optimizer": self.optimization.state()},
            {"journal": self.journal.to_json()}, keep_step=None if best is None else int(best["step"]),
        )
        self.saved_at = time.monotonic()
        self.journal.saved(self.saved_at - begin)

    def _finish(self, done: int) -> TrainedWindows:
        from ray_qa.model import save_model

        if self.writer is not None:
            self.writer.close()
        model_step = done
        best = self.journal.best if self.args.keeps_best else None
        if best is not None and int(best["step"]) != done:
            model_step = int(best["step"])
            self._load_best(model_step)
        directory = cache_home() / "runs" / f"model-{uuid.uuid4().hex}"
        directory.mkdir(parents=True)
        save_model(self.loaded.model, self.loaded.tokenizer, directory)
        return TrainedWindows(
            model=model_transfer.hand_over(directory, self.plan.driver_node_id), num_steps=done,
            steps_per_epoch=self.sampler.steps_per_epoch, model_step=model_step, journal=self.journal,
            num_workers=self.world_size, device=self.device.type, precision=self.plan.precision,
        )

    def _load_best(self, step: int) -> None:
        from ray_qa.checkpoints import find_checkpoints

        folder = self.plan.checkpoint_folder
        found = [] if folder is None else [one for one in find_checkpoints(folder) if one.step == step]
        if not found:
            where = "nowhere" if folder is None else f"not in {folder.uri}"
            raise WorkError(f"the best model, of step {step}, was kept {where}")
        self.model.load_state_dict(found[0].read("model"), strict=False)

    def _peak_flops(self) -> float:
        """Of all ranks together; measured at once, because they share memory and power."""
        import torch
        import torch.distributed as dist

        from ray_qa.flops import peak_flops

        total = torch.tensor(peak_flops(self.device), dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(total)
        return float(total)

    def _tell(self, told: Told) -> None:
        if self.rank == 0:
            self.plan.mailbox.put.remote(told)


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor of the model once: tied weights under one of their names."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors


def _restore(folder: Location, model: torch.nn.Module, optimization: Optimization, journal: Journal) -> int:
    """Go back to the newest checkpoint, all ranks to the same one; gives the number of steps done."""
    import torch.distributed as dist

    from ray_qa.checkpoints import find_checkpoints

    found = {checkpoint.step: checkpoint for checkpoint in find_checkpoints(folder)}
    step = [max(found, default=0)]
    if optimization.world_size > 1:
        # A checkpoint may become complete while the ranks look: rank 0's view counts.
        dist.broadcast_object_list(step)
    if step[0] == 0:
        return 0
    if step[0] not in found:
        raise WorkError(f"{folder.uri}: rank {optimization.rank} does not see the checkpoint of step {step[0]}")
    checkpoint = found[step[0]]
    model.load_state_dict(checkpoint.read("model"), strict=False)
    optimization.load_state(checkpoint.read("optimizer"))
    journal.restore(checkpoint.position["journal"], step[0])
    return step[0]
