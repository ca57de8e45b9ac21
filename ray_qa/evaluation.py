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
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from ray.train import ScalingConfig

import ray_qa
from ray_qa import (
    calibration,
    cluster,
    comparison,
    golds,
    model_transfer,
    preflight,
    reading,
    report,
    results,
    schema,
    slices,
)
from ray_qa.bad_rows import check_label_rows
from ray_qa.csv_file import Part
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import InputError, OptionError, OutputError, WorkError
from ray_qa.labels import LabelReport, gold_answers
from ray_qa.metrics import NullThresholds, RowScore, Scores, normalize, score_row
from ray_qa.options import QAEvalArgs, answer_options
from ray_qa.parquet_files import publish_table
from ray_qa.prediction import Job, RunStatistics, labelled_rows, run_parts
from ray_qa.storage import Location, PathLike, json_text, locate, usable_folder

if TYPE_CHECKING:
    from ray_qa.engine import EngineOutput
    from ray_qa.model import ModelSource

logger = logging.getLogger("ray_qa")

FIGURES_NAME = "eval.json"
REPORT_NAME = "report.html"
COMPARISON_NAME = "compare.json"
COMPARISON_REPORT_NAME = "compare.html"
CALIBRATION_NAME = calibration.FILE_NAME
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


@dataclass(frozen=True, kw_only=True)
class ComparedModels:
    """What the second model (b) gains over the first (a) on the same rows.

    ``exact_match`` and ``f1`` hold the difference in percentage points, its 95 % interval over contexts, and the
    numbers of rows on which b is better, worse and equal.
    """

    a: EvalResult
    b: EvalResult
    exact_match: comparison.Difference
    f1: comparison.Difference
    num_contexts: int
    precision: str
    workers: cluster.Workers
    output_path: str


def evaluate(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | PathLike,
    args: QAEvalArgs | Mapping[str, Any] | None = None, output_path: PathLike | None = None,
    scaling: ScalingConfig | None = None, trust_remote_code: bool = False, allow_untrained_head: bool = False,
    storage_options: Mapping[str, object] | None = None, calibrate: bool = False, wait_seconds: float | None = None,
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
        wait_seconds: how long to wait for workers, see `room.wait`.

    Raises:
        BadRowsError: more rows than ``max_bad_rows`` have labels that cannot be used; lists the first ten.
        OptionError, InputError, CSVError, ModelError, OutputError: before any work is done.
        WorkError: the work failed.
    """
    args = QAEvalArgs.of(args)
    if calibrate and output_path is None:
        raise OptionError("calibrate is True without an output folder; allowed: False, or an output folder")
    code = _Trust(trust_remote_code, allow_untrained_head)
    model = _checked_model(model, args, code, storage_options)
    output = None if output_path is None else locate(output_path, storage_options=storage_options)
    rows = _check_rows(
        input_paths, args, output, scaling, storage_options, not_beside=COMPARISON_NAME, wait_seconds=wait_seconds
    )
    return _evaluate(rows, model, code, output, calibrate=calibrate)[0]


def compare(
    input_paths: PathLike | Sequence[PathLike], *, models: tuple[ModelSource | PathLike, ModelSource | PathLike],
    output_path: PathLike, args: QAEvalArgs | Mapping[str, Any] | None = None, scaling: ScalingConfig | None = None,
    trust_remote_code: bool = False, allow_untrained_head: bool = False,
    storage_options: Mapping[str, object] | None = None, wait_seconds: float | None = None,
) -> ComparedModels:
    """Two models on the same labelled rows: what the second gains over the first, and whether that may be chance.

    Each model is evaluated once, as `evaluate` does it; the parts of the second are paired with the details of the
    first by the workers. Memory does not grow with the input.

    Args:
        models: the first (a) and the second (b); as ``model`` of `evaluate`.
        output_path: a folder for compare.json, compare.html, details/part-*.parquet (one line per row, schema
            `comparison.PAIRS`), and the evaluations themselves in a/ and b/; an earlier comparison in it is replaced.

    Raises: as `evaluate`.
    """
    args = QAEvalArgs.of(args)
    code = _Trust(trust_remote_code, allow_untrained_head)
    if len(models) != 2:
        raise OptionError(f"models names {len(models)} models; allowed: two")
    first, second = (_checked_model(model, args, code, storage_options) for model in models)
    output = locate(output_path, storage_options=storage_options)
    rows = _check_rows(
        input_paths, args, output, scaling, storage_options, not_beside=FIGURES_NAME, wait_seconds=wait_seconds
    )
    for name in (COMPARISON_REPORT_NAME, COMPARISON_NAME):
        (output / name).delete()
    _remove_details(output / DETAILS_NAME)
    done_a, _ = _evaluate(rows, first, code, output / "a")
    paired_with = _Paired(output / "a" / DETAILS_NAME, output / DETAILS_NAME)
    done_b, found = _evaluate(rows, second, code, output / "b", paired_with=paired_with)
    if found.num_rows != done_b.result.num_rows:
        raise WorkError(f"{found.num_rows} of {done_b.result.num_rows} rows were compared")
    done = ComparedModels(
        a=done_a.result, b=done_b.result, exact_match=found.exact_match, f1=found.f1,
        num_contexts=found.num_contexts, precision=rows.precision, workers=rows.workers, output_path=output.uri,
    )
    figures = compared_to_json(done) | {
        "model_a": first.name, "model_b": second.name, "input": _describe_input(rows.index),
        "normalization": args.normalization, "language": args.language, "version": ray_qa.__version__,
    }
    (output / COMPARISON_REPORT_NAME).publish(report.render_comparison(figures, found.won, found.lost).encode())
    (output / COMPARISON_NAME).publish(json_text(figures, indent=1).encode())
    return done


class _Trust(NamedTuple):
    """What the caller allows a model."""

    trust_remote_code: bool
    allow_untrained_head: bool


class _Paired(NamedTuple):
    """Where the details of the first model are, and where those of both go."""

    first: Location
    details: Location


@dataclass(frozen=True)
class _Rows:
    """Labelled rows that were checked, and the workers for them."""

    index: CSVIndex
    extra_columns: tuple[str, ...]
    labels: LabelReport
    args: QAEvalArgs
    workers: cluster.Workers
    precision: str
    shared: ray.ObjectRef[pa.Table] | None


def _checked_model(
    model: ModelSource | PathLike, args: QAEvalArgs, code: _Trust, storage_options: Mapping[str, object] | None
) -> ModelSource:
    from ray_qa.engine import checked_window_maker
    from ray_qa.model import as_source, load_tokenizer

    source = as_source(
        model, trust_remote_code=code.trust_remote_code, allow_untrained_head=code.allow_untrained_head,
        storage_options=storage_options,
    )
    tokenizer, longest = load_tokenizer(source.directory, trust_remote_code=code.trust_remote_code)
    checked_window_maker(tokenizer, args, model_max_length=longest)
    return source


def _check_rows(
    input_paths: PathLike | Sequence[PathLike], args: QAEvalArgs, output: Location | None,
    scaling: ScalingConfig | None, storage_options: Mapping[str, object] | None, *, not_beside: str,
    wait_seconds: float | None,
) -> _Rows:
    """All that can be wrong with input, labels and folder is found here, before any work is done."""
    index = reading.index_input(
        input_paths, required_columns=schema.TRAIN_COLUMNS, delimiter=args.delimiter, storage_options=storage_options,
        wait_seconds=wait_seconds,
    )
    extra = _answers_column(index)
    with usable_folder(output):
        if output is not None:
            _refuse_other_output(output, not_beside)
        cluster.connect()
        workers = cluster.prediction_workers(scaling, at_most=index.num_parts, wait_seconds=wait_seconds)
        cluster.wait_for_a_node(wait_seconds)
        preflight.check_nodes(inputs=[file.location for file in index.files], outputs={"output": output})
        labels = check_label_rows(
            index, args.handle_impossible_answer, args.max_bad_rows, extra_columns=extra, quarantine=output
        )
        cluster.wait_for_one(workers, wait_seconds)  # no GPU is asked for before the labels are known to be good
        precision = cluster.resolve_precision(args.precision, workers.device)
    shared = _find_shared(index, args, extra) if args.share_answers else None
    return _Rows(index, extra, labels, args, workers, precision, shared)


def _refuse_other_output(output: Location, not_beside: str) -> None:
    """Raise OutputError where ``output`` holds answers of test(), or the figures named ``not_beside``."""
    kinds = {not_beside: "a comparison" if not_beside == COMPARISON_NAME else "an evaluation"}
    kinds |= dict.fromkeys((results.PLAN_NAME, results.MANIFEST_NAME), "answers of test")
    for info in output.list():
        name = info.base_name
        what = kinds.get(name, "answers of test" if name.startswith("part-") and name.endswith(".parquet") else None)
        if what is not None:
            raise OutputError(
                f"{output.uri}: the folder already holds {what} ({name!r}); allowed: an empty or new folder, or the "
                f"folder of an earlier {'evaluation' if not_beside == COMPARISON_NAME else 'comparison'}, which is "
                "replaced"
            )


def _evaluate(
    rows: _Rows, model: ModelSource, code: _Trust, output: Location | None, *, calibrate: bool = False,
    paired_with: _Paired | None = None,
) -> tuple[Evaluation, comparison.Comparison]:
    """Evaluate one model on checked rows; the comparison is empty without ``paired_with``."""
    args, index, workers, precision = rows.args, rows.index, rows.workers, rows.precision
    logger.info(
        "eval: %d rows in %d parts; %s; precision %s; model %s", index.num_rows, index.num_parts, workers, precision,
        model.name,
    )
    scorer = Scorer(args, None if output is None else output / DETAILS_NAME, calibrate, rows.shared, paired_with)
    job = Job(
        index=ray.put(index), model=model_transfer.share_directory(model.directory, model.digest), options=args,
        precision=precision, device=workers.device, threads=workers.threads, reducer=scorer,
        extra_columns=rows.extra_columns, trust_remote_code=code.trust_remote_code,
        allow_untrained_head=code.allow_untrained_head,
    )
    if output is not None:
        _remove_earlier(output)
    statistics = RunStatistics()
    parts: dict[int, Scores] = {}
    # Whole numbers, which need not wait for their turn: only a few figures are kept per part.
    summary, thresholds, sample = slices.Summary(), NullThresholds(), calibration.Sample()
    compared = comparison.Comparison()
    for part in run_parts(job, index, range(index.num_parts), workers):
        statistics.add(part)
        scored: PartScores = part.reduced
        parts[part.first_row] = scored.scores
        summary += scored.summary
        thresholds += scored.thresholds
        sample += scored.sample
        compared += scored.compared
    scores = sum((parts[first_row] for first_row in sorted(parts)), Scores())
    result = _result(scores, thresholds, rows.labels, statistics.num_errors)
    done = Evaluation(result, precision, workers, statistics, None if output is None else output.uri)
    if output is not None:
        results.check_part_names(output / DETAILS_NAME, parts)
        figures = done_to_json(done) | {
            "model": model.name, "input": _describe_input(index), "normalization": args.normalization,
            "language": args.language, "version": ray_qa.__version__,
        } | summary.to_json()
        too_little: InputError | None = None
        if calibrate:
            try:
                figures["calibration"] = _calibrate(sample, result, model, output, args, precision)
            except InputError as error:
                too_little = error  # the figures are worth keeping all the same
        (output / REPORT_NAME).publish(report.render(figures, summary.worst).encode())
        (output / FIGURES_NAME).publish(json_text(figures, indent=1).encode())
        if too_little is not None:
            raise too_little
    return done, compared


def _find_shared(index: CSVIndex, args: QAEvalArgs, extra: tuple[str, ...]) -> ray.ObjectRef[pa.Table] | None:
    """The right answers of rows that repeat, in Ray's object store; None where no row does."""
    columns = schema.TRAIN_COLUMNS + extra
    find = partial(_keys_of_part, args.handle_impossible_answer)
    wanted = golds.repeated(reading.map_parts(find, index, columns=columns))
    if not len(wanted):
        return None
    gather = partial(_golds_of_part, args.handle_impossible_answer, ray.put(wanted))
    found = dict(reading.map_parts(gather, index, columns=columns))
    table = golds.shared_golds(pair for first_row in sorted(found) for pair in found[first_row])
    logger.info("eval: %d questions stand in several rows, which share their right answers", len(table))
    return ray.put(table)


def _usable(handle_impossible_answer: bool, table: pa.Table) -> tuple[pa.Table, golds.KeyArray]:
    """A part's rows with usable labels, as the workers see them, and their keys."""
    table = labelled_rows(table, handle_impossible_answer)
    return table, golds.row_keys(table[schema.CONTEXT].to_pylist(), table[schema.QUESTION].to_pylist())


def _keys_of_part(handle_impossible_answer: bool, table: pa.Table) -> npt.NDArray[np.uint64]:
    return golds.short_keys(_usable(handle_impossible_answer, table)[1])


def _golds_of_part(
    handle_impossible_answer: bool, wanted: ray.ObjectRef[npt.NDArray[np.uint64]], table: pa.Table
) -> tuple[int, list[tuple[bytes, list[str]]]]:
    first_row = table[schema.ROW_INDEX][0].as_py()
    rows, keys = _usable(handle_impossible_answer, table)
    found = golds.select_repeated(keys, ray.get(wanted)).tolist()
    raw = keys.tobytes()  # an element of the array would lose zeros at its end
    answers = golds_of(rows)
    return first_row, [(raw[16 * row : 16 * row + 16], answers[row]) for row in found]


def _calibrate(
    sample: calibration.Sample, result: EvalResult, model: ModelSource, output: Location, args: QAEvalArgs,
    precision: str,
) -> dict[str, Any]:
    """Fit a calibration, write it, and return it with the points of its curve."""
    found, measured = calibration.calibrate(sample)
    stored = calibration.to_json(found, measured, result.best_f1_threshold, calibration.steps_of(sample)) | {
        "model_digest": model.digest, "options": answer_options(args), "precision": precision,
    }
    data = json.dumps(stored).encode()
    (output / CALIBRATION_NAME).publish(data)
    if os.path.isdir(os.path.expanduser(model.name)):  # and not the hub's cache
        try:
            (locate(model.directory) / CALIBRATION_NAME).publish(data)
        except OutputError as error:
            logger.warning("calibration.json is only in %s: %s", output.uri, error)
    score = np.linspace(0, 1, 51)
    del stored["steps"]  # the page and eval.json do without
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


def compared_to_json(done: ComparedModels) -> dict[str, Any]:
    """The figures of a comparison; those of the two evaluations under ``a`` and ``b``."""
    return {
        "num_rows": done.a.num_rows, "num_contexts": done.num_contexts,
        "exact_match_difference": done.exact_match._asdict(), "f1_difference": done.f1._asdict(),
        "a": dataclasses.asdict(done.a), "b": dataclasses.asdict(done.b), "precision": done.precision,
        "num_workers": done.workers.num_workers, "device": done.workers.device,
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
    _remove_details(output / DETAILS_NAME)


def _remove_details(details: Location) -> None:
    for name in results.part_sizes(details):
        (details / name).delete()


@dataclass(frozen=True)
class PartScores:
    """What one part comes down to. ``thresholds`` is empty without ``handle_impossible_answer``, ``summary`` without
    an output folder, ``sample`` without ``calibrate``, ``compared`` without another model."""

    scores: Scores
    thresholds: NullThresholds
    summary: slices.Summary
    sample: calibration.Sample
    compared: comparison.Comparison


@dataclass(frozen=True)
class Scorer:
    """Reduces the labelled rows of a part and the engine's output; publishes the part's details, where asked for."""

    args: QAEvalArgs
    details: Location | None = None
    calibrate: bool = False
    shared: ray.ObjectRef[pa.Table] | None = None
    """Right answers of rows that repeat, see `golds`."""
    paired_with: _Paired | None = None

    def __call__(self, part: Part, table: pa.Table, output: EngineOutput) -> PartScores:
        answers = golds_of(table)
        if self.shared is not None:
            keys = golds.row_keys(table[schema.CONTEXT].to_pylist(), table[schema.QUESTION].to_pylist())
            answers = golds.add_shared(answers, keys, ray.get(self.shared))
        rows = self.score(output.predictions, answers)
        scores = _sums(rows, output)
        thresholds, summary, sample = NullThresholds(), slices.Summary(), calibration.Sample()
        compared = comparison.Comparison()
        text_rows = rows
        if self.args.handle_impossible_answer:
            assert output.text_predictions is not None
            text_rows = self.score(output.text_predictions, answers)
            # A row without windows is answered "" whatever the threshold.
            null = np.clip(np.nan_to_num(output.null_score, nan=1.0), 0.0, 1.0)
            thresholds = NullThresholds.of(null, output.text_predictions["answer"].to_pylist(), text_rows)
        if self.details is not None:
            details = self.details_of(table, output, answers, rows, text_rows)
            summary = slices.Summary.of(details, table[schema.CONTEXT].to_pylist())
            sample = calibration.Sample.of(details) if self.calibrate else sample
            publish_table(details, self.details / results.part_name(part.first_row))
            if self.paired_with is not None:
                compared = _pair(self.paired_with, results.part_name(part.first_row), details, table)
        return PartScores(scores, thresholds, summary, sample, compared)

    def score(self, predictions: pa.Table, right: Sequence[Sequence[str]]) -> list[RowScore]:
        options: dict[str, Any] = {"normalization": self.args.normalization, "language": self.args.language}
        answers = predictions["answer"].to_pylist()
        return [score_row(answer, some, **options) for answer, some in zip(answers, right, strict=True)]

    def details_of(
        self, table: pa.Table, output: EngineOutput, right: list[list[str]], rows: list[RowScore],
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
            "golds": right,
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


def _pair(paired: _Paired, name: str, details: pa.Table, table: pa.Table) -> comparison.Comparison:
    """Pair a part's details with those of the other model, publish the pairs, and reduce them."""
    first = pq.read_table(pa.BufferReader((paired.first / name).read_bytes()))
    pairs = comparison.pairs_of(first, details)
    publish_table(pairs, paired.details / name)
    contexts, starts, ends = table[schema.CONTEXT], details["answer_start"], details["answer_end"]

    def pieces(row: int) -> comparison.Pieces:
        return slices.marked(contexts[row].as_py(), (starts[row].as_py(), ends[row].as_py()), (0, 0))

    return comparison.Comparison.of(pairs, pieces)


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
