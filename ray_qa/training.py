"""Fine-tuning on Ray Train: workers that hold equal models walk through the prepared windows together.

The driver reads the input, has its windows prepared, starts the workers and publishes what rank 0 hands
over. A worker opens the shards memory-mapped, asks the sampler which windows make up global step t, and
computes its slice of them (`optimization`). Nothing here depends on the number of workers but the speed.

Knows nothing of CSV, tokens or gradients: those are `preparation`'s and `optimization`'s.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from ray_qa import cluster, mailbox, model_transfer, preflight, schema
from ray_qa.bad_rows import check_label_rows
from ray_qa.batches import TrainingSampler, collate, rank_slice
from ray_qa.csv_index import CSVIndex
from ray_qa.csv_parse import read_parts
from ray_qa.errors import OutputError, RayQAError, WorkError
from ray_qa.evaluation import score_rows
from ray_qa.metrics import Scores
from ray_qa.model_transfer import FinishedModel, SharedModel
from ray_qa.options import AnswerOptions, CheckpointOptions, QATrainArgs
from ray_qa.prediction import labelled_rows
from ray_qa.preparation import Prepared, keep_bad_rows, prepare
from ray_qa.process_group import NodeTorchConfig
from ray_qa.progress import Progress
from ray_qa.reading import index_input
from ray_qa.storage import Location, PathLike, cache_home, locate, usable_folder
from ray_qa.windows import WindowMaker, Windows

if TYPE_CHECKING:
    import torch

    from ray_qa.model import ModelSource, QAModel
    from ray_qa.optimization import Optimization, StepReport

logger = logging.getLogger("ray_qa")

RESULT = "result.json"
_RUN = "_run.json"
# Ranks wait for each other at every step: this long for the slowest one.
_COLLECTIVE_TIMEOUT_S = 600
# Rank 0 tells the driver how far it is about this often.
_TELL_S = 0.5
# Ray Train looks at its workers this often; its own default of 2 s delays the end of every short training.
_POLL_INTERVAL_S = "0.25"
# Threads that wait for one another spin, by default for so long that a core which anything else uses too makes every
# step several times as slow. Spinning shorter costs little on idle cores (docs/performance.md).
_CPU_WORKER_ENVIRONMENT = {"GOMP_SPINCOUNT": "3000"}


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a training did. Losses are means over windows (nats); seconds are wall-clock."""

    model_directory: str
    num_rows: int
    num_used_rows: int
    num_repaired_rows: int
    num_windows: int
    num_steps: int
    num_train_epochs: float
    train_loss: float
    """Mean over all steps, each before its update."""
    first_loss: float
    last_loss: float
    history: list[dict[str, float]]
    """One entry per ``logging_steps``: step, loss, learning_rate, gradient_norm, windows_per_second."""
    evaluations: list[dict[str, float]]
    """One entry per epoch where there were rows to evaluate on: step, loss, exact_match, f1, num_rows."""
    resumed_at_steps: list[int]
    """Where the run went on from a checkpoint."""
    label_counts: dict[str, int]
    """Rows per reason code of the label check."""
    num_workers: int
    device: str
    precision: str
    prepare_seconds: float
    train_seconds: float
    """Inside the workers, from the first step to the last."""
    seconds: float
    windows_per_second: float
    plan: str
    """Hash of input, model and options."""
    was_finished: bool = False
    """Nothing was done: an earlier run had finished in this folder."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def train(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | str, args: QATrainArgs | None = None,
    output: PathLike | None = None, scaling: ScalingConfig | None = None,
    eval_paths: PathLike | Sequence[PathLike] | None = None, storage_path: PathLike | None = None,
    trust_remote_code: bool = False, checkpoints: CheckpointOptions | None = None,
    storage_options: Mapping[str, object] | None = None, wait_seconds: float | None = None,
) -> TrainResult:
    """Fine-tune a model on labelled rows.

    Args:
        input_paths: CSV files with the columns context, question, answer_text, answer_start.
        model: where to start; a question-answering head that is missing is made.
        args: the options.
        output: the folder that becomes the tuned model; None keeps it under the cache home (see
            ``model_directory`` of the result), for the caller to delete.
        scaling: the workers; see `cluster.training_scaling`.
        eval_paths: labelled rows to evaluate the model on, after every epoch and at the end; in the precision
            of the training.
        storage_path: where prepared windows and checkpoints are kept, for all nodes to see; None is the cache
            home.
        checkpoints: when to save. With an ``output``, the same call goes on where a killed one was.
        storage_options: endpoint and credentials for URIs; see `storage.locate`.
        wait_seconds: how long to wait for workers, see `room.wait`.

    Raises:
        InputError, BadRowsError, OptionError, ModelError, OutputError: before workers are started.
        WorkError: the training failed; its message names step and rows where the loss was not a number.
    """
    args = QATrainArgs.of(args)
    target = locate(output, storage_options=storage_options) if output is not None else None
    with usable_folder(target):
        return _train_into(
            target, input_paths, model, args, scaling, eval_paths, storage_path, trust_remote_code, checkpoints,
            storage_options, wait_seconds,
        )


def _train_into(
    target: Location | None, input_paths: PathLike | Sequence[PathLike], model: ModelSource | str,
    args: QATrainArgs, scaling: ScalingConfig | None, eval_paths: PathLike | Sequence[PathLike] | None,
    storage_path: PathLike | None, trust_remote_code: bool, checkpoints: CheckpointOptions | None,
    storage_options: Mapping[str, object] | None, wait_seconds: float | None,
) -> TrainResult:
    from ray_qa.model import as_source, load_tokenizer

    started = time.monotonic()
    index = index_input(
        input_paths, required_columns=schema.TRAIN_COLUMNS, delimiter=args.delimiter, storage_options=storage_options,
        wait_seconds=wait_seconds,
    )
    eval_index = None
    if eval_paths is not None:
        eval_index = index_input(
            eval_paths, required_columns=schema.TRAIN_COLUMNS, delimiter=args.delimiter,
            storage_options=storage_options, wait_seconds=wait_seconds,
        )
    source = as_source(
        model, trust_remote_code=trust_remote_code, allow_untrained_head=True, storage_options=storage_options
    )
    eval_digest = None if eval_index is None else eval_index.digest
    plan_hash = _plan_hash([index.digest, eval_digest, source.digest], args)
    if target is not None:
        finished = _finished_in(target, plan_hash)
        if finished is not None:
            logger.info("%s: this training is finished; its result is returned", target.uri)
            return finished
    tokenizer, model_max_length = load_tokenizer(source.directory, trust_remote_code=trust_remote_code)
    maker = WindowMaker(
        tokenizer, max_seq_length=args.max_seq_length, doc_stride=args.doc_stride, pair_order=args.pair_order,
        model_max_length=model_max_length,
    )
    cluster.connect()
    scaling = cluster.training_scaling(scaling, wait_seconds=wait_seconds)
    device = "cuda" if scaling.use_gpu else "cpu"
    cluster.wait_for_a_node(wait_seconds)
    # The hardware decides what "auto" is, and GPUs may be still to come: none is asked for before the labels are good.
    there = device == "cpu" or cluster.num_gpus() > 0
    precision = cluster.resolve_precision(args.precision, device) if there else args.precision
    logger.info(
        "train: %d rows in %d parts; %s; precision %s; model %s",
        index.num_rows, index.num_parts, cluster.workers_of(scaling), precision, source.name,
    )
    home = locate(cache_home() if storage_path is None else storage_path, storage_options=storage_options)
    home.make_folder()
    indexes = [index] if eval_index is None else [index, eval_index]
    preflight.check_nodes(
        inputs=[file.location for each in indexes for file in each.files],
        outputs={"output": target, "storage_path (otherwise RAY_QA_HOME)": home},
    )
    if eval_index is not None:
        check_label_rows(eval_index, args.handle_impossible_answer, args.max_bad_rows)
    prepared = prepare(index, maker, args, home / "windows")
    cluster.wait_for_all(scaling, wait_seconds)
    precision = cluster.resolve_precision(precision, device)
    prepare_seconds = time.monotonic() - started

    if target is not None:
        (target / _RUN).publish(json.dumps({"plan": plan_hash}).encode())
        keep_bad_rows(prepared, index, maker, args, target)
    # Only a run with an output folder can be found again.
    run_name = uuid.uuid4().hex if target is None else _hash([plan_hash, prepared.key, target.full_name])
    folder = home / "checkpoints" / run_name
    try:
        done = train_windows(
            prepared, source, args, scaling=scaling, precision=precision, trust_remote_code=trust_remote_code,
            checkpoint_folder=folder, checkpoints=checkpoints, eval_index=eval_index, home=home,
        )
    except BaseException:
        if target is None:
            _delete_folder(folder)
        raise
    if target is None:
        target = locate(cache_home() / "trained" / run_name)
    model_transfer.take_over(done.model, target)
    result = TrainResult(
        model_directory=target.path if target.is_local else target.uri,
        num_rows=prepared.num_rows,
        num_used_rows=prepared.num_used_rows,
        num_repaired_rows=prepared.report.labels.num_repaired,
        num_windows=prepared.num_windows,
        num_steps=done.num_steps,
        num_train_epochs=done.num_steps / done.steps_per_epoch,
        train_loss=done.journal.loss_sum / done.num_steps,
        first_loss=done.journal.first_loss,
        last_loss=done.journal.last_loss,
        history=done.journal.lines,
        evaluations=done.journal.evaluations,
        resumed_at_steps=done.journal.resumed_at_steps,
        label_counts=dict(prepared.report.labels.counts),
        num_workers=done.num_workers,
        device=done.device,
        precision=done.precision,
        prepare_seconds=prepare_seconds,
        train_seconds=done.journal.seconds,
        seconds=time.monotonic() - started,
        windows_per_second=done.journal.num_windows / max(done.journal.seconds, 1e-9),
        plan=plan_hash,
    )
    (target / RESULT).publish(json.dumps(result.to_json(), indent=1).encode())
    (target / _RUN).delete()
    _delete_folder(folder)
    return result


def _delete_folder(folder: Location) -> None:
    if folder.exists():
        folder.filesystem.delete_dir(folder.path)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _plan_hash(digests: list[str | None], args: QATrainArgs) -> str:
    """Two runs with the same hash do the same work."""
    told = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("logging_steps",)}
    return _hash([digests, told])


def _finished_in(target: Location, plan_hash: str) -> TrainResult | None:
    """The result where the same run has finished in ``target``; None where this run may use the folder."""
    allowed = "allowed: an empty or new folder, or one that the same training has begun"
    names = {info.base_name for info in target.list()}
    if RESULT in names:
        found = json.loads((target / RESULT).read_bytes().to_pybytes())
        if found.get("plan") == plan_hash:
            return TrainResult(**{**found, "was_finished": True})
        raise OutputError(f"{target.uri}: holds the model of another training; {allowed}")
    if _RUN in names:
        found = json.loads((target / _RUN).read_bytes().to_pybytes())
        if found.get("plan") != plan_hash:
            raise OutputError(f"{target.uri}: another training has begun here; {allowed}")
    elif names:
        raise OutputError(f"{target.uri}: is not empty (found {', '.join(sorted(names)[:3])}); {allowed}")
    return None


# --- the workers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainedWindows:
    """What rank 0 gives back to the driver."""

    model: FinishedModel
    num_steps: int
    steps_per_epoch: int
    journal: Journal
    num_workers: int
    device: str
    precision: str


@dataclass(frozen=True)
class _WorkerPlan:
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
    checkpoints: CheckpointOptions
    eval_index: CSVIndex | None
    mailbox: Any = None
    """Takes a `_Step` now and then."""


@dataclass(frozen=True)
class _Step:
    """What rank 0 tells the driver while it trains."""

    num_done: int
    num_steps: int
    loss: float
    is_first: bool = False
    note: str = ""
    """A line of its own."""


class _Listener:
    """Shows in the driver how far the training is."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, step: _Step) -> None:
        if step.note:
            logger.info("%s", step.note)
            return
        if self._progress is None or step.is_first:
            self._progress = Progress("train", step.num_steps, step.num_done, unit="steps")
            return
        self._progress.note = f"loss {step.loss:.4f}"
        self._progress.add(step.num_done - self._progress.num_done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


def train_windows(
    prepared: Prepared, source: ModelSource, args: QATrainArgs, *, scaling: ScalingConfig, precision: str,
    dtype: str = "float32", trust_remote_code: bool = False, checkpoint_folder: Location | None = None,
    checkpoints: CheckpointOptions | None = None, eval_index: CSVIndex | None = None, home: Location | None = None,
) -> TrainedWindows:
    """Train on prepared windows; the model lies where `model_transfer.take_over` can fetch it.

    ``home`` is a folder that all nodes see, for Ray Train's own files; None is the cache home.

    ``dtype`` is that of the weights ("float64" shows that a result does not depend on the workers). Without a
    ``checkpoint_folder`` nothing is saved, and the death of a worker ends the training.
    """
    checkpoints = checkpoints or CheckpointOptions()
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_INTERVAL_S)
    plan = _WorkerPlan(
        model=model_transfer.share_directory(source.directory, source.digest), prepared=prepared, args=args,
        precision=precision, dtype=dtype, threads=cluster.workers_of(scaling).threads,
        driver_node_id=model_transfer.node_id(), trust_remote_code=trust_remote_code,
        checkpoint_folder=checkpoint_folder, checkpoints=checkpoints, eval_index=eval_index,
    )
    max_failures = checkpoints.max_failures if checkpoint_folder is not None else 0
    with contextlib.closing(_Listener()) as listener, mailbox.opened(listener) as told:
        return _fit(dataclasses.replace(plan, mailbox=told), scaling, max_failures, home or locate(cache_home()))


def _fit(plan: _WorkerPlan, scaling: ScalingConfig, max_failures: int, home: Location) -> TrainedWindows:
    storage = home / "runs"
    name = f"run-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        _work,  # type: ignore[arg-type]  # what rank 0 returns is Result.return_value
        train_loop_config={"plan": plan}, scaling_config=scaling,
        torch_config=NodeTorchConfig(
            backend="nccl" if scaling.use_gpu else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy sees the class of Train V1
            name=name, storage_path=storage.path, storage_filesystem=storage.filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
            worker_runtime_env={"env_vars": dict(_CPU_WORKER_ENVIRONMENT)} if not scaling.use_gpu else None,
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _own_error(error) from error
    finally:
        with contextlib.suppress(OSError):
            storage.filesystem.delete_dir((storage / name).path)
    done = result.return_value  # type: ignore[attr-defined]
    if isinstance(done, RayQAError):
        raise done
    if not isinstance(done, TrainedWindows):
        raise WorkError(f"training ended without a result: {result.error}")
    return done


def _own_error(error: ray.train.TrainingFailedError) -> RayQAError:
    """The ray_qa error that a worker raised, else what happened to the lowest rank."""
    failures = getattr(error, "worker_failures", None) or {}
    for _, failure in sorted(failures.items()):
        base = getattr(failure, "_base_exc", failure)
        if isinstance(base, RayQAError):
            return base
    for rank, failure in sorted(failures.items()):
        return WorkError(f"training failed on rank {rank}: {cluster.last_error(str(failure))}")
    return WorkError(f"training failed: {cluster.last_error(str(error))}")


def _work(config: dict[str, Any]) -> TrainedWindows | RayQAError | None:
    """One worker, from its model to its last step; rank 0 returns the result."""
    from ray_qa.optimization import DivergedError

    try:
        return _train(config["plan"])
    except DivergedError as error:
        # Every rank is here. An exception would have Ray Train start the workers again, to the same end.
        return error


def _train(plan: _WorkerPlan) -> TrainedWindows | None:
    import torch
    from ray.train.torch import get_device

    from ray_qa.checkpoints import CheckpointWriter
    from ray_qa.model import default_tokens_per_batch, load_model, save_model
    from ray_qa.optimization import Optimization, num_steps_of

    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(plan.threads)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    args = plan.args
    loaded = load_model(
        model_transfer.local_directory(plan.model), device=device, precision=plan.precision,
        for_training=True, trust_remote_code=plan.trust_remote_code,
    )
    loaded.model.to(getattr(torch, plan.dtype))
    windows = PreparedWindows(plan.prepared)
    sampler = TrainingSampler(windows.lengths, batch_size=args.batch_size, seed=args.seed)
    num_steps = num_steps_of(args, sampler.steps_per_epoch)
    optimization = Optimization(
        loaded.model, args, num_steps=num_steps, precision=plan.precision, make_inputs=loaded.inputs,
        tokens_per_batch=args.tokens_per_batch or default_tokens_per_batch(device, training=True),
    )
    template = plan.prepared.template
    multiple = 8 if device.type == "cuda" else 1
    journal = Journal(args.logging_steps)
    first_step = 0
    writer = None
    if plan.checkpoint_folder is not None:
        first_step = _restore(plan.checkpoint_folder, loaded.model, optimization, journal)
        if rank == 0:
            writer = CheckpointWriter(plan.checkpoint_folder, keep=plan.checkpoints.save_total_limit)
    saved_at = time.monotonic()
    evaluate = None
    if plan.eval_index is not None:
        evaluate = RankEvaluation(plan.eval_index, args, loaded, rank, world_size)

    def tell(step: _Step) -> None:
        if rank == 0:
            plan.mailbox.put.remote(step)

    if first_step:
        tell(_Step(first_step, num_steps, 0.0, note=f"train: going on at step {first_step:,}"))
    tell(_Step(first_step, num_steps, 0.0, is_first=True))
    told_at = -math.inf
    for step in range(first_step, num_steps):
        batch = sampler.batch(step)
        mine, rows = windows.select(rank_slice(batch, rank, world_size, windows.lengths))

        def make_batch(positions: np.ndarray, mine: Windows = mine) -> dict[str, np.ndarray]:
            return collate(
                mine, positions, template, template.pad_token_id, with_labels=True, pad_to_multiple=multiple
            )

        report = optimization.step(
            step, lengths=mine.lengths, rows=rows, make_batch=make_batch, num_windows=len(batch)
        )
        journal.add(report)
        done = step + 1
        if time.monotonic() - told_at >= _TELL_S or done == num_steps:
            tell(_Step(done, num_steps, report.loss))
            told_at = time.monotonic()
        if evaluate is not None and (done % sampler.steps_per_epoch == 0 or done == num_steps):
            tell(_Step(done, num_steps, report.loss, note=journal.evaluated(done, evaluate())))
        if writer is not None and done < num_steps:
            seconds = time.monotonic() - saved_at
            by_steps = plan.checkpoints.save_steps and done % plan.checkpoints.save_steps == 0
            by_time = plan.checkpoints.save_seconds and seconds >= plan.checkpoints.save_seconds
            if by_steps or by_time:
                groups = {"model": _weights(loaded.model), "optimizer": optimization.state()}
                writer.save(done, groups, {"journal": journal.to_json()})
                saved_at = time.monotonic()
    journal.finish()
    if rank != 0:
        return None
    if writer is not None:
        writer.close()
    directory = cache_home() / "runs" / f"model-{uuid.uuid4().hex}"
    directory.mkdir(parents=True)
    save_model(loaded.model, loaded.tokenizer, directory)
    return TrainedWindows(
        model=model_transfer.hand_over(directory, plan.driver_node_id), num_steps=num_steps,
        steps_per_epoch=sampler.steps_per_epoch, journal=journal, num_workers=world_size, device=device.type,
        precision=plan.precision,
    )


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


class RankEvaluation:
    """Evaluates the model in training, every rank its share of the parts; all ranks get all sums.

    The same engine and metrics as `evaluation.evaluate`, without a dataset: the GPUs that one would wait for are
    held by these very processes.
    """

    def __init__(
        self, index: CSVIndex, args: QATrainArgs, loaded: QAModel, rank: int, world_size: int
    ) -> None:
        from ray_qa.engine import Engine

        names = {field.name for field in dataclasses.fields(AnswerOptions)}
        told = {name: value for name, value in dataclasses.asdict(args).items() if name in names}
        self.engine = Engine(loaded, AnswerOptions(**told))
        self.index = index
        self.world_size = world_size
        self.parts = list(index.parts())[rank::world_size]

    def __call__(self) -> Scores:
        import torch.distributed as dist

        self.engine.qa_model.model.eval()
        mine: dict[int, Scores] = {}
        for file, parts in itertools.groupby(self.parts, key=lambda part: part.file):
            for part, table in read_parts(self.index.files[file], parts, schema.TRAIN_COLUMNS):
                mine[part.first_row] = self._score(table)
        gathered: list[dict[int, Scores]] = [mine]
        if self.world_size > 1:
            gathered = [{} for _ in range(self.world_size)]
            dist.all_gather_object(gathered, mine)
        everything = {first_row: scores for part in gathered for first_row, scores in part.items()}
        # In part order: the sums do not depend on the number of ranks.
        return sum((everything[first_row] for first_row in sorted(everything)), Scores())

    def _score(self, table: pa.Table) -> Scores:
        table = labelled_rows(table, self.engine.options.handle_impossible_answer)
        return score_rows(table, self.engine.answer(table, with_loss=True))


class Journal:
    """What rank 0 tells of a training: sums over all steps, and a line every few steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.lines: list[dict[str, float]] = []
        self.num_windows = 0
        self.loss_sum = self.first_loss = self.last_loss = 0.0
        self.seconds = 0.0
        self.evaluations: list[dict[str, float]] = []
        self.resumed_at_steps: list[int] = []
        self._num_steps = 0
        self._line_loss = 0.0
        self._line_steps = self._line_windows = 0
        self._line_seconds = 0.0
        self._now = time.monotonic()

    def add(self, report: StepReport) -> None:
        self._tick()
        if self._num_steps == 0:
            self.first_loss = report.loss
        self._num_steps += 1
        self.last_loss = report.loss
        self.loss_sum += report.loss
        self.num_windows += report.num_windows
        self._line_loss += report.loss
        self._line_steps += 1
        self._line_windows += report.num_windows
        if (report.step + 1) % self.every:
            return
        line = {
            "step": report.step + 1, "loss": self._line_loss / self._line_steps,
            "learning_rate": report.learning_rate, "gradient_norm": report.gradient_norm,
            "windows_per_second": self._line_windows / max(self._line_seconds, 1e-9),
        }
        self.lines.append(line)
        self._line_loss, self._line_steps, self._line_windows, self._line_seconds = 0.0, 0, 0, 0.0

    def finish(self) -> None:
        self._tick()

    def evaluated(self, step: int, scores: Scores) -> str:
        """An evaluation after ``step`` steps, as a line for people; its time is not the training's."""
        line = {
            "step": step, "loss": scores.loss, "exact_match": scores.exact_match, "f1": scores.f1,
            "num_rows": scores.num_rows,
        }
        self.evaluations.append(line)
        self._now = time.monotonic()
        return (
            f"train: after step {step:,}: loss {scores.loss:.4f}, exact match {scores.exact_match:.2f}, F1 "
            f"{scores.f1:.2f} on {scores.num_rows:,} rows"
        )

    def _tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._now
        self._line_seconds += now - self._now
        self._now = now

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("every", "_now")}

    def restore(self, value: Mapping[str, Any], step: int) -> None:
        """Go on with what an earlier attempt had told after ``step`` steps."""
        vars(self).update(value)
        self.resumed_at_steps = [*self.resumed_at_steps, step]
        self._now = time.monotonic()


class PreparedWindows:
    """All windows of a preparation, memory-mapped from this node's disk; opened shard by shard, when needed.

    ``lengths`` is int32[num_windows].
    """

    def __init__(self, prepared: Prepared) -> None:
        self._directory = stage(prepared)
        self._shards = [shard for shard in prepared.shards if shard.num_windows]
        self._first = np.cumsum([0, *(shard.num_windows for shard in self._shards)])
        self._open: dict[int, tuple[Windows, np.ndarray]] = {}
        lengths = [self._table(shard.name).column("length").to_numpy() for shard in self._shards]
        self.lengths = np.concatenate(lengths) if lengths else np.zeros(0, np.int32)

    def _table(self, name: str) -> Any:
        from datasets import Dataset

        return Dataset.from_file(str(self._directory / name)).data.table

    def _shard(self, number: int) -> tuple[Windows, np.ndarray]:
        if number not in self._open:
            table = self._table(self._shards[number].name)
            self._open[number] = (Windows.from_table(table), table.column(schema.ROW_INDEX).to_numpy())
        return self._open[number]

    def select(self, indices: np.ndarray) -> tuple[Windows, np.ndarray]:
        """The windows at ``indices`` in that order, and the row of the input that each comes from."""
        numbers = np.searchsorted(self._first, indices, side="right") - 1
        pieces, rows, places = [], [], []
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            windows, row_index = self._shard(number)
            local = indices[at] - self._first[number]
            pieces.append(windows.select(local))
            rows.append(row_index[local])
            places.append(at)
        if not pieces:
            return _NO_WINDOWS, np.zeros(0, np.int64)
        order = np.argsort(np.concatenate(places), kind="stable")
        return concatenate(pieces).select(order), np.concatenate(rows)[order]


def concatenate(pieces: Sequence[Windows]) -> Windows:
    """Labelled windows of several shards, one after the other."""
    if len(pieces) == 1:
        return pieces[0]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(piece, name) for piece in pieces])

    lengths = np.concatenate([np.diff(piece.splits) for piece in pieces])
    return Windows(
        row=joined("row"), input_ids=joined("input_ids"), splits=np.concatenate([[0], np.cumsum(lengths)]),
        question_length=joined("question_length"), context_length=joined("context_length"),
        context_offset=joined("context_offset"), start_position=joined("start_position"),
        end_position=joined("end_position"),
    )


_NONE = np.zeros(0, np.int32)
_NO_WINDOWS = Windows(
    row=_NONE, input_ids=_NONE, splits=np.zeros(1, np.int64), question_length=_NONE, context_length=_NONE,
    context_offset=_NONE, start_position=_NONE, end_position=_NONE,
)


def stage(prepared: Prepared) -> Path:
    """The shards as files on this node: where they lie if that is a disk, else a copy under the cache home.

    Several workers of a node may come at once: each shard is copied beside its place and renamed.

    Raises:
        WorkError: the node's disk has no room for them.
    """
    if prepared.folder.is_local:
        return Path(prepared.folder.path)
    directory = cache_home() / "staged" / prepared.key
    directory.mkdir(parents=True, exist_ok=True)
    present = {file.name: file.stat().st_size for file in directory.iterdir()}
    missing = [shard for shard in prepared.shards if present.get(shard.name) != shard.num_bytes]
    needed, free = sum(shard.num_bytes for shard in missing), shutil.disk_usage(directory).free
    if needed > free:
        raise WorkError(
            f"{directory}: the prepared windows need {needed:,} bytes on this node's disk, and {free:,} are "
            "free; make room, or let RAY_QA_HOME name a larger disk"
        )
    for shard in missing:
        staged = directory / f"_{shard.name}.{uuid.uuid4().hex}"
        pafs.copy_files(
            (prepared.folder / shard.name).path, str(staged),
            source_filesystem=prepared.folder.filesystem, destination_filesystem=pafs.LocalFileSystem(),
        )
        os.replace(staged, directory / shard.name)
    return directory
