"""Evaluation: the prediction pipeline with labels, reduced to sums in every worker.

A part comes back as a few numbers, added up in part order, so that a figure does not depend on how many workers
there were, and memory does not grow with the input. With an output folder a worker also publishes the details of its
part, and the driver writes the figures (eval.json) and the page (report.html).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.train import ScalingConfig

import ray_qa
from ray_qa import calibration, cluster, model_transfer, reading, report, results, schema, slices
from ray_qa.bad_rows import check_label_rows
from ray_qa.csv_file import Part
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import InputError, OptionError, OutputError, WorkError
from ray_qa.labels import LabelReport, gold_answers
from ray_qa.metrics import NullThresholds, RowScore, Scores, normalize, score_row
from ray_qa.options import QAEvalArgs
from ray_qa.prediction import Job, RunStatistics, resolve_precision, run_parts
from ray_qa.storage import Location, PathLike, json_text, locate

if TYPE_CHECKING:
    from ray_qa.engine import EngineOutput
    from ray_qa.model import ModelSource

logger = logging.getLogger("ray_qa")

FIGURES_NAME = "eval.json"
REPORT_NAME = "report.html"
CALIBRATION_NAME = "calibration.json"
DETAILS_NAME = "details"


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """Figures of an evaluation.

    ``loss`` is the mean over all windows; ``exact_match`` and ``f1`` are percentages over all rows, as in SQuAD.
    ``has_answer_*`` and ``no_answer_*`` are those over the rows with and without an answer, None where there are none.
    ``best_*``, with ``handle_impossible_answer``: the figure if "" were answered where the null probability is above
    ``best_*_threshold``, the best of all thresholds on these rows.
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
    """Evaluated rows that the model could not answer, such as a question too long for a window; their answer is ""."""
    num_has_answer: int = 0
    num_no_answer: int = 0
    has_answer_exact_match: float | None = None
    has_answer_f1: float | None = None
    no_answer_exact_match: float | None = None
    no_answer_f1: float | None = None
    best_exact_match: float | None = None
    best_exact_match_threshold: float | None = None
    best_f1: float | None = None
    best_f1_threshold: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation: its figures, and how it was run."""

    result: EvalResult
    precision: str
    workers: cluster.Workers
    statistics: RunStatistics
    output_path: str | None = None


def evaluate(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | PathLike,
    args: QAEvalArgs | Mapping[str, Any] | None = None, output_path: PathLike | None = None,
    scaling: ScalingConfig | None = None, trust_remote_code: bool = False, allow_untrained_head: bool = False,
    storage_options: Mapping[str, object] | None = None, calibrate: bool = False,
) -> Evaluation:
    """Loss, exact match and F1 of a model on CSV files with question, context and answer.

    A column ``answers`` (a JSON list of strings) may name further right answers of a row.

    Args:
        input_paths: a file, a folder, a glob, or a list of these; local or a URI.
        model: a folder (a path or a URI), a name on the hub, or what `model.resolve_model` found.
        output_path: a folder for eval.json, report.html and details/part-*.parquet (one line per row, schema
            `slices.DETAILS`); an earlier evaluation in it is replaced.
        calibrate: also fit what turns scores into probabilities (see `calibration`) and write it to calibration.json,
            in ``output_path`` and beside a model that is a local folder; InputError, after all else is written, where
            there are too few rows for it.

    Raises:
        BadRowsError: more rows than ``max_bad_rows`` have labels that cannot be used; lists the first ten.
        OptionError, InputError, CSVError, ModelError: before any work is done.
        WorkError: the work failed.
    """
    from ray_qa.model import as_source

    args = QAEvalArgs.of(args)
    if calibrate and output_path is None:
        raise OptionError("calibrate is True without an output folder; allowed: False, or an output folder")
    model = as_source(
        model, trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head,
        storage_options=storage_options,
    )
    index = reading.index_input(
        input_paths, required_columns=schema.TRAIN_COLUMNS, delimiter=args.delimiter, storage_options=storage_options
    )
    extra = _answers_column(index)
    output = None if output_path is None else locate(output_path, storage_options=storage_options)
    if output is not None:
        output.make_folder()
    labels = check_label_rows(
        index, args.handle_impossible_answer, args.max_bad_rows, extra_columns=extra, quarantine=output
    )
    workers = cluster.prediction_workers(scaling, at_most=index.num_parts)
    precision = resolve_precision(args.precision, workers)
    logger.info(
        "eval: %d rows in %d parts; %s; precision %s; model %s", index.num_rows, index.num_parts, workers, precision,
        model.name,
    )
    job = Job(
        index=ray.put(index), model=model_transfer.share_directory(model.directory, model.digest), options=args,
        precision=precision, device=workers.device, threads=workers.threads,
        reducer=Scorer(args, None if output is None else output / DETAILS_NAME, calibrate), extra_columns=extra,
        trust_remote_code=trust_remote_code, allow_untrained_head=allow_untrained_head,
    )
    if output is not None:
        _remove_earlier(output)
    statistics = RunStatistics()
    parts: dict[int, Scores] = {}
    # Whole numbers, which need not wait for their turn: only a few figures are kept per part.
    summary, thresholds, sample = slices.Summary(), NullThresholds(), calibration.Sample()
    for part in run_parts(job, index, range(index.num_parts), workers):
        statistics.add(part)
        scored: PartScores = part.reduced
        parts[part.first_row] = scored.scores
        summary += scored.summary
        thresholds += scored.thresholds
        sample += scored.sample
    scores = sum((parts[first_row] for first_row in sorted(parts)), Scores())
    result = _result(scores, thresholds, labels, statistics.num_errors)
    done = Evaluation(result, precision, workers, statistics, None if output is None else output.uri)
    if output is not None:
        _prove_details(output / DETAILS_NAME, parts)
        figures = done_to_json(done) | {
            "model": model.name, "input": _describe_input(index), "normalization": args.normalization,
            "language": args.language, "version": ray_qa.__version__,
        } | summary.to_json()
        too_little: InputError | None = None
        if calibrate:
            try:
                figures["calibration"] = _calibrate(sample, result, model, output)
            except InputError as error:
                too_little = error  # the figures are worth keeping all the same
        (output / REPORT_NAME).publish(report.render(figures, summary.worst).encode())
        (output / FIGURES_NAME).publish(json_text(figures, indent=1).encode())
        if too_little is not None:
            raise too_little
    return done


def _calibrate(
    sample: calibration.Sample, result: EvalResult, model: ModelSource, output: Location
) -> dict[str, Any]:
    """Fit a calibration, write it, and return it with the points of its curve."""
    found, measured = calibration.calibrate(sample)
    stored = calibration.to_json(found, measured, result.best_f1_threshold) | {"model_digest": model.digest}
    data = json.dumps(stored, indent=1).encode()
    (output / CALIBRATION_NAME).publish(data)
    if os.path.isdir(os.path.expanduser(model.name)):  # and not the hub's cache
        try:
            (locate(model.directory) / CALIBRATION_NAME).publish(data)
        except OutputError as error:
            logger.warning("calibration.json is only in %s: %s", output.uri, error)
    score = np.linspace(0, 1, 51)
    return stored | {"curve": np.stack([score, found.probability(score)], axis=1).tolist()}


def _result(scores: Scores, thresholds: NullThresholds, labels: LabelReport, num_errors: int) -> EvalResult:
    kinds = {
        name: _or_none(getattr(scores, name))
        for name in ("has_answer_exact_match", "has_answer_f1", "no_answer_exact_match", "no_answer_f1")
    }
    best: dict[str, float] = {}
    if thresholds.num_rows:
        for name, found in (("best_exact_match", thresholds.best_exact_match), ("best_f1", thresholds.best_f1)):
            best |= {name: found.percentage, f"{name}_threshold": found.threshold}
    return EvalResult(
        loss=scores.loss, exact_match=scores.exact_match, f1=scores.f1, num_rows=scores.num_rows,
        num_windows=scores.num_windows, num_repaired_rows=labels.num_repaired, num_bad_rows=labels.num_bad,
        num_error_rows=num_errors, num_has_answer=scores.num_has_answer, num_no_answer=scores.num_no_answer,
        **kinds, **best,
    )


def done_to_json(done: Evaluation) -> dict[str, Any]:
    """The figures of an evaluation and the facts of its run, flat; a figure over nothing may be NaN."""
    return dataclasses.asdict(done.result) | {
        "precision": done.precision, "num_workers": done.workers.num_workers, "device": done.workers.device,
        "rows_per_second": round(done.statistics.rows_per_second, 2),
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _describe_input(index: CSVIndex) -> str:
    names = [file.location.uri for file in index.files[:3]]
    more = len(index.files) - len(names)
    return ", ".join(names) + (f" and {more:,} more files" if more else "")


def _answers_column(index: CSVIndex) -> tuple[str, ...]:
    """The optional column of further right answers, where the input has it."""
    lacking = [file.location.uri for file in index.files if schema.ANSWERS not in file.columns]
    if lacking and len(lacking) < len(index.files):
        raise InputError(
            f"{lacking[0]}: lacks the column {schema.ANSWERS}, which other input files have; allowed: that all files "
            "have it, or none"
        )
    return () if lacking or not index.files else (schema.ANSWERS,)


def _remove_earlier(output: Location) -> None:
    """Take away what an earlier evaluation left; its page first, which says that it is complete."""
    for name in (REPORT_NAME, FIGURES_NAME, CALIBRATION_NAME):
        (output / name).delete()
    details = output / DETAILS_NAME
    for info in details.list():
        if info.base_name.startswith("part-") and info.base_name.endswith(".parquet"):
            (details / info.base_name).delete()


def _prove_details(details: Location, first_rows: Iterable[int]) -> None:
    found = {info.base_name for info in details.list() if info.base_name.startswith("part-")}
    expected = {results.part_name(first_row) for first_row in first_rows}
    if found != expected:
        raise WorkError(
            f"{details.uri}: part files and plan differ; missing {sorted(expected - found)[:5]}, "
            f"not of this run {sorted(found - expected)[:5]}"
        )


@dataclass(frozen=True)
class PartScores:
    """What one part comes down to. ``thresholds`` is empty without ``handle_impossible_answer``, ``summary`` without
    an output folder, ``sample`` without ``calibrate``."""

    scores: Scores
    thresholds: NullThresholds
    summary: slices.Summary
    sample: calibration.Sample


@dataclass(frozen=True)
class Scorer:
    """Reduces the labelled rows of a part and the engine's output; publishes the part's details, where asked for."""

    args: QAEvalArgs
    details: Location | None = None
    calibrate: bool = False

    def __call__(self, part: Part, table: pa.Table, output: EngineOutput) -> PartScores:
        golds = golds_of(table)
        rows = self.score(output.predictions, golds)
        scores = _sums(rows, output)
        thresholds, summary, sample = NullThresholds(), slices.Summary(), calibration.Sample()
        text_rows = rows
        if self.args.handle_impossible_answer:
            assert output.text_predictions is not None
            text_rows = self.score(output.text_predictions, golds)
            # A row without windows is answered "" whatever the threshold.
            null = np.clip(np.nan_to_num(output.null_score, nan=1.0), 0.0, 1.0)
            thresholds = NullThresholds.of(null, output.text_predictions["answer"].to_pylist(), text_rows)
        if self.details is not None:
            details = self.details_of(table, output, golds, rows, text_rows)
            summary = slices.Summary.of(details, table[schema.CONTEXT].to_pylist())
            sample = calibration.Sample.of(details) if self.calibrate else sample
            sink = pa.BufferOutputStream()
            pq.write_table(details, sink)
            (self.details / results.part_name(part.first_row)).publish(sink.getvalue())
        return PartScores(scores, thresholds, summary, sample)

    def score(self, predictions: pa.Table, golds: Sequence[Sequence[str]]) -> list[RowScore]:
        options: dict[str, Any] = {"normalization": self.args.normalization, "language": self.args.language}
        answers = predictions["answer"].to_pylist()
        return [score_row(answer, some, **options) for answer, some in zip(answers, golds, strict=True)]

    def details_of(
        self, table: pa.Table, output: EngineOutput, golds: list[list[str]], rows: list[RowScore],
        text_rows: list[RowScore],
    ) -> pa.Table:
        """The part's rows as a table with schema `slices.DETAILS`."""
        answers = output.predictions
        texts = answers if output.text_predictions is None else output.text_predictions
        contexts, questions = table[schema.CONTEXT].to_pylist(), table[schema.QUESTION].to_pylist()
        labels = table[schema.ANSWER_TEXT].to_pylist()
        starts = table[schema.ANSWER_START].to_numpy()
        lengths = np.array([len(context) for context in contexts], np.int64)
        counts = np.array([len(label) for label in labels], np.int64)
        identities = {
            context: hashlib.blake2b(context.encode(), digest_size=8).hexdigest() for context in set(contexts)
        }
        loss = np.full(len(rows), np.nan)
        if output.loss_sum is not None:
            np.divide(output.loss_sum, output.num_windows, out=loss, where=output.num_windows > 0)
        position = np.where(starts >= 0, starts / np.maximum(lengths, 1), np.nan)
        options: dict[str, Any] = {"normalization": self.args.normalization, "language": self.args.language}
        columns = {
            schema.ROW_INDEX: table[schema.ROW_INDEX],
            "context_id": [identities[context] for context in contexts],
            "question": questions,
            "prediction": answers["answer"],
            "golds": golds,
            "score": answers["score"].cast(pa.float64()),
            "text_prediction": texts["answer"],
            "text_score": texts["score"].cast(pa.float64()),
            "null_score": pa.array(output.null_score, from_pandas=True),
            "exact_match": [row.exact_match == 1 for row in rows],
            "f1": [row.f1 for row in rows],
            "text_exact_match": [row.exact_match == 1 for row in text_rows],
            "has_answer": [row.has_answer for row in rows],
            "loss": pa.array(loss, from_pandas=True),
            "num_windows": output.num_windows,
            "context_length": output.context_length,
            "answer_length": [len(normalize(label, **options).split()) for label in labels],
            "question_word": [slices.question_word(question) for question in questions],
            "answer_position": pa.array(position, from_pandas=True),
            "start": answers["start"],
            "end": answers["end"],
            "answer_start": np.maximum(starts, 0),
            "answer_end": np.maximum(starts, 0) + counts,
            "error": answers["error"],
        }
        return pa.table(columns, schema=slices.DETAILS)


def golds_of(table: pa.Table) -> list[list[str]]:
    """The right answers of every row: answer_text and, where there is such a column, ``answers``."""
    labels = table[schema.ANSWER_TEXT].to_pylist()
    if schema.ANSWERS not in table.column_names:
        return [[label] for label in labels]
    return [gold_answers(label, raw) for label, raw in zip(labels, table[schema.ANSWERS].to_pylist(), strict=True)]


def score_rows(table: pa.Table, output: EngineOutput) -> Scores:
    """The sums of a table: its rows' scores against their labels, and the losses of its windows."""
    return _sums(Scorer(QAEvalArgs()).score(output.predictions, golds_of(table)), output)


def _sums(rows: Iterable[RowScore], output: EngineOutput) -> Scores:
    loss_sum = 0.0 if output.loss_sum is None else float(output.loss_sum.sum())
    return Scores.of(rows, loss_sum=loss_sum, num_windows=int(output.num_windows.sum()))
