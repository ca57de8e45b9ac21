"""Parts through Ray Data: read, tokenized, answered by a pool of workers, published, counted.

On CPUs one worker does all of it for a part. With GPUs (and for compressed files, which only one task can read) CPU
tasks read and tokenize parts, and hand rows and windows to the workers as one cell each. Either way a worker
publishes its part itself and returns counts: no text and no logits pass through the driver.

The worker is a shell around `engine.Engine`; what a run needs is one small `Job`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.train import ScalingConfig

import ray_qa
from ray_qa import attempts, calibration, cluster, model_transfer, preflight, reading, results, schema
from ray_qa.cluster import Workers
from ray_qa.csv_file import Part
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import Interrupted, OptionError, UserError, WorkError
from ray_qa.folder_lock import FolderLock
from ray_qa.labels import check_labels
from ray_qa.model_transfer import SharedModel
from ray_qa.options import AnswerOptions, QATestArgs, allowance, answer_options
from ray_qa.progress import Progress
from ray_qa.results import PartFile, ResultFolder
from ray_qa.storage import Location, PathLike, locate, usable_folder

if TYPE_CHECKING:  # torch and transformers are slow to import; a cluster's driver may do without
    from ray_qa.engine import Engine, EngineOutput
    from ray_qa.model import ModelSource
    from ray_qa.windows import WindowMaker, Windows

logger = logging.getLogger("ray_qa")

#: Up to so many parts for each worker, none of them waits at a worker: the end would take longer than the gaps.
_FEW_PARTS = 16
#: CPUs of a task that reads and tokenizes beside the workers.
_FEEDER_CPUS = 0.5
#: Parts that a worker is given at a time, at most: where they are quick, Ray Data's time for each task counts.
_PARTS_OF_RUN = 32
#: But a worker gets as many tasks as this, so that all end at about the same time.
_RUNS_OF_WORKER = 16
#: Options that change how fast a run is, or what is said about it, and never an answer.
_OPTIONS_WITHOUT_EFFECT = {"precision", "tokens_per_batch", "max_error_rows", "max_bad_rows"}

#: Names that input columns cannot have when they are carried along.
RESERVED_COLUMNS = (*schema.RANKED_PREDICTIONS.names, schema.PROBABILITY.name, schema.ABSTAIN.name)

Reducer = Callable[[Part, pa.Table, "EngineOutput"], Any]


@dataclass(frozen=True)
class Job:
    """What every worker of one run must know. Small; the rest is behind references."""

    index: ray.ObjectRef[CSVIndex]
    model: SharedModel
    options: AnswerOptions
    precision: str
    device: str
    threads: int
    top_k: int = 1
    trust_remote_code: bool = False
    allow_untrained_head: bool = False
    folder: ResultFolder | None = None
    """Where workers publish their parts; None returns the answers to the driver."""
    reducer: Reducer | None = None
    """For evaluation: what a part's labelled rows and the engine's output come down to; rows whose labels
    cannot be used are left out, and nothing is published but by the reducer itself."""
    extra_columns: tuple[str, ...] = ()
    """Columns that are read beside the usual ones; a run without a reducer publishes them with the answers."""
    probabilities: calibration.Probabilities | None = None
    """For prediction with a calibrated model: what its scores mean."""
    ledger: Any = None
    """Where workers that died count their attempts; see `attempts`."""
    make_engine: Callable[[Job], Engine] | None = None
    """What answers, in place of the model's engine: for measuring the pipeline without a model."""

    @property
    def columns(self) -> tuple[str, ...]:
        usual = schema.TEST_COLUMNS if self.reducer is None else schema.TRAIN_COLUMNS
        return tuple(dict.fromkeys(usual + self.extra_columns))


@dataclass(frozen=True)
class PartReport:
    """What a worker says of one finished part."""

    first_row: int
    num_rows: int
    num_errors: int
    num_windows: int
    started: float
    finished: float
    """Seconds since the epoch on the worker's clock."""
    worker: str
    """Node and process."""
    file: PartFile | None = None
    answers: pa.Table | None = None
    reduced: Any = None


@dataclass
class RunStatistics:
    """Counts over the parts that a run computed (not those it found already done)."""

    num_rows: int = 0
    num_errors: int = 0
    num_windows: int = 0
    parts_of_worker: dict[str, int] = field(default_factory=dict)
    _started: float = float("inf")
    _finished: float = 0.0

    def add(self, report: PartReport) -> None:
        self.num_rows += report.num_rows
        self.num_errors += report.num_errors
        self.num_windows += report.num_windows
        self.parts_of_worker[report.worker] = self.parts_of_worker.get(report.worker, 0) + 1
        self._started = min(self._started, report.started)
        self._finished = max(self._finished, report.finished)

    @property
    def seconds(self) -> float:
        """From the first part's beginning to the last part's end: without start-up."""
        return max(0.0, self._finished - self._started)

    @property
    def rows_per_second(self) -> float:
        return self.num_rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Prediction:
    """A finished prediction run.

    ``answers`` holds one result per row in CSV order, with ``top_k > 1`` a list of results per row: a list, or a lazy
    sequence over the files in ``output_path``. ``statistics`` count this run's own work, ``num_resumed_rows`` were
    found done.
    """

    answers: Sequence[results.RowAnswers]
    num_rows: int
    num_errors: int
    num_parts: int
    num_resumed_rows: int
    too_many_errors: bool
    precision: str
    workers: Workers
    statistics: RunStatistics
    output_path: str | None
    probabilities: calibration.Probabilities | None = None
    """What the columns ``probability`` and ``abstain`` in ``output_path`` were computed with; None without them."""


def predict(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | PathLike,
    args: QATestArgs | Mapping[str, Any] | None = None, output_path: PathLike | None = None,
    scaling: ScalingConfig | None = None, overwrite: bool = False, trust_remote_code: bool = False,
    allow_untrained_head: bool = False, storage_options: Mapping[str, object] | None = None,
    keep_columns: Sequence[str] = (), single_file: PathLike | None = None, wait_seconds: float | None = None,
) -> Prediction:
    """Answer every row of CSV files with the columns context and question.

    Args:
        input_paths: a file, a folder, a glob, or a list of these; local or a URI.
        model: a folder (a path or a URI), a name on the hub, or what `model.resolve_model` found.
        output_path: a folder for Parquet parts in CSV order; None collects a list in the driver. The same call
            on an unfinished folder computes only what is missing.
        overwrite: throw away another run's output in that folder.
        keep_columns: columns of the input that the Parquet files carry along, as strings.
        single_file: a Parquet file, outside of that folder, that becomes all parts in order.
        wait_seconds: how long to wait for workers, see `room.wait`.

    With a calibrated model (a calibration.json in its folder, see `evaluation.evaluate`) the files in ``output_path``
    have the column ``probability``, and with ``min_probability`` or ``target_precision`` also ``abstain``. A
    calibration of another model or of other options is not used: with one of the two an OptionError, else a warning.

    Raises:
        OptionError, InputError, CSVError, OutputError, ModelError: before any work is done. OutputError too where
            another job is at work in the folder.
        WorkError: the work failed; a folder keeps what was finished.
        Interrupted: on KeyboardInterrupt, saying how far it got.
    """
    from ray_qa.engine import checked_window_maker
    from ray_qa.model import as_source, load_tokenizer

    args = QATestArgs.of(args)
    if output_path is None and (keep_columns or single_file is not None):
        raise OptionError("keep_columns and single_file say what to write; allowed only with an output folder")
    model = as_source(
        model, trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head,
        storage_options=storage_options,
    )
    tokenizer, longest = load_tokenizer(model.directory, trust_remote_code=trust_remote_code)
    checked_window_maker(tokenizer, args, model_max_length=longest)
    index = reading.index_input(
        input_paths, required_columns=schema.TEST_COLUMNS, delimiter=args.delimiter, storage_options=storage_options,
        wait_seconds=wait_seconds,
    )
    keep = _checked_columns(index, keep_columns)
    cluster.connect()
    workers = cluster.prediction_workers(scaling, at_most=max(1, index.num_parts), wait_seconds=wait_seconds)
    cluster.wait_for_one(workers, wait_seconds)
    precision = cluster.resolve_precision(args.precision, workers.device)
    probabilities = probabilities_of(model, args, precision, to_files=output_path is not None)
    plan = _plan(index, model, args, precision, keep, probabilities)
    job = Job(
        index=ray.put(index), model=model_transfer.share_directory(model.directory, model.digest), options=args,
        precision=precision, device=workers.device, threads=workers.threads, top_k=args.top_k, extra_columns=keep,
        probabilities=probabilities,
        trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head,
    )
    inputs = [file.location for file in index.files]
    if output_path is None:
        preflight.check_nodes(inputs=inputs)
        reading.check_records(index, schema.TEST_COLUMNS)
        _log_choices(index, 0, workers, precision, model.name)
        return _collect(job, index, workers, args.max_error_rows)
    location = locate(output_path, storage_options=storage_options)
    if single_file is not None:
        results.check_single_file(
            single_file, location, results.plan_hash(plan), overwrite=overwrite, storage_options=storage_options
        )
    with usable_folder(location), FolderLock(location) as lock:
        preflight.check_nodes(inputs=inputs, outputs={"output": location})
        reading.check_records(index, schema.TEST_COLUMNS)
        done = write_parts(
            job, index, workers, location, plan, lock=lock, overwrite=overwrite, max_error_rows=args.max_error_rows,
            model_name=model.name,
        )
    if single_file is not None:
        assert isinstance(done.answers, results.Answers)
        done.answers.write_parquet(single_file, overwrite=overwrite, storage_options=storage_options)
    return done


def _checked_columns(index: CSVIndex, names: Sequence[str]) -> tuple[str, ...]:
    """``names``, each once. Raises OptionError where a file lacks one, or the answers have a column of that name."""
    for name in names:
        if name in RESERVED_COLUMNS:
            raise OptionError(
                f"keep_columns names {name!r}, which is a column of the answers; allowed: any but "
                f"{', '.join(RESERVED_COLUMNS)}"
            )
        for file in index.files:
            if name not in file.columns:
                raise OptionError(
                    f"keep_columns names {name!r}, which {file.location.uri} lacks; allowed: {', '.join(file.columns)}"
                )
    return tuple(dict.fromkeys(names))


def _log_choices(index: CSVIndex, num_done: int, workers: Workers, precision: str, model: str) -> None:
    logger.info(
        "test: %d rows in %d parts%s; %s; precision %s; model %s", index.num_rows, index.num_parts,
        f" ({num_done} done already)" if num_done else "", workers, precision, model,
    )


def _collect(job: Job, index: CSVIndex, workers: Workers, max_error_rows: float) -> Prediction:
    """All answers as a list in the driver."""
    statistics = RunStatistics()
    tables: dict[int, pa.Table] = {}
    with Progress("test", index.num_rows) as progress:
        for report in run_parts(job, index, range(index.num_parts), workers):
            statistics.add(report)
            progress.add(report.num_rows, report.num_errors)
            assert report.answers is not None
            tables[report.first_row] = report.answers
    answers = [answer for first_row in sorted(tables) for answer in results.to_results(tables[first_row])]
    if len(answers) != index.num_rows:
        raise WorkError(f"{len(answers)} answers came back for {index.num_rows} rows")
    return Prediction(
        answers=answers, num_rows=index.num_rows, num_errors=statistics.num_errors, num_parts=index.num_parts,
        num_resumed_rows=0, too_many_errors=statistics.num_errors > allowance(max_error_rows, index.num_rows),
        precision=job.precision, workers=workers, statistics=statistics, output_path=None,
    )


def write_parts(
    job: Job, index: CSVIndex, workers: Workers, location: Location, plan: Mapping[str, Any], *, lock: FolderLock,
    overwrite: bool = False, max_error_rows: float = 0, model_name: str = "",
) -> Prediction:
    """The parts that are missing in a folder, and its manifest. ``lock`` is that folder's, and held.

    Raises:
        OutputError: see `results.begin`.
        WorkError: the work failed; the folder keeps what was finished.
        Interrupted: on KeyboardInterrupt, likewise.
    """
    folder = results.begin(location, plan, overwrite=overwrite)
    done = folder.published()
    missing = [i for i, part in enumerate(index.parts()) if part.first_row not in done]
    _log_choices(index, len(done), workers, job.precision, model_name)
    statistics = RunStatistics()
    files = dict(done)
    num_done = sum(part.num_rows for part in done.values())
    progress = Progress("test", index.num_rows, num_done, sum(part.num_errors for part in done.values()))
    try:
        with progress:
            for report in run_parts(dataclasses.replace(job, folder=folder), index, missing, workers):
                assert report.file is not None
                statistics.add(report)
                files[report.first_row] = report.file
                progress.add(report.num_rows, report.num_errors)
                lock.check()
        num_errors = folder.finish(plan, files.values(), index.num_rows, checked=done)["num_errors"]
    except KeyboardInterrupt as stop:
        # More parts may be there than reports came back.
        there = folder.part_names()
        num_done = sum(part.num_rows for part in index.parts() if results.part_name(part.first_row) in there)
        raise Interrupted(
            f"stopped at {num_done:,} of {index.num_rows:,} rows in {location.uri}; the same command goes on with it",
            {"num_rows": index.num_rows, "num_rows_done": num_done},
        ) from stop
    return Prediction(
        answers=results.Answers(location), num_rows=index.num_rows, num_errors=num_errors, num_parts=index.num_parts,
        num_resumed_rows=num_done, too_many_errors=num_errors > allowance(max_error_rows, index.num_rows),
        precision=job.precision, workers=workers, statistics=statistics, output_path=location.full_name,
        probabilities=job.probabilities,
    )


def probabilities_of(
    model: ModelSource, args: QATestArgs, precision: str, *, to_files: bool
) -> calibration.Probabilities | None:
    """What the calibration.json in the model's folder says of scores; None where it is not there, or not of this run.

    Raises:
        OptionError: ``min_probability`` or ``target_precision`` cannot be met.
    """
    limits = {"min_probability": args.min_probability, "target_precision": args.target_precision}
    asked = [f"{name} is {limit:g}" for name, limit in limits.items() if limit is not None]
    if not to_files:
        if asked:
            raise OptionError(
                f"{asked[0]} without an output folder, and answers outside of files have no column abstain; allowed: "
                "an output folder, or neither min_probability nor target_precision"
            )
        return None
    path = Path(model.directory) / calibration.FILE_NAME
    how = "`jobs.eval --calibrate` on labelled rows, with the model in a local folder, makes one"
    problem = ""
    try:
        stored = json.loads(path.read_bytes())
        before, now = stored["options"], answer_options(args)
        if stored["model_digest"] != model.digest:
            problem = f"{path} was made for another model (its weights, tokenizer or configuration differ)"
        elif before != now:
            names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
            differences = ", ".join(f"{name} {before.get(name)!r} instead of {now.get(name)!r}" for name in names)
            problem = f"{path} was made with other options ({differences})"
        else:
            if stored["precision"] != precision:
                logger.warning(
                    "%s was made with precision %s, this run has %s: for exact probabilities let both have the same",
                    path, stored["precision"], precision,
                )
            return calibration.from_json(stored, **limits)
    except FileNotFoundError:
        if not asked:
            return None
        problem = f"model {model.name} has no {calibration.FILE_NAME}"
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        problem = f"{path} is not what this version writes ({type(error).__name__}: {error})"
    if asked:
        raise OptionError(f"{asked[0]}, but {problem}; {how}")
    logger.warning("results have no column probability: %s; %s", problem, how)
    return None


def _plan(
    index: CSVIndex, model: ModelSource, args: QATestArgs, precision: str, keep: Sequence[str],
    probabilities: calibration.Probabilities | None,
) -> dict[str, Any]:
    """Everything that an answer or the layout of the parts depends on."""
    calibrated = {} if probabilities is None else {"calibration": probabilities.to_json()}
    options = {k: v for k, v in dataclasses.asdict(args).items() if k not in _OPTIONS_WITHOUT_EFFECT}
    return {
        "input": index.digest, "num_rows": index.num_rows, "num_parts": index.num_parts, "model": model.digest,
        "options": options, "precision": precision, "keep_columns": list(keep), **calibrated,
        "versions": {"ray-qa": ray_qa.__version__}
        | {name: version(name) for name in ("tokenizers", "torch", "transformers")},
    }


def run_parts(job: Job, index: CSVIndex, parts: Sequence[int], workers: Workers) -> Iterator[PartReport]:
    """The reports of the given parts as they are finished, in no particular order; each part exactly once.

    Raises:
        WorkError: a worker failed, or a part did not come back.
    """
    if not parts:
        return
    feeds = workers.use_gpu or any(file.compression is not None for file in index.files)
    most = 1  # without a folder, where finished parts are found again, a death costs the whole run
    if job.folder is not None:
        most = min(_PARTS_OF_RUN, len(parts) // (_RUNS_OF_WORKER * workers.num_workers))
    sizes = reading.run_sizes(len(parts), workers.num_workers, at_most=most)
    runs = reading.part_runs(index, parts, sizes=sizes, cell_per_block=True)
    ledger = attempts.start_ledger()
    job = dataclasses.replace(job, ledger=ledger)
    pool = ray.data.ActorPoolStrategy(
        # Ray Data warns of a pool that waits for more workers than there are runs.
        min_size=min(workers.num_workers, runs.count()), max_size=workers.num_workers, initial_size=workers.num_workers,
        # One run at work and one waiting. Of few, the last would lie with one worker while another has none.
        max_tasks_in_flight_per_actor=1 if len(parts) < _FEW_PARTS * workers.num_workers else 2,
    )
    cpus = float(workers.threads)
    if feeds:
        runs = runs.map_batches(
            _Feeder(job).feed, batch_size=1, batch_format="numpy", num_cpus=_FEEDER_CPUS
        )
        total = sum(cluster.cpus_per_node())
        # Workers on CPUs leave room for at least one feeder.
        cpus = 1 if workers.use_gpu else workers.threads * max(total - _FEEDER_CPUS, 0.5) / total
    answered = runs.map_batches(
        PredictionWorker, fn_constructor_args=(job,), batch_size=1, batch_format="numpy",
        compute=pool,
        num_cpus=round(cpus, 4), num_gpus=1 if workers.use_gpu else None,
    )
    expected = {index.part(number).first_row for number in parts}
    try:
        for batch in cluster.batches(answered):
            reports: list[PartReport] = [report for cell in batch["reports"] for report in cluster.unpack(cell)]
            for report in reports:
                if report.first_row not in expected:
                    raise WorkError(f"the part of row {report.first_row} came back twice")
                expected.remove(report.first_row)
                yield report
    except UserError as error:
        # A disk that is full, a file that is gone: from here on it is the work that failed, and it can be resumed.
        raise WorkError(str(error)) from error
    finally:
        ray.kill(ledger)
    if expected:
        raise WorkError(f"{len(expected)} parts did not come back, the first of them at row {min(expected)}")


class _Feeder:
    """Reads and tokenizes the parts of a run, in a task without a model."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def feed(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        job = self.job
        maker = _window_maker(job.model.digest, job.options, job.trust_remote_code, _Hidden(job.model))
        watch = attempts.Watch(job.ledger, f"task {ray.get_runtime_context().get_task_id()}")
        watch.check()
        for part, table in reading.read_run(ray.get(job.index), batch, job.columns):
            table = usable_rows(job, table)
            prepared = None
            # Where tokenizing kills, the worker does it: it can tell by which row.
            unit = (part.first_row, -1, -1)
            if not watch.is_needed or not watch.kills(unit):
                windows = _make_windows(job, table, maker)
                prepared = (windows.to_table(), windows.errors)
                if watch.is_needed:
                    watch.finished(unit)
            yield {"part": [cluster.pack(part)], "rows": [_to_ipc(table)], "windows": [cluster.pack(prepared)]}


@dataclass(frozen=True)
class _Hidden:
    """A value that a cache's key leaves out."""

    value: Any = field(compare=False)


@lru_cache(maxsize=2)
def _window_maker(_digest: str, options: AnswerOptions, trust_remote_code: bool, shared: _Hidden) -> WindowMaker:
    """One tokenizer per process, however many tasks it runs."""
    from ray_qa.engine import window_maker
    from ray_qa.model import load_tokenizer

    tokenizer, longest = load_tokenizer(
        os.fspath(model_transfer.local_directory(shared.value)), trust_remote_code=trust_remote_code
    )
    return window_maker(tokenizer, options, model_max_length=longest)


class PredictionWorker:
    """A pool worker of Ray Data: the engine, loaded once, called with one run or one prepared part at a time."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.index: CSVIndex = ray.get(job.index)
        context = ray.get_runtime_context()
        self.name = f"{context.get_node_id()[:8]}-{os.getpid()}"
        self.watch = attempts.Watch(job.ledger, f"actor {context.get_actor_id()}")
        # What goes wrong here is raised by the first call: Ray Data would start another worker in place of this one.
        self.failure: Exception | None = None
        try:
            self.watch.check()
            self.engine: Engine = (job.make_engine or _load_engine)(job)
        except Exception as error:
            self.failure = error

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        if self.failure is not None:
            raise self.failure
        # Told once, at the end: where a worker dies another makes the same call again, and Ray takes what came before
        # for the first items of what comes then. And each item more would wait for the driver to take it.
        reports: list[PartReport] = []
        is_again = self.watch.is_needed
        for part, table, windows in self._prepared(batch):
            # The first part tells whether a worker that died, perhaps on another node, had begun with this run.
            found = self._found(part) if is_again or not reports else None
            is_again = is_again or found is not None
            reports.append(found or self._answer(part, table, windows))
        yield {"reports": [cluster.pack(reports)]}

    def _prepared(self, batch: dict[str, Any]) -> Iterator[tuple[Part, pa.Table, Windows | None]]:
        if reading.PARTS in batch:
            for part, table in reading.read_run(self.index, batch, self.job.columns):
                yield part, usable_rows(self.job, table), None
            return
        from ray_qa.windows import Windows

        for part, rows, cell in zip(batch["part"], batch["rows"], batch["windows"], strict=True):
            prepared = cluster.unpack(cell)
            windows = None
            if prepared is not None:
                windows = Windows.from_table(prepared[0])
                windows.errors.update(prepared[1])
            yield cluster.unpack(part), _from_ipc(rows), windows

    def _found(self, part: Part) -> PartReport | None:
        """The report of a part that a worker had published before it died."""
        if self.job.folder is None:
            return None
        file = self.job.folder.find(part.first_row)
        if file is None:
            return None
        now = time.time()
        return PartReport(
            first_row=part.first_row, num_rows=part.num_rows, num_errors=file.num_errors, num_windows=0, started=now,
            finished=now, worker=self.name, file=file,
        )

    def _engine_output(self, part: Part, table: pa.Table, windows: Windows | None) -> EngineOutput:
        with_loss = self.job.reducer is not None
        if not self.watch.is_needed:
            return self.engine.answer(table, windows, with_loss=with_loss, top_k=self.job.top_k)

        def compute(start: int, stop: int) -> EngineOutput:
            is_whole = stop - start == table.num_rows
            return self.engine.answer(
                table.slice(start, stop - start), windows if is_whole else None, with_loss=with_loss,
                top_k=self.job.top_k,
            )

        return self.watch.run(
            part.first_row, table.num_rows, compute=compute,
            give_up=lambda at, reason: self.engine.give_up(
                table.slice(at, 1), reason, with_loss=with_loss, top_k=self.job.top_k
            ),
            join=lambda ours, theirs: ours.join(theirs), pack=cluster.pack, unpack=cluster.unpack,
        )

    def _answer(self, part: Part, table: pa.Table, windows: Windows | None) -> PartReport:
        job = self.job
        started = time.time()
        output = self._engine_output(part, table, windows)
        report = PartReport(
            first_row=part.first_row, num_rows=part.num_rows,
            num_errors=len(output.predictions) - output.predictions["error"].null_count,
            num_windows=int(output.num_windows.sum()), started=started, finished=time.time(), worker=self.name,
        )
        if job.reducer is not None:
            return dataclasses.replace(report, reduced=job.reducer(part, table, output), finished=time.time())
        results.check_answers(table[schema.CONTEXT], output.predictions)
        if job.folder is not None:
            answers = output.predictions
            if job.probabilities is not None:
                answers = job.probabilities.add_to(answers)
            rows = pa.array(results.row_numbers(answers))
            for name in job.extra_columns:
                answers = answers.append_column(name, table[name].take(rows))
            file = job.folder.publish_part(answers, part.first_row, part.num_rows)
            return dataclasses.replace(report, file=file, finished=time.time())
        results.check_rows(output.predictions, part.first_row, part.num_rows)
        return dataclasses.replace(report, answers=output.predictions)


def _load_engine(job: Job) -> Engine:
    import torch

    from ray_qa.engine import Engine
    from ray_qa.model import load_model

    torch.set_num_threads(job.threads)
    loaded = load_model(
        model_transfer.local_directory(job.model), device=job.device, precision=job.precision,
        trust_remote_code=job.trust_remote_code, allow_untrained_head=job.allow_untrained_head,
    )
    return Engine(loaded, job.options)


def usable_rows(job: Job, table: pa.Table) -> pa.Table:
    """The rows that go through the engine: for evaluation those with usable labels, repaired; else all."""
    return table if job.reducer is None else labelled_rows(table, job.options.handle_impossible_answer)


def labelled_rows(table: pa.Table, handle_impossible_answer: bool) -> pa.Table:
    """The rows with usable labels, repaired."""
    check = check_labels(table, handle_impossible_answer=handle_impossible_answer)
    for name, values in ((schema.ANSWER_TEXT, check.answer_text), (schema.ANSWER_START, check.answer_start)):
        table = table.set_column(table.column_names.index(name), name, pa.chunked_array([pa.array(values)]))
    return table.filter(pa.array(check.usable))


def _make_windows(job: Job, table: pa.Table, maker: WindowMaker) -> Windows:
    from ray_qa.engine import make_windows

    return make_windows(table, maker, with_labels=job.reducer is not None)


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_ipc(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()
