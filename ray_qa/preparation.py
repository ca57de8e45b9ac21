"""Labelled rows become feature shards, once, on Ray Data.

    parts -> rows -> label check -> windows -> Arrow files

One part of the input gives one shard: ``shard-<first row>.arrow``, an Arrow IPC *stream* of one record batch
with the columns of `windows.WINDOWS`, ``row_index`` (in the input) and ``length`` (tokens), which
`datasets.Dataset.from_file` opens memory-mapped. The folder's name is a hash of everything that its content
depends on (the input's bytes, tokenizer, options); ``_manifest.json``, written last, says that it is complete.
So the same input is never tokenized twice, a killed run goes on with the shards it lacks, and different inputs
never mix.

Knows nothing of models, steps or workers of a training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray

from ray_qa import cluster, held_out, preflight, schema
from ray_qa.bad_rows import refuse_bad_rows, write_quarantine
from ray_qa.csv_index import CSVIndex
from ray_qa.errors import BadRowsError, InputError
from ray_qa.labels import BadRow, LabelReport, check_labels
from ray_qa.options import QATrainArgs, allowance
from ray_qa.reading import index_input, map_parts
from ray_qa.results import prove_tiling
from ray_qa.storage import Location, PathLike, locate, usable_folder
from ray_qa.windows import PairTemplate, WindowMaker, Windows

if TYPE_CHECKING:
    from ray_qa.model import ModelSource

logger = logging.getLogger("ray_qa")

FORMAT = 3
MANIFEST = "_manifest.json"
SURVEY_NAME = "prepare.json"
#: Parts that a dry run looks at.
SAMPLE_PARTS = 20
_HISTOGRAM_STEP = 32
Facts = dict[str, Any]
_FACTS = b"ray_qa.facts"
_NAMED_ROWS = 10


@dataclass(frozen=True)
class Shard:
    """One feature file and what it was made of."""

    name: str
    first_row: int
    num_rows: int
    num_windows: int
    num_tokens: int
    num_bad: int
    """Rows that can have no windows."""
    num_bytes: int
    num_held_out: int = 0
    """Usable rows without windows here, because they are to be evaluated on."""


@dataclass
class PreparationReport:
    """What became of the rows: labels checked and repaired, and rows that cannot be cut into windows."""

    labels: LabelReport = dataclasses.field(default_factory=LabelReport)
    num_without_windows: int = 0
    without_windows: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    """The first of them: row_index and reason."""

    @property
    def num_bad(self) -> int:
        return self.labels.num_bad + self.num_without_windows

    def merge(self, other: PreparationReport) -> None:
        self.labels.merge(other.labels)
        self.num_without_windows += other.num_without_windows
        self.without_windows = sorted(self.without_windows + other.without_windows)[:_NAMED_ROWS]

    def describe(self, index: CSVIndex) -> str:
        told = self.labels.num_bad or self.labels.num_repaired
        lines = [self.labels.describe(index.locate_row)] if told else []
        if self.num_without_windows:
            lines.append(f"{self.num_without_windows:,} rows cannot be cut into windows")
            for row, why in self.without_windows:
                file, record = index.locate_row(row)
                lines.append(f"  {file}, record {record}: {why}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "counts": dict(self.labels.counts),
            "first_bad_rows": [list(row) for row in self.labels.first_bad_rows],
            "num_without_windows": self.num_without_windows,
            "without_windows": [list(row) for row in self.without_windows],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PreparationReport:
        report = cls(
            num_without_windows=value["num_without_windows"],
            without_windows=[(row, why) for row, why in value["without_windows"]],
        )
        report.labels.counts.update(value["counts"])
        report.labels.first_bad_rows = [BadRow(*row) for row in value["first_bad_rows"]]
        return report


@dataclass(frozen=True)
class Prepared:
    """The windows of a training input, ready to be opened by any worker."""

    folder: Location
    key: str
    template: PairTemplate
    max_seq_length: int
    doc_stride: int
    shards: tuple[Shard, ...]
    report: PreparationReport
    reused: bool
    held_out_limit: int | None = None
    """Which rows are held out, see `held_out`."""

    @property
    def num_rows(self) -> int:
        """Rows of the input."""
        return sum(shard.num_rows for shard in self.shards)

    @property
    def num_used_rows(self) -> int:
        """Rows that have windows."""
        return self.num_rows - self.report.num_bad - self.num_held_out_rows

    @property
    def num_held_out_rows(self) -> int:
        """Rows to be evaluated on in place."""
        return sum(shard.num_held_out for shard in self.shards)

    @property
    def num_windows(self) -> int:
        return sum(shard.num_windows for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)


@dataclass(frozen=True)
class _Plan:
    """What a task needs besides its rows; travels through the object store once per node."""

    maker: WindowMaker
    folder: Location
    key: str
    handle_impossible_answer: bool
    skip_bad_parts: bool
    seed: int = 0
    held_out_limit: int | None = None


def prepare(index: CSVIndex, maker: WindowMaker, args: QATrainArgs, home: Location) -> Prepared:
    """Make the feature shards of ``index``, or find those of an earlier run.

    Args:
        index: the input, with the columns of `schema.TRAIN_COLUMNS`.
        maker: the tokenizer and the window lengths.
        args: of these, what labels and bad rows may be.
        home: the folder under which shards are kept; every node must see it.

    Raises:
        BadRowsError: more rows are unusable than ``args.max_bad_rows`` allows; nothing is kept then.
        InputError: the input has no rows.
    """
    if index.num_rows == 0:
        files = ", ".join(file.location.uri for file in index.files)
        raise InputError(f"{files}: there is no row to train on, only a header; allowed: at least one row")
    limit = None if args.eval_ratio is None else _held_out_limit(index, args.seed, args.eval_ratio)
    key = content_key(index, maker, args, limit)
    folder = home / key
    prepared = _published(folder, key, maker, limit)
    if prepared is None:
        prepared = _prepare(index, maker, args, folder, key, limit)
    try:
        _refuse_bad_rows(prepared.report, index, args)
    except BadRowsError:
        # Shards of an input of which no row may be bad are of no use to anybody; others may be in another run's use.
        if args.max_bad_rows == 0:
            folder.filesystem.delete_dir(folder.path)
        raise
    if limit is not None and not (prepared.num_held_out_rows and prepared.num_windows):
        raise InputError(
            f"eval_ratio is {args.eval_ratio:g}, which leaves {prepared.num_held_out_rows:,} usable rows to evaluate "
            f"on and {prepared.num_windows:,} windows to train on; allowed: another eval_ratio or seed, or rows of "
            "their own to evaluate on"
        )
    return prepared


def _held_out_limit(index: CSVIndex, seed: int, ratio: float) -> int:
    """See `held_out.limit_of`; eight bytes a context come to the driver."""
    find = partial(_context_keys, seed)
    found = [np.zeros(0, np.uint64), *map_parts(find, index, columns=[schema.CONTEXT])]
    return held_out.limit_of(np.unique(np.concatenate(found)), ratio)


def _context_keys(seed: int, table: pa.Table) -> held_out.Keys:
    return np.unique(held_out.context_keys(table[schema.CONTEXT].to_pylist(), seed))


def keep_bad_rows(
    prepared: Prepared, index: CSVIndex, maker: WindowMaker, args: QATrainArgs, folder: Location
) -> None:
    """Write the rows that `prepare` let through without using them to `bad_rows.QUARANTINE_NAME` in ``folder``."""
    bad = [shard.first_row for shard in prepared.shards if shard.num_bad]
    write_quarantine(index, bad, folder, args.handle_impossible_answer, maker=maker)


def content_key(index: CSVIndex, maker: WindowMaker, args: QATrainArgs, held_out_limit: int | None = None) -> str:
    """A hash of all that decides the content of the shards: equal keys mean equal shards."""
    backend = maker.tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    parts = [
        str(FORMAT), index.digest, str(index.num_parts), backend.to_str(), repr(maker.template),
        str(maker.max_seq_length), str(maker.doc_stride), str(args.handle_impossible_answer),
        str(args.max_bad_rows == 0), "" if held_out_limit is None else f"{args.seed} {held_out_limit}",
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def shard_name(first_row: int) -> str:
    """The name of the shard that begins with this row: name order is CSV order."""
    return f"shard-{first_row:012d}.arrow"


def _published(folder: Location, key: str, maker: WindowMaker, held_out_limit: int | None) -> Prepared | None:
    """What a finished preparation left, if every shard is there in full."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes().to_pybytes())
    except FileNotFoundError:
        return None
    shards = tuple(Shard(**shard) for shard in manifest["shards"])
    # Workers make files of these names: they are ours, whatever stands in the file.
    if any(not isinstance(shard.first_row, int) or shard.name != shard_name(shard.first_row) for shard in shards):
        return None
    sizes = {info.base_name: info.size for info in folder.list()}
    if any(sizes.get(shard.name) != shard.num_bytes for shard in shards):
        return None
    report = PreparationReport.from_json(manifest["report"])
    if folder.is_local:
        os.utime(folder.path)  # used, see `storage.prune_cache`
    return Prepared(
        folder, key, maker.template, maker.max_seq_length, maker.doc_stride, shards, report, reused=True,
        held_out_limit=held_out_limit,
    )


def _prepare(
    index: CSVIndex, maker: WindowMaker, args: QATrainArgs, folder: Location, key: str, held_out_limit: int | None
) -> Prepared:
    folder.make_folder()
    cluster.connect()
    plan = _Plan(
        maker, folder, key, args.handle_impossible_answer, args.max_bad_rows == 0, args.seed, held_out_limit
    )
    function = partial(_make_shard_in_task, key, [ray.put(plan)])
    shards, report = [], PreparationReport()
    for facts, num_bytes in map_parts(function, index, columns=schema.TRAIN_COLUMNS):
        shards.append(Shard(**facts["shard"], num_bytes=num_bytes))
        report.merge(PreparationReport.from_json(facts["report"]))
    shards.sort(key=lambda shard: shard.first_row)
    prove_tiling(shards, index.num_rows)
    manifest = {
        "format": FORMAT, "key": key, "input": index.digest, "num_rows": index.num_rows,
        "shards": [dataclasses.asdict(shard) for shard in shards], "report": report.to_json(),
    }
    (folder / MANIFEST).publish(json.dumps(manifest, ensure_ascii=False).encode())
    return Prepared(
        folder, key, maker.template, maker.max_seq_length, maker.doc_stride, tuple(shards), report,
        reused=False, held_out_limit=held_out_limit,
    )


def _refuse_bad_rows(report: PreparationReport, index: CSVIndex, args: QATrainArgs) -> None:
    refuse_bad_rows(report.describe(index), report.num_bad, index, args.max_bad_rows)
    if report.num_bad or report.labels.num_repaired:
        logger.warning("%s", report.describe(index))


# --- the same without training ----------------------------------------------------------------------


@dataclass
class Survey:
    """What `prepare` would find in some parts of an input."""

    report: PreparationReport = dataclasses.field(default_factory=PreparationReport)
    lengths: Counter[int] = dataclasses.field(default_factory=Counter)
    """Windows by their length in tokens."""
    num_rows_in_many_windows: int = 0
    bad_parts: list[int] = dataclasses.field(default_factory=list)
    """First rows of the parts with bad rows."""

    def merge(self, other: Survey) -> None:
        self.report.merge(other.report)
        self.lengths.update(other.lengths)
        self.num_rows_in_many_windows += other.num_rows_in_many_windows
        self.bad_parts += other.bad_parts


def survey(
    input_paths: PathLike | Sequence[PathLike], *, model: ModelSource | PathLike, args: QATrainArgs | None = None,
    output: PathLike | None = None, dry_run: bool = False, trust_remote_code: bool = False,
    storage_options: Mapping[str, object] | None = None, wait_seconds: float | None = None,
) -> dict[str, Any]:
    """The label doctor and the plan of a training, without any training: asks for CPUs only.

    Args:
        input_paths: CSV files with the columns context, question, answer_text, answer_start.
        model: whose tokenizer cuts the windows.
        output: a folder for `SURVEY_NAME` and the bad rows (see `bad_rows.write_quarantine`).
        dry_run: look at `SAMPLE_PARTS` parts, evenly spread, and reckon windows and steps for all rows from them.
        wait_seconds: how long to wait for a node with CPUs, see `room.wait`.

    Returns:
        Counts by name. Those of labels, windows and lengths are over ``num_checked_rows``; ``estimated_windows`` and
        ``estimated_steps`` are for all rows (exact where all were checked). Bad rows are told, not refused.
    """
    from ray_qa.model import as_source, load_tokenizer

    args = QATrainArgs.of(args)
    index = index_input(
        input_paths, required_columns=schema.TRAIN_COLUMNS, delimiter=args.delimiter, storage_options=storage_options,
        wait_seconds=wait_seconds,
    )
    source = as_source(
        model, trust_remote_code=trust_remote_code, allow_untrained_head=True, storage_options=storage_options
    )
    tokenizer, longest = load_tokenizer(source.directory, trust_remote_code=trust_remote_code)
    maker = WindowMaker(
        tokenizer, max_seq_length=args.max_seq_length, doc_stride=args.doc_stride, pair_order=args.pair_order,
        model_max_length=longest,
    )
    folder = None if output is None else locate(output, storage_options=storage_options)
    with usable_folder(folder):
        cluster.connect()
        cluster.wait_for_a_node(wait_seconds)
        preflight.check_nodes(inputs=[file.location for file in index.files], outputs={"output": folder})
    wanted = range(index.num_parts)
    if dry_run and index.num_parts > SAMPLE_PARTS:
        wanted = np.unique(np.linspace(0, index.num_parts - 1, SAMPLE_PARTS).astype(np.int64)).tolist()
    logger.info(
        "prepare: %d rows in %d parts, %d parts to look at; tokenizer %s", index.num_rows, index.num_parts,
        len(wanted), source.name,
    )
    found = Survey()
    if index.num_parts:
        look = partial(_survey_part, maker, args.handle_impossible_answer)
        for part in map_parts(look, index, columns=schema.TRAIN_COLUMNS, parts=wanted):
            found.merge(part)
    if found.report.num_bad or found.report.labels.num_repaired:
        logger.warning("%s", found.report.describe(index))
    summary = _summary_of(found, index, maker, args)
    if folder is not None:
        write_quarantine(index, found.bad_parts, folder, args.handle_impossible_answer, maker=maker)
        (folder / SURVEY_NAME).publish(json.dumps(summary, indent=1).encode())
        summary["output"] = folder.uri
    return summary


def _summary_of(found: Survey, index: CSVIndex, maker: WindowMaker, args: QATrainArgs) -> dict[str, Any]:
    labels = found.report.labels
    checked, num_windows = labels.num_rows, sum(found.lengths.values())
    estimated = round(num_windows * index.num_rows / checked) if checked else 0
    steps = args.max_steps or math.ceil(args.num_train_epochs * -(-estimated // args.batch_size))
    histogram: Counter[int] = Counter()
    for length, count in found.lengths.items():
        histogram[-(-length // _HISTOGRAM_STEP) * _HISTOGRAM_STEP] += count
    return {
        "num_files": len(index.files), "num_rows": index.num_rows, "num_parts": index.num_parts,
        "num_checked_rows": checked, "exact": checked == index.num_rows,
        "num_usable_rows": checked - found.report.num_bad, "num_repaired_rows": labels.num_repaired,
        "num_bad_rows": found.report.num_bad, "label_counts": dict(sorted(labels.counts.items())),
        "num_questions_too_long": found.report.num_without_windows,
        "num_rows_in_many_windows": found.num_rows_in_many_windows,
        "num_windows": num_windows, "num_tokens": sum(length * count for length, count in found.lengths.items()),
        "window_lengths": {f"up to {length}": histogram[length] for length in sorted(histogram)},
        "max_seq_length": maker.max_seq_length, "doc_stride": maker.doc_stride,
        "estimated_windows": estimated, "estimated_steps": steps if estimated else 0,
        "train_would_refuse": not checked or found.report.num_bad == checked
        or found.report.num_bad > allowance(args.max_bad_rows, checked),
    }


def _survey_part(maker: WindowMaker, handle_impossible_answer: bool, table: pa.Table) -> Survey:
    first_row = table.column(schema.ROW_INDEX)[0].as_py()
    report, made, _ = _check_and_cut(maker, handle_impossible_answer, table)
    return Survey(
        report=report, lengths=Counter(made.lengths.tolist()),
        num_rows_in_many_windows=int(np.count_nonzero(np.bincount(made.row) > 1)) if made.num_windows else 0,
        bad_parts=[first_row] if report.num_bad else [],
    )


def _check_and_cut(
    maker: WindowMaker, handle_impossible_answer: bool, table: pa.Table, *, skip_bad: bool = False, seed: int = 0,
    held_out_limit: int | None = None,
) -> tuple[PreparationReport, Windows, int]:
    """The label report of a part, the windows of its usable rows, and how many of these rows are held out.

    With ``skip_bad`` a part that has bad rows gives no windows.
    """
    first_row = table.column(schema.ROW_INDEX)[0].as_py()
    check = check_labels(table, handle_impossible_answer=handle_impossible_answer)
    report = PreparationReport(LabelReport().add(check, table))
    usable = np.flatnonzero(check.usable)
    if skip_bad and len(usable) < len(table):
        usable = usable[:0]  # The input will be refused: only the totals matter any more.
    num_held_out = 0
    if held_out_limit is not None:
        away = held_out.is_held_out(table[schema.CONTEXT].to_pylist(), seed, held_out_limit)[usable]
        num_held_out, usable = int(away.sum()), usable[~away]
    chosen = table.take(pa.array(usable))
    made = maker.make(
        chosen.column(schema.CONTEXT).to_pylist(), chosen.column(schema.QUESTION).to_pylist(),
        answer_starts=check.answer_start[usable],
        answer_texts=[check.answer_text[row] for row in usable.tolist()],
    ).for_rows(usable)
    report.num_without_windows = len(made.errors)
    report.without_windows = sorted((first_row + row, why) for row, why in made.errors.items())[:_NAMED_ROWS]
    return report, made, num_held_out


# --- in the tasks -----------------------------------------------------------------------------------

_plans: dict[str, _Plan] = {}


def _make_shard_in_task(key: str, plan: list[ray.ObjectRef[_Plan]], table: pa.Table) -> tuple[Facts, int]:
    """`make_shard`; a process unpacks the tokenizer once, not once per part."""
    # The key says what is prepared, the reference also where it goes.
    place = f"{key} {plan[0].hex()}"
    if place not in _plans:
        _plans.clear()
        _plans[place] = ray.get(plan[0])
    return make_shard(_plans[place], table)


def make_shard(plan: _Plan, table: pa.Table) -> tuple[Facts, int]:
    """Publish the shard of one part, unless it is there already; gives its facts and its size in bytes.

    ``table`` holds the part's rows: row_index and `schema.TRAIN_COLUMNS`.
    """
    first_row = table.column(schema.ROW_INDEX)[0].as_py()
    target = plan.folder / shard_name(first_row)
    found = _read_facts(target, plan.key)
    if found is not None:
        return found
    report, made, num_held_out = _check_and_cut(
        plan.maker, plan.handle_impossible_answer, table, skip_bad=plan.skip_bad_parts, seed=plan.seed,
        held_out_limit=plan.held_out_limit,
    )
    shard = {
        "name": target.name, "first_row": first_row, "num_rows": len(table),
        "num_windows": made.num_windows, "num_tokens": int(made.lengths.sum()), "num_bad": report.num_bad,
        "num_held_out": num_held_out,
    }
    facts: Facts = {"key": plan.key, "shard": shard, "report": report.to_json()}
    data = _shard_bytes(made, first_row, facts)
    target.publish(data)
    return facts, data.size


def _shard_bytes(made: Windows, first_row: int, facts: Facts) -> pa.Buffer:
    table = made.to_table().replace_schema_metadata({_FACTS: json.dumps(facts, ensure_ascii=False).encode()})
    for name, values in ((schema.ROW_INDEX, first_row + made.row.astype(np.int64)), ("length", made.lengths)):
        column = pa.array(values)
        table = table.append_column(pa.field(name, column.type, nullable=False), column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        # One record batch, so that a column can be viewed without a copy.
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _read_facts(target: Location, key: str) -> tuple[Facts, int] | None:
    """Facts and size of a shard that an earlier attempt published."""
    info = target.info()
    if not info.is_file:
        return None
    with target.open_stream() as stream, pa.ipc.open_stream(stream) as reader:
        facts = json.loads((reader.schema.metadata or {}).get(_FACTS, b"{}"))
    return (facts, info.size) if facts.get("key") == key else None
