"""Evaluation: the prediction pipeline with labels, reduced to sums in every worker.

A part comes back as a few numbers, added up in part order, so that a figure does not depend on how many workers
there were, and memory does not grow with the input.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
from ray.train import ScalingConfig

from ray_qa import cluster, model_transfer, reading, schema
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import BadRowsError, InputError
from ray_qa.labels import LabelReport, check_labels
from ray_qa.metrics import Scores, score_row
from ray_qa.options import QAEvalArgs, allowance
from ray_qa.prediction import Job, RunStatistics, resolve_precision, run_parts
from ray_qa.storage import PathLike

if TYPE_CHECKING:
    from ray_qa.engine import EngineOutput
    from ray_qa.model import ModelSource

logger = logging.getLogger("ray_qa")


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Figures of an evaluation.

    ``loss`` is the mean over all windows; ``exact_match`` and ``f1`` are percentages over all rows, as in SQuAD.
    """

    loss: float
    exact_match: float
    f1: float
    num_rows: int
    """Rows that were evaluated."""
    num_windows: int
    num_repaired_rows: int = 0
    """Rows among them whose answer_start or answer_text did not fit and could be mended."""
    num_bad_rows: int = 0
    """Rows left out because their labels cannot be used."""
    num_error_rows: int = 0
    """Evaluated rows without an answer, such as a question too long for a window; they count as wrong."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its figures, and how it was run."""

    result: EvalResult
    precision: str
    workers: cluster.Workers
    statistics: RunStatistics


def evaluate(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | PathLike,
    args: QAEvalArgs | Mapping[str, Any] | None = None, scaling: ScalingConfig | None = None,
    trust_remote_code: bool = False, allow_untrained_head: bool = False,
    storage_options: Mapping[str, object] | None = None,
) -> Evaluation:
    """Loss, exact match and F1 of a model on CSV files with question, context and answer.

    Args:
        input_paths: a file, a folder, a glob, or a list of these; local or a URI.
        model: a folder, a name on the hub, or what `model.resolve_model` found.

    Raises:
        BadRowsError: more rows than ``max_bad_rows`` have labels that cannot be used; lists the first ten.
        OptionError, InputError, CSVError, ModelError: before any work is done.
        WorkError: the work failed.
    """
    from ray_qa.model import as_source

    args = QAEvalArgs.of(args)
    model = as_source(model, trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head)
    index = reading.index_input(
        input_paths, required_columns=schema.TRAIN_COLUMNS, delimiter=args.delimiter, storage_options=storage_options
    )
    report = check_label_rows(index, args.handle_impossible_answer, args.max_bad_rows)
    workers = cluster.prediction_workers(scaling, at_most=index.num_parts)
    precision = resolve_precision(args.precision, workers)
    logger.info(
        "eval: %d rows in %d parts; %s; precision %s; model %s", index.num_rows, index.num_parts, workers, precision,
        model.name,
    )
    job = Job(
        index=ray.put(index), model=model_transfer.share_directory(model.directory, model.digest), options=args,
        precision=precision, device=workers.device, threads=workers.threads, reducer=score_rows,
        trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head,
    )
    statistics = RunStatistics()
    parts: dict[int, Scores] = {}
    for part in run_parts(job, index, range(index.num_parts), workers):
        statistics.add(part)
        parts[part.first_row] = part.reduced
    scores = sum((parts[first_row] for first_row in sorted(parts)), Scores())
    result = EvalResult(
        loss=scores.loss, exact_match=scores.exact_match, f1=scores.f1, num_rows=scores.num_rows,
        num_windows=scores.num_windows, num_repaired_rows=report.num_repaired, num_bad_rows=report.num_bad,
        num_error_rows=statistics.num_errors,
    )
    return Evaluation(result, precision, workers, statistics)


def score_rows(table: pa.Table, output: EngineOutput) -> Scores:
    """The sums of one part: its rows' scores against their labels, and the losses of its windows."""
    answers = output.predictions["answer"].to_pylist()
    golds = table[schema.ANSWER_TEXT].to_pylist()
    rows = (score_row(answer, [gold]) for answer, gold in zip(answers, golds, strict=True))
    loss_sum = 0.0 if output.loss_sum is None else float(output.loss_sum.sum())
    return Scores.of(rows, loss_sum=loss_sum, num_windows=int(output.num_windows.sum()))


def check_label_rows(index: CSVIndex, handle_impossible_answer: bool, max_bad_rows: float) -> LabelReport:
    """Check all labels before anything expensive starts.

    Raises:
        InputError: there is not one usable row.
        BadRowsError: more bad rows than ``max_bad_rows`` allows.
    """
    report = LabelReport()
    check = partial(_report_of, handle_impossible_answer)
    if index.num_parts:
        for part in reading.map_parts(check, index, columns=schema.TRAIN_COLUMNS):
            report.merge(part)
    refuse_bad_rows(report, index, max_bad_rows)
    return report


def refuse_bad_rows(report: LabelReport, index: CSVIndex, max_bad_rows: float) -> None:
    """Raise BadRowsError or InputError where ``report`` says that too few rows can be used."""
    files = ", ".join(file.location.uri for file in index.files[:3])
    if not report.num_rows:
        raise InputError(f"{files}: there are no rows below the header; at least one labelled row is needed")
    allowed = allowance(max_bad_rows, report.num_rows)
    if report.num_bad > allowed or report.num_bad == report.num_rows:
        raise BadRowsError(
            f"{report.describe(index.locate_row)}\n"
            f"allowed by max_bad_rows={max_bad_rows:g}: {allowed:,}, and at least one usable row"
        )


def _report_of(handle_impossible_answer: bool, table: pa.Table) -> LabelReport:
    return LabelReport().add(check_labels(table, handle_impossible_answer=handle_impossible_answer), table)
