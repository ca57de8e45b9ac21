"""The jobs as commands: ``ray-qa train``, ``ray-qa eval``, ``ray-qa test``, ``ray-qa prepare``.

Flags are built from the option dataclasses. Log lines go to stderr, the first of them says what was chosen; the
last line on stdout is one JSON object that says what was done. Exit codes are those of `ray_qa.errors`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from ray_qa.errors import ErrorRowsError, Interrupted, OptionError, RayQAError, WorkError
from ray_qa.options import QAEvalArgs, QATestArgs, QATrainArgs
from ray_qa.storage import without_secrets

if TYPE_CHECKING:
    from ray.train import ScalingConfig

    from ray_qa.model import ModelSource



def _endpoint(url: str | None) -> dict[str, object] | None:
    return None if url is None else {"endpoint_override": url}


@dataclass(frozen=True, kw_only=True)
class _Source:
    input: tuple[str, ...]
    """CSV files, folders or globs; local paths or URIs such as s3://bucket/rows.csv."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model."""

    endpoint_url: str | None = None
    """Address of an S3-compatible store, such as http://minio:9000; otherwise AWS_ENDPOINT_URL. Credentials come from
    AWS_ACCESS_KEY_ID and its companions, or from the places where S3 clients look for them."""

    wait_for_workers: float | None = None
    """Seconds to wait for workers that the cluster has no room for yet (default 1800): until an autoscaler has added
    nodes, or other jobs have ended. Given, it also lets the job wait for nodes that are added by hand."""

    @property
    def storage_options(self) -> dict[str, object] | None:
        return _endpoint(self.endpoint_url)


@dataclass(frozen=True, kw_only=True)
class _OneModel:
    model: str
    """A name on the Hugging Face Hub, or a folder (a path or a URI) with config.json, tokenizer.json and *.safetensors.
    A hub token is taken from the environment variable HF_TOKEN."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""


@dataclass(frozen=True, kw_only=True)
class _Common(_Source):
    num_workers: int | None = None
    """Workers. Without any of these three flags: one per GPU of the cluster, else what its CPUs allow."""

    use_gpu: bool = False
    """Give each worker a GPU."""

    cpus_per_worker: int | None = None
    """CPUs of each worker."""


@dataclass(frozen=True, kw_only=True)
class TrainJob(_Common, _OneModel):
    """Fine-tune a model on CSV rows (context, question, answer_text, answer_start)."""

    output: str
    """Folder that becomes the tuned model. The same command again says that it is finished."""

    eval_input: tuple[str, ...] = ()
    """CSV files to evaluate on, see --eval-strategy; the figures stand under "evaluations"."""

    push_to_hub: str | None = None
    """Repository (NAME or OWNER/NAME) on the Hugging Face Hub that gets the model, private where it is made for it."""

    min_workers: int | None = None
    """Go on with as few workers as this when nodes are lost, and with up to --num-workers when they come."""

    storage_path: str | None = None
    """Folder for prepared windows and checkpoints, which all nodes see; otherwise RAY_QA_HOME, otherwise
    ~/.cache/ray_qa."""

    options: Annotated[QATrainArgs, tyro.conf.arg(name="")] = dataclasses.field(default_factory=QATrainArgs)


@dataclass(frozen=True, kw_only=True)
class EvalJob(_Common):
    """Loss, exact match and F1 of a model on CSV rows (context, question, answer_text, answer_start)."""

    model: str | None = None
    """A name on the Hugging Face Hub, or a folder (a path or a URI) with config.json, tokenizer.json and *.safetensors.
    A hub token is taken from the environment variable HF_TOKEN."""

    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""

    compare: tuple[str, str] | None = None
    """Two models A B instead of --model: what B gains over A on the same rows, with 95 % intervals, and the rows won
    and lost: compare.json, compare.html and details/ in --output, the two evaluations in its folders a and b."""

    output: str | None = None
    """Folder for eval.json (figures), report.html (the same to look at, with the worst rows) and details/ (Parquet,
    one line per row); an earlier evaluation in it is replaced."""

    calibrate: bool = False
    """Also fit a temperature, an offset and a null threshold that turn scores into probabilities: calibration.json in
    --output, and beside a model that is a local folder, where `test` finds it."""

    allow_untrained_head: bool = False
    """Accept an encoder without a question-answering head; its answers are random."""

    options: Annotated[QAEvalArgs, tyro.conf.arg(name="")] = dataclasses.field(default_factory=QAEvalArgs)


@dataclass(frozen=True, kw_only=True)
class TestJob(_Common, _OneModel):
    """Answer CSV rows (context, question) into Parquet files in CSV order.

    With --verify DIR in place of all other flags: prove a finished folder again, every byte of it.
    """

    output: str
    """Folder for part-*.parquet and _manifest.json. The same command on an unfinished folder goes on with it."""

    overwrite: bool = False
    """Throw away another run's output in that folder, or a finished one of this very command."""

    keep_columns: str | None = None
    """Columns of the input that the Parquet files carry along, such as id,source."""

    single_file: str | None = None
    """A Parquet file, outside of that folder, that becomes all parts in order."""

    allow_untrained_head: bool = False
    """Accept an encoder without a question-answering head; its answers are random."""

    options: Annotated[QATestArgs, tyro.conf.arg(name="")] = dataclasses.field(default_factory=QATestArgs)


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """Prove that a finished folder of answers is whole: every row once, every byte as it was written."""

    verify: str
    """The folder, local or a URI."""

    endpoint_url: str | None = None
    """Address of an S3-compatible store, such as http://minio:9000; otherwise AWS_ENDPOINT_URL."""


@dataclass(frozen=True, kw_only=True)
class PrepareJob(_Source, _OneModel):
    """Check labelled rows and plan a training, without any training: what is bad, how many windows and steps."""

    output: str | None = None
    """Folder for prepare.json and quarantine.parquet (the bad rows with their reasons)."""

    dry_run: bool = False
    """Look at a sample of the rows only."""

    options: Annotated[QATrainArgs, tyro.conf.arg(name="")] = dataclasses.field(default_factory=QATrainArgs)


def _train(job: TrainJob) -> dict[str, Any]:
    from ray_qa import cluster, hub
    from ray_qa.training import train

    if job.push_to_hub is not None:
        hub.check_repository(job.push_to_hub)
    scaling = cluster.scaling_of(
        job.num_workers, use_gpu=job.use_gpu, cpus_per_worker=job.cpus_per_worker, min_workers=job.min_workers
    )
    result = train(
        job.input, model=_model(job), args=job.options, output=job.output, scaling=scaling,
        eval_paths=job.eval_input or None, storage_path=job.storage_path, trust_remote_code=job.trust_remote_code,
        storage_options=job.storage_options, wait_seconds=job.wait_for_workers,
    )
    done = result.to_json()
    done.pop("history")  # stands in result.json
    if job.push_to_hub is not None:
        tuned = _resolve(job, result.model_directory, None)
        try:
            done["pushed_to"] = hub.push_folder(tuned.directory, job.push_to_hub)
        except RayQAError as error:
            raise _Finished(done, error) from error
    return done


def _eval(job: EvalJob) -> dict[str, Any]:
    done = _evaluation(job) if job.compare is None else _comparison(job, job.compare)
    return done if job.output is None else done | {"output": without_secrets(job.output)}


def _comparison(job: EvalJob, names: tuple[str, str]) -> dict[str, Any]:
    unfit = {"--model": job.model, "--revision": job.revision, "--calibrate": job.calibrate}
    for name, value in unfit.items():
        if value:
            raise OptionError(f"--compare {' '.join(names)} and {name} are both given; allowed: one of them")
    if job.output is None:
        raise OptionError("--compare needs --output, a folder for the comparison and the two evaluations")
    from ray_qa.evaluation import compare, compared_to_json

    first, second = (_resolve(job, name, None) for name in names)
    done = compare(
        job.input, models=(first, second), args=job.options, output_path=job.output, scaling=_scaling(job),
        trust_remote_code=job.trust_remote_code, allow_untrained_head=job.allow_untrained_head,
        storage_options=job.storage_options, wait_seconds=job.wait_for_workers,
    )
    return compared_to_json(done) | {"model_a": without_secrets(names[0]), "model_b": without_secrets(names[1])}


def _evaluation(job: EvalJob) -> dict[str, Any]:
    if job.model is None:
        raise OptionError("no model was given; allowed: --model NAME, or --compare A B for two")
    from ray_qa.evaluation import done_to_json, evaluate

    done = evaluate(
        job.input, model=_resolve(job, job.model, job.revision), args=job.options,
        output_path=job.output, scaling=_scaling(job), calibrate=job.calibrate, trust_remote_code=job.trust_remote_code,
        allow_untrained_head=job.allow_untrained_head,
        storage_options=job.storage_options, wait_seconds=job.wait_for_workers,
    )
    return done_to_json(done) | {"model": without_secrets(job.model)}


def _test(job: TestJob) -> dict[str, Any]:
    from ray_qa.prediction import predict

    done = predict(
        job.input, model=_model(job), args=job.options, output_path=job.output, scaling=_scaling(job),
        overwrite=job.overwrite, trust_remote_code=job.trust_remote_code,
        allow_untrained_head=job.allow_untrained_head,
        storage_options=job.storage_options, keep_columns=_names(job.keep_columns), single_file=job.single_file,
        wait_seconds=job.wait_for_workers,
    )
    summary = {
        "num_rows": done.num_rows, "num_errors": done.num_errors, "num_parts": done.num_parts,
        "num_resumed_rows": done.num_resumed_rows, "model": without_secrets(job.model), "precision": done.precision,
        "num_workers": done.workers.num_workers, "device": done.workers.device,
        "rows_per_second": round(done.statistics.rows_per_second, 2), "output": done.output_path,
    }
    if done.probabilities is not None and done.probabilities.min_probability is not None:
        summary["min_probability"] = done.probabilities.min_probability
    if done.too_many_errors:
        raise _Finished(summary, ErrorRowsError(
            f"{done.num_errors} of {done.num_rows} rows have an error instead of an answer, more than "
            f"max_error_rows={job.options.max_error_rows:g} allows; everything was written to {done.output_path}, "
            "the column error says why"
        ))
    return summary


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def _verify(job: VerifyJob) -> dict[str, Any]:
    from ray_qa.results import verify

    options = _endpoint(job.endpoint_url)
    return {"verified": without_secrets(job.verify)} | dataclasses.asdict(verify(job.verify, storage_options=options))


def _prepare(job: PrepareJob) -> dict[str, Any]:
    from ray_qa.preparation import survey

    return survey(
        job.input, model=_model(job), args=job.options, output=job.output, dry_run=job.dry_run,
        trust_remote_code=job.trust_remote_code, storage_options=job.storage_options,
        wait_seconds=job.wait_for_workers,
    ) | {"model": without_secrets(job.model)}


class _Finished(Exception):
    """Carries a job's summary along with the error that it ends in."""

    def __init__(self, summary: dict[str, Any], error: RayQAError) -> None:
        super().__init__(str(error))
        self.summary, self.error = summary, error


def _model(job: TrainJob | TestJob | PrepareJob) -> ModelSource:
    return _resolve(job, job.model, job.revision)


def _resolve(job: _Source, name: str, revision: str | None) -> ModelSource:
    from ray_qa.model import resolve_model

    # The functions refuse an untrained head themselves, where they must.
    return resolve_model(
        name, revision=revision, trust_remote_code=job.trust_remote_code, allow_untrained_head=True,
        storage_options=job.storage_options,
    )


def _scaling(job: _Common) -> ScalingConfig | None:
    from ray_qa import cluster

    return cluster.scaling_of(job.num_workers, use_gpu=job.use_gpu, cpus_per_worker=job.cpus_per_worker)


_JOBS: dict[type, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    TrainJob: ("train", _train), EvalJob: ("eval", _eval), TestJob: ("test", _test),
    PrepareJob: ("prepare", _prepare), VerifyJob: ("test", _verify),
}
_Job = (
    Annotated[TrainJob, tyro.conf.subcommand("train")]
    | Annotated[EvalJob, tyro.conf.subcommand("eval")]
    | Annotated[TestJob, tyro.conf.subcommand("test")]
    | Annotated[PrepareJob, tyro.conf.subcommand("prepare")]
    | Annotated[VerifyJob, tyro.conf.subcommand("verify")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one job; returns its exit code."""
    started = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["test"] and any(argument.partition("=")[0] == "--verify" for argument in arguments):
        arguments[0] = "verify"
    try:
        job = tyro.cli(
            _Job,  # type: ignore[arg-type]
            args=arguments, prog="ray-qa", description="Extractive question answering over CSV files, on Ray.",
        )
    except OptionError as error:
        print(f"ray-qa: {error}", file=sys.stderr)
        return error.exit_code
    name, run = _JOBS[type(job)]
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("ray_qa").setLevel(logging.INFO)
    failure: RayQAError | None = None
    summary: dict[str, Any] = {}
    code: int | None = None
    try:
        with _stop_on_sigterm() as stopped:
            summary = run(job)
    except _Finished as finished:
        summary, failure = finished.summary, finished.error
    except RayQAError as error:
        failure = error
    except KeyboardInterrupt as stop:
        code = 143 if stopped else 130
        summary = stop.summary if isinstance(stop, Interrupted) else {}
        failure = WorkError(str(stop) or "stopped")
    except Exception as error:
        # Not foreseen: the trace is for whoever mends it, the JSON line for whoever started the job.
        traceback.print_exc()
        failure = WorkError(f"{type(error).__name__}: {error}")
    status = "done" if failure is None else "failed" if code is None else "stopped"
    result = {"job": name, "status": status, **summary}
    if failure is not None:
        print(f"ray-qa {name}: {failure}", file=sys.stderr, flush=True)
        result["error"] = str(failure)
    result["seconds"] = round(time.monotonic() - started, 2)
    print(_json(result), flush=True)
    if failure is None:
        return 0
    return failure.exit_code if code is None else code


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[list[int]]:
    """SIGTERM (`ray job stop`, a scheduler's eviction) ends the work as Ctrl-C does; the list then holds its number.

    Further ones are ignored: the work is ending.
    """
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        if not received:
            signal.signal(signal.SIGTERM, before)


def _json(value: dict[str, Any]) -> str:
    from ray_qa.storage import json_text

    return json_text(value)


if __name__ == "__main__":
    raise SystemExit(main())
