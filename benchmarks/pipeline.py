"""How fast rows go through everything but the model: read, parsed, (tokenized,) written, published, proven.

    .venv/bin/python benchmarks/pipeline.py                                         # small, a minute
    .venv/bin/python benchmarks/pipeline.py --rows 5000000                          # rows/s, driver memory
    .venv/bin/python benchmarks/pipeline.py --rows 5000000 --engine tokenize
    .venv/bin/python benchmarks/pipeline.py --rows 50000 --part-rows 1              # what a part costs
    .venv/bin/python benchmarks/pipeline.py --rows 20000 --workers 1,2,3            # the same content from all

Rows have 800 bytes or more, five questions to a context, quoted line breaks. In place of the model stands an engine
that answers "" to everything, after making the windows with ``--engine tokenize``. All else is what `predict` runs:
the index, the check of every record, the lock, the parts through Ray Data, the manifest. Each phase is measured; rows/s
are those of all phases together, and of the parts alone. ``driver_mb`` is the driver's peak resident memory above
what it had after its imports and `ray.init`, of which shared memory of the object store is a part. One JSON object a
run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(REPOSITORY))

if TYPE_CHECKING:
    from ray_qa.engine import EngineOutput
    from ray_qa.prediction import Job

WORDS = (
    "the of and in to a was is for as on with by that it from at his an were are which this also be had or has first "
    "their its new after but who not they have her she two been other when there all during into school time"
).split()
QUESTIONS = 5


def write_rows(path: Path, num_rows: int) -> None:
    pick = random.Random(7)
    # Contexts are put together from long stretches: the writing must not take longer than what is measured.
    stretches = [" ".join(pick.choices(WORDS, k=90)) for _ in range(500)]
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("id,context,question\n")
        for first in range(0, num_rows, QUESTIONS):
            context = f"No. {first}: {pick.choice(stretches)},\nthen \"\"{pick.choice(stretches)}\"\", they said."
            stream.writelines(
                f'{i},"{context}","What was {i} by then, and why?"\n'
                for i in range(first, min(first + QUESTIONS, num_rows))
            )


class NullEngine:
    """Answers "" to every row; with ``tokenize`` after making the windows."""

    def __init__(self, job: Job, tokenize: bool) -> None:
        from ray_qa.engine import window_maker
        from ray_qa.model import load_tokenizer
        from ray_qa.model_transfer import local_directory

        self._maker = None
        if tokenize:
            tokenizer, longest = load_tokenizer(os.fspath(local_directory(job.model)))
            self._maker = window_maker(tokenizer, job.options, model_max_length=longest)

    def answer(
        self, table: pa.Table, windows: Any = None, *, with_loss: bool = False, top_k: int = 1
    ) -> EngineOutput:
        from ray_qa import schema
        from ray_qa.engine import EngineOutput, make_windows

        if self._maker is not None and windows is None:
            windows = make_windows(table, self._maker)
        num_rows = len(table)
        zeros = pa.array(np.zeros(num_rows, np.int64))
        columns = [
            table[schema.ROW_INDEX], pa.array([""] * num_rows), pa.array(np.zeros(num_rows, np.float32)), zeros, zeros,
            pa.nulls(num_rows, pa.string()),
        ]
        count = np.zeros(num_rows, np.int64) if windows is None else np.bincount(windows.row, minlength=num_rows)
        return EngineOutput(
            predictions=pa.Table.from_arrays(columns, schema=schema.PREDICTIONS), loss_sum=None, num_windows=count,
            num_tokens=0, num_padded_tokens=0, null_score=np.full(num_rows, np.nan),
            context_length=np.zeros(num_rows, np.int64),
        )


def null_engine(job: Job) -> Any:
    return NullEngine(job, tokenize=False)


def tokenizing_engine(job: Job) -> Any:
    return NullEngine(job, tokenize=True)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(rows: Path, model: Path, output: Path, *, engine: str, part_rows: int | None, num_workers: int | None,
            baseline_mb: float) -> dict[str, Any]:
    import ray
    from ray.train import ScalingConfig

    from ray_qa import cluster, model_transfer, prediction, reading, results, schema
    from ray_qa.folder_lock import FolderLock
    from ray_qa.options import QATestArgs
    from ray_qa.storage import locate

    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[name] = round(now - clock, 3)
        clock = now

    index = reading.index_input(rows, required_columns=schema.TEST_COLUMNS, part_rows=part_rows)
    lap("index")
    scaling = None if num_workers is None else ScalingConfig(num_workers=num_workers)
    workers = cluster.prediction_workers(scaling, at_most=index.num_parts)
    job = prediction.Job(
        index=ray.put(index), model=model_transfer.share_directory(model, "benchmark"), options=QATestArgs(),
        precision="fp32", device="cpu", threads=1,
        make_engine=null_engine if engine == "null" else tokenizing_engine,
    )
    location = locate(output)
    location.make_folder()
    lap("start")
    with FolderLock(location) as lock:
        reading.check_records(index, schema.TEST_COLUMNS)
        lap("check")
        plan = {"benchmark": engine, "input": index.digest, "num_parts": index.num_parts}
        done = prediction.write_parts(job, index, workers, location, plan, lock=lock)
    lap("parts")
    driver_mb = peak_mb() - baseline_mb
    assert done.num_rows == index.num_rows == len(done.answers)
    total = sum(seconds.values())
    if part_rows is None:
        results.verify(output)
        lap("verify")
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(output.glob("part-*")):
        digest.update(path.read_bytes())
    return {
        "engine": engine, "rows": index.num_rows, "row_bytes": round(rows.stat().st_size / index.num_rows),
        "num_parts": index.num_parts, "workers": workers.num_workers, "seconds": seconds,
        "rows_per_second": round(index.num_rows / total),
        "rows_per_second_of_parts": round(index.num_rows / seconds["parts"]),
        "steady_rows_per_second": round(done.statistics.rows_per_second),
        "ms_per_part": round(1000 * done.statistics.seconds / index.num_parts, 2),
        "driver_mb": round(driver_mb), "manifest_bytes": (output / results.MANIFEST_NAME).stat().st_size,
        "content": digest.hexdigest(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--engine", choices=["null", "tokenize"], default="null")
    parser.add_argument("--part-rows", type=int)
    parser.add_argument("--workers", default="", help="such as 1,2,3; else what the cluster has")
    parser.add_argument("--folder", type=Path, help="for the rows and the answers; else a temporary one")
    options = parser.parse_args()
    import ray

    from examples.tiny_model import make_model
    from ray_qa import cluster, prediction  # noqa: F401  what a driver imports belongs to its baseline
    from ray_qa.engine import Engine  # noqa: F401

    home = Path(tempfile.mkdtemp(prefix="ray_qa_pipeline_", dir=options.folder))
    counts = [int(count) for count in options.workers.split(",") if count] or [None]
    try:
        make_model(home / "model", REPOSITORY / "examples" / "train.csv")
        write_rows(home / "rows.csv", options.rows)
        if max(count or 0 for count in counts) > (os.cpu_count() or 1):
            ray.init(num_cpus=max(count or 0 for count in counts), include_dashboard=False, log_to_driver=False)
        cluster.connect()
        baseline = peak_mb()
        contents = set()
        for count in counts:
            output = home / f"answers-{count}"
            found = measure(
                home / "rows.csv", home / "model", output, engine=options.engine, part_rows=options.part_rows,
                num_workers=count, baseline_mb=baseline,
            )
            contents.add(found["content"])
            print(json.dumps(found), flush=True)
            shutil.rmtree(output)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    return 0 if len(contents) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
