"""What a run of any size would take, reckoned from pieces that are measured here, in one process on one core.

    .venv/bin/python benchmarks/scale.py [--model FOLDER]                 # 1 TB, 1e9 rows, 64 GPUs
    .venv/bin/python benchmarks/scale.py --terabytes 0.1 --rows 100000000 --gpus 8 --windows-per-gpu 4000

The rows are those of benchmarks/pipeline.py, of about the wanted length. Measured: the index, parsing, making windows,
publishing parts, and what the driver holds for each part. Assumed, and to be given: windows/s of a GPU, the latency and
the rate of the store, Ray's time for a part. One JSON object: the pieces, then the model.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(REPOSITORY))
sys.path.insert(0, os.fspath(REPOSITORY / "benchmarks"))

NUM_ROWS = 60_000


def pieces(folder: Path, model: Path) -> dict[str, float]:
    import torch
    from pipeline import write_rows

    from ray_qa import results, schema
    from ray_qa.csv_index import index_csv
    from ray_qa.csv_parse import read_parts
    from ray_qa.engine import make_windows, window_maker
    from ray_qa.model import load_tokenizer
    from ray_qa.options import QATestArgs
    from ray_qa.results import PartFile
    from ray_qa.storage import locate

    os.environ["RAYON_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    path = folder / "rows.csv"
    write_rows(path, NUM_ROWS)
    size = path.stat().st_size

    def index() -> Any:
        return index_csv([locate(path)], required_columns=schema.TEST_COLUMNS, part_rows=10_000)

    found = index()
    seconds = min(_time(index) for _ in range(3))
    parse = min(_time(lambda: list(read_parts(found.files[0], found.parts(), schema.TEST_COLUMNS))) for _ in range(3))
    tables = [table for _, table in read_parts(found.files[0], found.parts(), schema.TEST_COLUMNS)]
    maker = window_maker(load_tokenizer(os.fspath(model))[0], QATestArgs())
    windows = [make_windows(tables[0], maker)]
    tokenize = min(_time(lambda: make_windows(tables[0], maker)) for _ in range(3))

    random_answers = random.Random(1)
    answers = _answers(32_768, random_answers)
    store = results.begin(locate(folder / "answers"), {"input": "x"})
    publish = min(_time(lambda: store.publish_part(answers, 0, 32_768)) for _ in range(5))
    part_bytes = (folder / "answers" / results.part_name(0)).stat().st_size

    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    # What a run keeps of every part until the end: its file's facts, and that it is waited for.
    kept = {i: PartFile(i, 32_768, 0, f"{i:032x}", 600_000) for i in range(10**9, 10**9 + 5_000)}
    waited_for = set(kept)
    driver = (tracemalloc.get_traced_memory()[0] - before) / len(waited_for)
    tracemalloc.stop()
    small = index_csv([locate(path)], required_columns=schema.TEST_COLUMNS, part_rows=4)
    return {
        "bytes_per_row": size / NUM_ROWS, "windows_per_row": windows[0].num_windows / len(tables[0]),
        "index_mb_per_core_second": size / seconds / 1e6, "parse_mb_per_core_second": size / parse / 1e6,
        "tokenize_rows_per_core_second": len(tables[0]) / tokenize,
        # What `preparation` keeps for a training: the windows, their row, their length.
        "shard_bytes_per_window": windows[0].to_table().nbytes / windows[0].num_windows + 12,
        "publish_ms_per_full_part": publish * 1e3, "answer_bytes_per_row": part_bytes / 32_768,
        "index_bytes_per_part": len(pickle.dumps(small)) / small.num_parts,
        "driver_bytes_per_part": driver,
        "manifest_bytes_per_part": len(json.dumps([10**9, 32_768, 0, "0" * 32, 600_000])) + 2,
    }


def _answers(num_rows: int, pick: random.Random) -> pa.Table:
    from ray_qa import schema

    words = [" ".join(f"word{pick.randrange(30_000)}" for _ in range(pick.randint(1, 4))) for _ in range(num_rows)]
    starts = np.array([pick.randrange(900) for _ in range(num_rows)])
    return pa.table({
        "row_index": np.arange(num_rows), "answer": words,
        "score": np.array([pick.random() for _ in range(num_rows)], np.float32), "start": starts,
        "end": starts + np.array([len(word) for word in words]), "error": pa.nulls(num_rows, pa.string()),
    }, schema=schema.PREDICTIONS)


def _time(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def model_of(told: argparse.Namespace, piece: dict[str, float]) -> dict[str, Any]:
    """Seconds, bytes and counts of the run; times of steps that run at the same time are not added up."""
    from ray_qa.csv_index import MAX_PART_BYTES, MAX_PART_ROWS, MIN_PART_ROWS, PARTS_WANTED

    size, rows, cores = told.terabytes * 1e12, told.rows, told.cores
    part_rows = min(max(-(-rows // PARTS_WANTED), MIN_PART_ROWS), MAX_PART_ROWS, int(MAX_PART_BYTES * rows / size))
    parts = -(-rows // part_rows)
    windows = rows * piece["windows_per_row"]
    per_part = piece["publish_ms_per_full_part"] / 1e3 * part_rows / MAX_PART_ROWS + 3 * told.latency_ms / 1e3
    gpu_rate = told.gpus * told.windows_per_gpu
    tokenizing = windows / piece["windows_per_row"] / piece["tokenize_rows_per_core_second"]
    reading = size / piece["parse_mb_per_core_second"] / 1e6
    network = size / (told.store_gbit * 1e9 / 8)
    gpu_seconds = windows / gpu_rate
    return {
        "parts": parts, "rows_per_part": part_rows, "windows": round(windows),
        "index_seconds": round(max(size / piece["index_mb_per_core_second"] / 1e6 / cores, network)),
        "check_seconds": round(max(reading / cores, network)),
        "gpu_seconds": round(gpu_seconds),
        "cores_to_feed_the_gpus": round((tokenizing + reading) / gpu_seconds, 1),
        "cores_to_feed_one_gpu": round((tokenizing + reading) / gpu_seconds / told.gpus, 2),
        "feeding_seconds_on_all_cores": round((tokenizing + reading) / cores),
        "ray_seconds_in_the_driver": round(parts * told.ray_ms / 1e3),
        "publishing_seconds_in_each_worker": round(parts / told.gpus * per_part),
        "index_mb": round(parts * piece["index_bytes_per_part"] / 1e6, 1),
        "manifest_mb": round(parts * piece["manifest_bytes_per_part"] / 1e6, 1),
        "driver_mb": round(parts * piece["driver_bytes_per_part"] / 1e6, 1),
        "output_gb": round(rows * piece["answer_bytes_per_row"] / 1e9, 1),
        # Index and check read chunks of 32 MiB and parts, the run parts again; a lookup for each, one PUT a part.
        "get_requests": round(size / (32 << 20)) + 2 * parts,
        "head_requests": round(size / (32 << 20)) + 2 * parts,
        "put_requests": parts + 4,
        # A training has every node stage all windows, and every worker hold their lengths.
        "training_disk_of_a_node_gb": round(windows * piece["shard_bytes_per_window"] / 1e9),
        "training_lengths_in_a_worker_gb": round(windows * 4 / 1e9, 1),
        "rows_per_second": round(rows / max(gpu_seconds, (tokenizing + reading) / cores, parts * told.ray_ms / 1e3)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--terabytes", type=float, default=1.0)
    parser.add_argument("--rows", type=int, default=10**9)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument("--cores", type=int, default=512, help="of the CPU nodes and the GPU nodes together")
    parser.add_argument("--windows-per-gpu", type=float, default=3_000, help="windows/s of one GPU; not measured here")
    parser.add_argument("--ray-ms", type=float, default=14, help="of the driver for a part, see benchmarks/pipeline.py")
    parser.add_argument("--latency-ms", type=float, default=30, help="of one request to the store")
    parser.add_argument("--store-gbit", type=float, default=100, help="what all nodes together read of the store")
    parser.add_argument("--model", type=Path, help="a folder with the tokenizer; by default that of the examples")
    told = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray_qa_scale_") as name:
        folder = Path(name)
        if told.model is None:
            from examples.tiny_model import make_model

            told.model = folder / "model"
            make_model(told.model, REPOSITORY / "examples" / "train.csv")
        measured = pieces(folder, told.model)
    model = model_of(told, measured)
    print(json.dumps({"pieces": {name: round(value, 2) for name, value in measured.items()}, "model": model}, indent=1))


if __name__ == "__main__":
    main()
