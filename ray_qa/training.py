"""Fine-tuning on Ray Train, seen from the driver: windows prepared, workers started, the model published.

The driver reads the input, has its windows prepared, starts the workers (`training_worker`), shows and records what
they tell while they are at work, and publishes what rank 0 hands over, with its figures, curves and card beside it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import ray_qa
from ray_qa import cluster, folder_lock, mailbox, model_card, model_transfer, preflight, reporters, schema
from ray_qa.bad_rows import check_label_rows
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import OptionError, OutputError, RayQAError, WorkError
from ray_qa.folder_lock import FolderLock
from ray_qa.options import QATrainArgs, training_options
from ray_qa.preparation import Prepared, keep_bad_rows, prepare
from ray_qa.process_group import NodeTorchConfig
from ray_qa.progress import Progress
from ray_qa.rank_evaluation import EvalRows
from ray_qa.reading import index_input
from ray_qa.reporters import Reporters
from ray_qa.storage import Location, PathLike, cache_home, json_text, locate, prune_cache, usable_folder
from ray_qa.training_worker import Told, TrainedWindows, WorkerPlan, work
from ray_qa.windows import WindowMaker

if TYPE_CHECKING:
    from ray_qa.model import ModelSource

logger = logging.getLogger("ray_qa")

RESULT = "result.json"
_RUN = "_run.json"
# Ranks wait for each other at every step: this long for the slowest one.
_COLLECTIVE_TIMEOUT_S = 600
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
    num_held_out_rows: int
    """Usable rows that were evaluated on in place of being learned (``eval_ratio``)."""
    num_windows: int
    num_steps: int
    num_train_epochs: float
    stopped_early: bool
    model_step: int
    """Steps that the model has seen: fewer than ``num_steps`` where an earlier one was better and was asked for."""
    train_loss: float
    """Mean over all steps, each before its update."""
    first_loss: float
    last_loss: float
    history: list[dict[str, float]]
    """One entry per ``logging_steps``: step, loss, learning_rate, gradient_norm, windows_per_second, share_of_peak."""
    evaluations: list[dict[str, float]]
    """Where there were rows to evaluate on: step, loss, exact_match, f1, num_rows."""
    best: dict[str, float] | None
    """That of the evaluations which ``metric_for_best_model`` prefers."""
    resumed_at_steps: list[int]
    """Where the run went on from a checkpoint."""
    label_counts: dict[str, int]
    """Rows per reason code of the label check."""
    num_workers: int
    device: str
    precision: str
    prepare_seconds: float
    train_seconds: float
    """Inside the workers, from the first step to the last, evaluations left out."""
    saving_seconds: float
    """Of these, how long the loop stood still for checkpoints."""
    seconds: float
    windows_per_second: float
    share_of_peak: float
    """FLOPs of tokens without padding, forward and backward, a second, as a share of the workers' best matrix product
    (see `flops`)."""
    plan: str
    """Hash of input, model and options."""
    was_finished: bool = False
    """Nothing was done: an earlier run had finished in this folder."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What one call of `train` was asked for."""

    input_paths: PathLike | Sequence[PathLike]
    model: ModelSource | str
    args: QATrainArgs
    target: Location | None
    scaling: ScalingConfig | None
    eval_paths: PathLike | Sequence[PathLike] | None
    storage_path: PathLike | None
    trust_remote_code: bool
    dtype: str
    storage_options: Mapping[str, object] | None
    wait_seconds: float | None

    def index(self, paths: PathLike | Sequence[PathLike]) -> CSVIndex:
        return index_input(
            paths, required_columns=schema.TRAIN_COLUMNS, delimiter=self.args.delimiter,
            storage_options=self.storage_options, wait_seconds=self.wait_seconds,
        )


def train(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | str, args: QATrainArgs | None = None,
    output: PathLike | None = None, scaling: ScalingConfig | None = None,
    eval_paths: PathLike | Sequence[PathLike] | None = None, storage_path: PathLike | None = None,
    trust_remote_code: bool = False, dtype: str = "float32", storage_options: Mapping[str, object] | None = None,
    wait_seconds: float | None = None,
) -> TrainResult:
    """Fine-tune a model on labelled rows.

    Args:
        input_paths: CSV files with the columns context, question, answer_text, answer_start.
        model: where to start; a question-answering head that is missing is made.
        args: the options.
        output: the folder that becomes the tuned model, with result.json, README.md (the model's card), training.png
            and the event files of TensorBoard; the same call again goes on where a killed one was. None keeps the
            model under the cache home (see ``model_directory`` of the result), for the caller to delete.
        scaling: the workers; see `cluster.training_scaling`. ``num_workers`` may be a range: the training goes on
            with fewer workers when a node is lost, and with more when one comes.
        eval_paths: labelled rows to evaluate the model on while it trains and at the end; in the precision
            of the training.
        storage_path: where prepared windows and checkpoints are kept, for all nodes to see; None is the cache
            home.
        dtype: of the weights; "float64" shows that a result does not depend on the workers.
        storage_options: endpoint and credentials for URIs; see `storage.locate`.
        wait_seconds: how long to wait for workers, see `room.wait`.

    Raises:
        InputError, BadRowsError, OptionError, ModelError, OutputError: before workers are started.
        WorkError: the training failed; its message names step and rows where the loss was not a number.
    """
    args = QATrainArgs.of(args)
    _check_evaluation(args, eval_paths is not None)
    reporters.check_installed(args.report_to)
    target = locate(output, storage_options=storage_options) if output is not None else None
    call = _Call(
        input_paths=input_paths, model=model, args=args, target=target, scaling=scaling, eval_paths=eval_paths,
        storage_path=storage_path, trust_remote_code=trust_remote_code, dtype=dtype, storage_options=storage_options,
        wait_seconds=wait_seconds,
    )
    with usable_folder(target), contextlib.nullcontext() if target is None else FolderLock(target):
        return _train(call)


def _check_evaluation(args: QATrainArgs, has_eval_rows: bool) -> None:
    if has_eval_rows and args.eval_ratio is not None:
        raise OptionError(
            f"eval_ratio is {args.eval_ratio:g} and there are rows of their own to evaluate on; allowed: one of them"
        )
    if not has_eval_rows and args.eval_ratio is None:
        wanted = {
            "eval_steps": args.eval_steps, "metric_for_best_model": args.metric_for_best_model,
            "early_stopping_patience": args.early_stopping_patience,
            "load_best_model_at_end": args.load_best_model_at_end,
        }
        for name, value in wanted.items():
            if value:
                raise OptionError(
                    f"{name} is {value!r} and there are no rows to evaluate on; allowed: eval rows, or eval_ratio"
                )


def _train(call: _Call) -> TrainResult:
    from ray_qa.model import as_source, load_tokenizer

    started = time.monotonic()
    args, target = call.args, call.target
    index = call.index(call.input_paths)
    eval_index = None if call.eval_paths is None else call.index(call.eval_paths)
    source = as_source(
        call.model, trust_remote_code=call.trust_remote_code, allow_untrained_head=True,
        storage_options=call.storage_options,
    )
    eval_digest = None if eval_index is None else eval_index.digest
    plan_hash = _hash([[index.digest, eval_digest, source.digest], training_options(args), call.dtype])
    if target is not None:
        finished = _finished_in(target, plan_hash)
        if finished is not None:
            logger.info("%s: this training is finished; its result is returned", target.uri)
            return finished
    tokenizer, model_max_length = load_tokenizer(source.directory, trust_remote_code=call.trust_remote_code)
    maker = WindowMaker(
        tokenizer, max_seq_length=args.max_seq_length, doc_stride=args.doc_stride, pair_order=args.pair_order,
        model_max_length=model_max_length,
    )
    cluster.connect()
    scaling = cluster.training_scaling(call.scaling, wait_seconds=call.wait_seconds)
    device = "cuda" if scaling.use_gpu else "cpu"
    cluster.wait_for_a_node(call.wait_seconds)
    # The hardware decides what "auto" is, and GPUs may be still to come: none is asked for before the labels are good.
    there = device == "cpu" or cluster.num_gpus() > 0
    precision = cluster.resolve_precision(args.precision, device) if there else args.precision
    logger.info(
        "train: %d rows in %d parts; %s; precision %s; model %s",
        index.num_rows, index.num_parts, cluster.workers_of(scaling), precision, source.name,
    )
    prune_cache()
    home = locate(
        cache_home() if call.storage_path is None else call.storage_path, storage_options=call.storage_options
    )
    home.make_folder()
    indexes = [index] if eval_index is None else [index, eval_index]
    preflight.check_nodes(
        inputs=[file.location for each in indexes for file in each.files],
        outputs={"output": target, "storage_path (otherwise RAY_QA_HOME)": home},
    )
    if eval_index is not None:
        check_label_rows(eval_index, args.handle_impossible_answer, args.max_bad_rows)
    prepared = prepare(index, maker, args, home / "windows")
    cluster.wait_for_all(scaling, call.wait_seconds)
    precision = cluster.resolve_precision(precision, device)
    prepare_seconds = time.monotonic() - started

    if target is not None:
        (target / _RUN).publish(json.dumps({"plan": plan_hash}).encode())
        keep_bad_rows(prepared, index, maker, args, target)
    # Only a run with an output folder can be found again.
    run_name = uuid.uuid4().hex if target is None else _hash([plan_hash, prepared.key, target.full_name])
    folder = home / "checkpoints" / run_name
    eval_rows = None
    if eval_index is not None:
        eval_rows = EvalRows(eval_index)
    elif prepared.held_out_limit is not None:
        eval_rows = EvalRows(index, prepared.held_out_limit)
    try:
        with reporters.opened(args.report_to, target, run_name, training_options(args)) as told:
            done = train_windows(
                prepared, source, args, scaling=scaling, precision=precision, dtype=call.dtype,
                trust_remote_code=call.trust_remote_code, checkpoint_folder=folder, eval_rows=eval_rows, told=told,
                home=home,
            )
    except BaseException:
        if target is None:
            _delete_folder(folder)
        raise
    if target is None:
        target = locate(cache_home() / "trained" / run_name)
    model_transfer.take_over(done.model, target)
    journal = done.journal
    result = TrainResult(
        model_directory=target.path if target.is_local else target.uri,
        num_rows=prepared.num_rows,
        num_used_rows=prepared.num_used_rows,
        num_repaired_rows=prepared.report.labels.num_repaired,
        num_held_out_rows=prepared.num_held_out_rows,
        num_windows=prepared.num_windows,
        num_steps=done.num_steps,
        num_train_epochs=done.num_steps / done.steps_per_epoch,
        stopped_early=journal.should_stop,
        model_step=done.model_step,
        train_loss=journal.loss_sum / done.num_steps,
        first_loss=journal.first_loss,
        last_loss=journal.last_loss,
        history=journal.lines,
        evaluations=journal.evaluations,
        best=journal.best,
        resumed_at_steps=journal.resumed_at_steps,
        label_counts=dict(prepared.report.labels.counts),
        num_workers=done.num_workers,
        device=done.device,
        precision=done.precision,
        prepare_seconds=prepare_seconds,
        train_seconds=journal.seconds,
        saving_seconds=journal.saving_seconds,
        seconds=time.monotonic() - started,
        windows_per_second=journal.num_windows / max(journal.seconds, 1e-9),
        share_of_peak=journal.share_of_peak,
        plan=plan_hash,
    )
    _describe(result, args, source, index, eval_index, target)
    (target / RESULT).publish(json_text(result.to_json(), indent=1).encode())
    (target / _RUN).delete()
    _delete_folder(folder)
    return result


def _describe(
    result: TrainResult, args: QATrainArgs, source: ModelSource, index: CSVIndex, eval_index: CSVIndex | None,
    target: Location,
) -> None:
    """The model's card and the curves of its training, beside the model."""
    is_folder = "://" in source.name or os.path.isdir(os.path.expanduser(source.name))
    told = result.to_json()
    eval_data = "rows held out of the input" if args.eval_ratio is not None else None
    card = model_card.model_card(
        told, training_options(args), base_model=None if is_folder else source.name, data=_names_of(index),
        eval_data=eval_data if eval_index is None else _names_of(eval_index), version=ray_qa.__version__,
    )
    (target / model_card.CARD_NAME).publish(card.encode())
    (target / model_card.CURVES_NAME).publish(model_card.curves(result.history, result.evaluations))


def _names_of(index: CSVIndex) -> str:
    """The input's file names, without the folders, which are nobody else's business."""
    names = [file.location.name for file in index.files[:3]]
    more = len(index.files) - len(names)
    return ", ".join(names) + (f" and {more:,} more files" if more else "")


def _delete_folder(folder: Location) -> None:
    if folder.exists():
        folder.filesystem.delete_dir(folder.path)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _finished_in(target: Location, plan_hash: str) -> TrainResult | None:
    """The result where the same run has finished in ``target``; None where this run may use the folder."""
    allowed = "allowed: an empty or new folder, or one that the same training has begun"
    names = {info.base_name for info in target.list() if not info.base_name.startswith(folder_lock.PREFIX)}
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


class _Listener:
    """Shows in the driver how far the training is, and passes its history on."""

    def __init__(self, reporters: Reporters | None) -> None:
        self._progress: Progress | None = None
        self._reporters = reporters

    def __call__(self, told: Told) -> None:
        if self._reporters is not None:
            if told.is_first:
                self._reporters.begin(told.num_done)
            for kind, line in (("train", told.line), ("eval", told.evaluation)):
                if line is not None:
                    self._reporters.log(kind, line)
        if told.note:
            logger.info("%s", told.note)
            return
        if self._progress is None or told.is_first:
            self._progress = Progress("train", told.num_steps, told.num_done, unit="steps")
            return
        self._progress.note = f"loss {told.loss:.4f}"
        self._progress.add(told.num_done - self._progress.num_done)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.__exit__(None, None, None)


def train_windows(
    prepared: Prepared, source: ModelSource, args: QATrainArgs, *, scaling: ScalingConfig, precision: str,
    dtype: str = "float32", trust_remote_code: bool = False, checkpoint_folder: Location | None = None,
    eval_rows: EvalRows | None = None, told: Reporters | None = None, home: Location | None = None,
) -> TrainedWindows:
    """Train on prepared windows; the model lies where `model_transfer.take_over` can fetch it.

    Without a ``checkpoint_folder`` nothing is saved, the best model included, and the death of a worker ends the
    training. ``told`` gets the history as it grows. ``home`` is a folder that all nodes see, for Ray Train's own files;
    None is the cache home.
    """
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", _POLL_INTERVAL_S)
    plan = WorkerPlan(
        model=model_transfer.share_directory(source.directory, source.digest), prepared=prepared, args=args,
        precision=precision, dtype=dtype, threads=cluster.workers_of(scaling).threads,
        driver_node_id=model_transfer.node_id(), trust_remote_code=trust_remote_code,
        checkpoint_folder=checkpoint_folder, eval_rows=eval_rows,
    )
    max_failures = args.max_failures if checkpoint_folder is not None else 0
    with contextlib.closing(_Listener(told)) as listener, mailbox.opened(listener) as box:
        return _fit(dataclasses.replace(plan, mailbox=box), scaling, max_failures, home or locate(cache_home()))


def _fit(plan: WorkerPlan, scaling: ScalingConfig, max_failures: int, home: Location) -> TrainedWindows:
    storage = home / "runs"
    name = f"run-{uuid.uuid4().hex}"
    trainer = TorchTrainer(
        work,  # type: ignore[arg-type]  # what rank 0 returns is Result.return_value
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
