"""How fast questions are answered, beside Happy Transformer and the pipeline of transformers, on the same rows.

    .venv/bin/python benchmarks/prediction.py                        # everything: half an hour on 2 cores
    .venv/bin/python benchmarks/prediction.py --figures speed,gemm   # some of it; --help lists all

The peers (`happytransformer==3.0.1` with transformers 4.57 and this environment's release of torch) run in an
environment of their own, which is made under the cache home when it is first needed. The model is a DistilBERT-base
with random weights and the tokenizer of ``--tokenizer``; all runs of one figure take turns, and every figure is the
median of ``--repeats`` of them. Rows/s of ray_qa are those of `jobs.test` from the first part's beginning to the
last part's end, the peers' those of one call with the model loaded and warm.

Figures, one JSON line each:

    speed      rows/s of ray_qa in bf16 and in fp32, of Happy Transformer, of the pipeline at its best batch size
    workers    rows/s of two one-thread workers, and of one
    gemm       FLOPs of the forward pass (no padding) as a share of the best bf16 matrix product, in the same process
    tokenizing rows/s of the window maker, and of tokenizer(question, context, stride, offsets)
    decoding   time from logits to answers as a share of all
    accuracy   answers of --accuracy-model in bf16 that are the same text as in fp32; F1 of both

Only this file's first half runs in the peers' environment: no import of ray_qa at the top.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
PEERS = ("happytransformer==3.0.1", "transformers==4.57.*")
#: Rows x inner x columns of the matrix products whose best rate counts as the peak.
GEMMS = ((512, 768, 768), (1024, 768, 768), (1024, 768, 3072), (1024, 3072, 768), (2048, 768, 3072),
         (1024, 1024, 1024), (2048, 2048, 2048), (4096, 4096, 4096))
BATCH_SIZES = (1, 8)


def read_rows(path: Path, count: int | None) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))[:count]


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["context", "question"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def rate(call: Callable[[], Any], count: int) -> float:
    started = time.perf_counter()
    call()
    return count / (time.perf_counter() - started)


# In the peers' environment -----------------------------------------------------------------------


def peer(name: str, model: str, rows_file: str, batch_size: int) -> None:
    """Rows/s of one peer over the rows of a file, as a line of JSON."""
    rows = read_rows(Path(rows_file), None)
    warm_up = Path(rows_file).with_suffix(".warm.csv")
    write_rows(warm_up, rows[:8])
    if name == "happy":
        from happytransformer import HappyQuestionAnswering  # type: ignore[import-not-found]

        happy = HappyQuestionAnswering("DISTILBERT", model)
        happy.test(os.fspath(warm_up))
        found = rate(lambda: happy.test(rows_file), len(rows))
    else:
        from transformers import pipeline

        ask: Any = pipeline("question-answering", model=model, tokenizer=model, device="cpu")
        asked = [{"context": row["context"], "question": row["question"]} for row in rows]
        ask(asked[:8], batch_size=batch_size)
        found = rate(lambda: ask(asked, batch_size=batch_size), len(rows))
    print(json.dumps({"rows_per_second": found}))


def peers_python() -> Path:
    """The interpreter of the peers' environment, made when it is not there."""
    from importlib.metadata import version

    from ray_qa.storage import cache_home

    folder = cache_home() / "benchmark-peers"
    python = folder / "bin" / "python"
    ready = folder / "ready"
    if not ready.exists():
        print(f"making an environment for the peers in {folder}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        # The same release of torch as here, so that no build with CUDA is pulled where this one is without.
        torch = f"torch=={version('torch').partition('+')[0]}"
        subprocess.run([python, "-m", "pip", "install", "--quiet", torch, *PEERS], check=True)
        ready.touch()
    return python


def run_peer(name: str, model: Path, rows_file: Path, batch_size: int = 1) -> float:
    command = [peers_python(), __file__, "--peer", name, model, rows_file, str(batch_size)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["rows_per_second"]


# ray_qa ------------------------------------------------------------------------------------------


def make_model(folder: Path, tokenizer: Path) -> None:
    """A DistilBERT-base with random weights and a tokenizer that gives no token types."""
    import torch
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForQuestionAnswering

    torch.manual_seed(0)
    DistilBertForQuestionAnswering(DistilBertConfig(vocab_size=30522)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    # By this name transformers 4 and 5 know a tokenizer that gives no token types.
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "DistilBertTokenizer"}))


def run_job(options: argparse.Namespace, files: list[Path], precision: str, *flags: str) -> float:
    """Rows/s of jobs.test in a process of its own."""
    output = options.work / f"out-{time.time_ns()}"
    command = [
        sys.executable, "-m", "jobs.test", "--input", *map(os.fspath, files), "--model", os.fspath(options.model),
        "--output", os.fspath(output), "--precision", precision, *flags,
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])["rows_per_second"]


def copies(options: argparse.Namespace, count: int, pieces: int = 1) -> list[Path]:
    """The peers' rows ``count`` times, each time in so many files: a file is a part at least, and every worker needs
    some."""
    rows = read_rows(options.input, options.peer_rows)
    files = []
    for number in range(count * pieces):
        piece = number % pieces
        files.append(options.work / f"rows-{pieces}-{number}.csv")
        write_rows(files[-1], rows[piece * len(rows) // pieces : (piece + 1) * len(rows) // pieces])
    return files


def speed(options: argparse.Namespace) -> dict[str, Any]:
    few = options.work / "peer-rows.csv"
    write_rows(few, read_rows(options.input, options.peer_rows))
    bf16, fp32 = copies(options, 8), copies(options, 2, 4)
    probe = options.work / "probe-rows.csv"
    write_rows(probe, read_rows(options.input, 32))
    batch_size = max(BATCH_SIZES, key=lambda size: run_peer("pipeline", options.model, probe, size))
    runs: dict[str, Callable[[], float]] = {
        "ray_qa bf16": lambda: run_job(options, bf16, "bf16"),
        "Happy Transformer": lambda: run_peer("happy", options.model, few),
        "pipeline": lambda: run_peer("pipeline", options.model, few, batch_size),
        "ray_qa fp32": lambda: run_job(options, fp32, "fp32"),
    }
    found = in_turns(runs, options.repeats)
    ratios = {
        f"{ours} / {theirs}": round(found[ours] / found[theirs], 2)
        for ours in ("ray_qa bf16", "ray_qa fp32") for theirs in ("Happy Transformer", "pipeline")
    }
    return rounded(found) | {"batch_size of the pipeline": batch_size, "peer_rows": options.peer_rows} | ratios | {
        "bf16 / fp32": round(found["ray_qa bf16"] / found["ray_qa fp32"], 2)
    }


def workers(options: argparse.Namespace) -> dict[str, Any]:
    files = copies(options, 8)
    found = in_turns({
        f"{count} workers": lambda count=count: run_job(  # type: ignore[misc]
            options, files, "bf16", "--num-workers", str(count), "--cpus-per-worker", "1"
        )
        for count in (2, 1)
    }, options.repeats)
    return rounded(found) | {"2 / 1": round(found["2 workers"] / found["1 workers"], 3)}


def in_turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, float]:
    """The median of every run."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            found[name].append(run())
            took = time.perf_counter() - started
            print(f"    {name}: {found[name][-1]:.5g} (all of it {took:.0f} s)", file=sys.stderr, flush=True)
    return {name: statistics.median(values) for name, values in found.items()}


def rounded(found: dict[str, float]) -> dict[str, Any]:
    return {name: round(value, 2) for name, value in found.items()}


def loaded_engine(options: argparse.Namespace, precision: str = "bf16", model: Path | None = None) -> Any:
    import torch

    from ray_qa.engine import Engine
    from ray_qa.model import load_model

    torch.set_num_threads(1)  # as every worker has
    return Engine(load_model(model or options.model, device="cpu", precision=precision))


def table_of(rows: list[dict[str, str]]) -> Any:
    import pyarrow as pa

    columns = {name: [row[name] for row in rows] for name in ("context", "question")}
    return pa.table({"row_index": range(len(rows))} | columns)


def gemm(options: argparse.Namespace) -> dict[str, Any]:
    """One thread: forward passes over the rows, and the best matrix product, in turns."""
    import numpy as np
    import torch

    from ray_qa.batches import collate, split_by_tokens

    engine = loaded_engine(options)
    windows = engine.windows(table_of(read_rows(options.input, options.peer_rows)))
    template = engine.maker.template
    batches = [
        collate(windows, indices, template, template.pad_token_id, pad_to_multiple=16)
        for indices in split_by_tokens(windows.lengths, engine.tokens_per_batch)
    ]
    config = engine.qa_model.model.config
    tokens = windows.lengths.astype(np.float64)
    linear = config.n_layers * 2 * (4 * config.dim**2 + 2 * config.dim * config.hidden_dim)
    flops = float(tokens.sum()) * linear + float((tokens**2).sum()) * config.n_layers * 4 * config.dim
    padded = sum(batch["input_ids"].size for batch in batches)

    @torch.inference_mode()
    def forward() -> float:
        return rate(lambda: [engine.qa_model.forward(batch) for batch in batches], 1) * flops

    products = []
    for rows, inner, columns in GEMMS:
        one, other = torch.randn(rows, inner).bfloat16(), torch.randn(columns, inner).bfloat16()
        products.append((2.0 * rows * inner * columns, one, other))

    @torch.inference_mode()
    def peak() -> float:
        best = 0.0
        for size, one, other in products:
            for product in (lambda a=one, b=other: a @ b.T, lambda a=one, b=other: torch.nn.functional.linear(a, b)):
                product()
                best = max(best, *(rate(product, 1) * size for _ in range(5)))
        return best

    forward(), peak()
    found = in_turns({"forward": forward, "best matrix product": peak}, options.repeats)
    return {
        "forward TFLOP/s": round(found["forward"] / 1e12, 3),
        "best matrix product TFLOP/s": round(found["best matrix product"] / 1e12, 3),
        "share": round(found["forward"] / found["best matrix product"], 3),
        "padding": round(1 - float(tokens.sum()) / padded, 4),
        "tokens/s": round(found["forward"] / flops * float(tokens.sum())),
    }


def tokenizing(options: argparse.Namespace) -> dict[str, Any]:
    engine = loaded_engine(options)
    rows = read_rows(options.input, None)
    table, tokenizer = table_of(rows), engine.qa_model.tokenizer
    questions, contexts = [row["question"] for row in rows], [row["context"] for row in rows]

    def plain() -> None:
        tokenizer(
            questions, contexts, truncation="only_second", max_length=384, stride=128,
            return_overflowing_tokens=True, return_offsets_mapping=True,
        )

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a worker has one thread
    plain()
    found = in_turns({
        "ray_qa": lambda: rate(lambda: engine.windows(table), len(rows)),
        "tokenizer": lambda: rate(plain, len(rows)),
    }, max(options.repeats, 5))
    return rounded(found) | {"ratio": round(found["ray_qa"] / found["tokenizer"], 2)}


def decoding(options: argparse.Namespace) -> dict[str, Any]:
    """Everything but windows and forward passes: spans on the device, best windows, offsets, texts."""
    engine = loaded_engine(options)
    table = table_of(read_rows(options.input, options.peer_rows))
    elsewhere = {"seconds": 0.0}

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                elsewhere["seconds"] += time.perf_counter() - started

        return run

    engine.qa_model.forward = timed(engine.qa_model.forward)
    engine.windows = timed(engine.windows)
    engine.answer(table)

    def share() -> float:
        elsewhere["seconds"] = 0.0
        started = time.perf_counter()
        engine.answer(table)
        return 1 - elsewhere["seconds"] / (time.perf_counter() - started)

    found = in_turns({"share": share}, options.repeats)
    return {"share": round(found["share"], 4)}


def accuracy(options: argparse.Namespace) -> dict[str, Any]:
    from ray_qa.metrics import score_row

    rows = read_rows(options.input, None)
    texts, figures = {}, {}
    for precision in options.precisions.split(","):
        engine = loaded_engine(options, precision, options.accuracy_model)
        started = time.process_time()
        texts[precision] = engine.answer(table_of(rows)).predictions["answer"].to_pylist()
        scores = [score_row(text, [row["answer_text"]]).f1 for text, row in zip(texts[precision], rows, strict=True)]
        figures[precision] = {
            "f1": round(100 * statistics.fmean(scores), 3),
            "rows_per_processor_second": round(len(rows) / (time.process_time() - started), 1),
            "same_text_as_fp32": round(statistics.fmean(
                ours == exact for ours, exact in zip(texts[precision], texts["fp32"], strict=True)
            ), 4),
        }
    return figures


FIGURES = {
    "speed": speed, "workers": workers, "gemm": gemm, "tokenizing": tokenizing, "decoding": decoding,
    "accuracy": accuracy,
}


def main() -> None:
    if sys.argv[1:2] == ["--peer"]:
        name, model, rows_file, batch_size = sys.argv[2:]
        return peer(name, model, rows_file, int(batch_size))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", default=",".join(FIGURES), help="which, separated by commas")
    parser.add_argument("--input", type=Path, default=SHARED / "data" / "squad-eval.csv", help="labelled rows")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "models" / "minilm", help="a folder with one")
    parser.add_argument("--accuracy-model", type=Path, default=SHARED / "models" / "minilm-squad")
    parser.add_argument("--precisions", default="fp32,bf16", help="for accuracy; fp32 first")
    parser.add_argument("--peer-rows", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from ray_qa.storage import cache_home

    options.work = cache_home() / "benchmark-prediction"
    options.model = options.work / "distilbert-base-random"
    if not (options.model / "tokenizer.json").exists():
        make_model(options.model, options.tokenizer)
    if "speed" in options.figures:
        peers_python()
    for figure in options.figures.split(","):
        print(json.dumps({"figure": figure} | FIGURES[figure](options)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.fspath(REPOSITORY))
    main()
