"""How fast a training step is, and whether it learns as well: against `transformers.Trainer`, side by side.

    python benchmarks/training.py --rows squad-train.csv --tokenizer minilm                # windows/s, share of peak
    python benchmarks/training.py --rows squad-train.csv --tokenizer minilm --what ranks   # two workers against one
    python benchmarks/training.py --rows squad-train.csv --tokenizer minilm --what saving  # what checkpoints cost
    python benchmarks/training.py --rows squad-train.csv --what f1 --model minilm --eval-rows squad-eval.csv  # long

The first three train a random model of DistilBERT-base's shape. Measured is the loop that a worker of ray_qa runs
(sampler, padding, forward, backward, all-reduce, clipping, AdamW), without Ray's start; of the Trainer its own loop,
from one step's end to the next. What is compared runs in turns in one process, each on windows that stand for the whole
input: batches picked evenly from all batches sorted by size. One JSON object a figure, with every single measurement.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(REPOSITORY))
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as `training` has it for its workers

BATCH = 8


class Data:
    """All training windows of some CSV files, in memory."""

    def __init__(self, rows: str, tokenizer: str, *, token_types: bool) -> None:
        from ray_qa import schema
        from ray_qa.model import load_tokenizer
        from ray_qa.windows import WindowMaker

        loaded, longest = load_tokenizer(tokenizer)
        if not token_types:
            loaded.model_input_names = ["input_ids", "attention_mask"]
        maker = WindowMaker(loaded, max_seq_length=384, doc_stride=128, model_max_length=longest)
        table = _rows_of(rows)
        self.windows = maker.make(
            table[schema.CONTEXT].to_pylist(), table[schema.QUESTION].to_pylist(),
            answer_starts=table[schema.ANSWER_START].to_numpy(), answer_texts=table[schema.ANSWER_TEXT].to_pylist(),
        )
        self.template = maker.template
        self.tokenizer = loaded
        self.lengths = self.windows.lengths

    def batch(self, indices: np.ndarray, *, width: int | None = None) -> dict[str, np.ndarray]:
        from ray_qa.batches import collate

        return collate(
            self.windows, indices, self.template, self.template.pad_token_id, with_labels=True,
            pad_to_multiple=width or 1,
        )


def distilbert() -> Any:
    """A random model of DistilBERT-base's shape, 66 million parameters."""
    import torch
    from transformers import DistilBertConfig, DistilBertForQuestionAnswering

    torch.manual_seed(0)
    return DistilBertForQuestionAnswering(DistilBertConfig(vocab_size=30522))


def evenly(batches: list[np.ndarray], size: Callable[[np.ndarray], float], count: int) -> list[np.ndarray]:
    """``count`` of the batches that stand for all: picked at even distances from the sorted ones."""
    order = sorted(batches, key=size)
    places = (np.arange(count) + 0.5) / count * len(order)
    return [order[int(place)] for place in places]


class Ours:
    """The loop of one worker of ray_qa."""

    def __init__(
        self, data: Data, model: Any, *, precision: str, batch_size: int = BATCH, num_steps: int = 10_000
    ) -> None:
        from ray_qa.batches import TrainingSampler
        from ray_qa.flops import WindowFlops
        from ray_qa.model import default_attention, default_tokens_per_batch
        from ray_qa.optimization import Optimization
        from ray_qa.options import QATrainArgs

        self.data = data
        args = QATrainArgs(batch_size=batch_size)
        self.device = next(model.parameters()).device
        model.set_attn_implementation(default_attention(self.device))
        self.sampler = TrainingSampler(data.lengths, batch_size=batch_size, seed=1)
        self.optimization = Optimization(
            model, args, num_steps=num_steps, precision=precision,
            tokens_per_batch=default_tokens_per_batch(
                self.device, training=True, num_parameters=model.num_parameters()
            ),
        )
        self.flops_of = WindowFlops(model)
        self.steps = 0

    def batches(self, count: int) -> list[np.ndarray]:
        every = [self.sampler.batch(step) for step in range(self.sampler.num_windows // len(self.sampler.batch(0)))]
        return evenly(every, lambda batch: float(self.data.lengths[batch].sum()), count)

    def run(self, batches: list[np.ndarray], rank: int = 0, world_size: int = 1) -> list[float]:
        """Seconds of each step."""
        from ray_qa.batches import rank_slice

        seconds = []
        for batch in batches:
            begin = time.perf_counter()
            mine = rank_slice(batch, rank, world_size, self.data.lengths)
            self.optimization.step(
                self.steps, lengths=self.data.lengths[mine], rows=mine, num_windows=len(batch),
                make_batch=lambda at, mine=mine: self.data.batch(mine[at]),
            )
            self.steps += 1
            seconds.append(time.perf_counter() - begin)
        return seconds


def trainer_seconds(data: Data, model: Any, batches: list[np.ndarray], *, bf16: bool, padded: bool) -> list[float]:
    """Seconds of each step of `transformers.Trainer`, the first left out."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Order(torch.utils.data.Sampler):
        def __len__(self) -> int:
            return sum(map(len, batches))

        def __iter__(self) -> Any:
            return iter(np.concatenate(batches).tolist())

    class Ordered(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return Order()

    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    def collate(indices: list[int]) -> dict[str, Any]:
        arrays = data.batch(np.array(indices), width=384 if padded else None)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    with tempfile.TemporaryDirectory() as folder:
        Ordered(
            model=model, train_dataset=list(range(len(data.lengths))), data_collator=collate, callbacks=[Watch()],
            args=TrainingArguments(
                output_dir=folder, per_device_train_batch_size=BATCH, max_steps=len(batches), bf16=bf16,
                use_cpu=not torch.cuda.is_available(), save_strategy="no", report_to=[], disable_tqdm=True,
                logging_strategy="no", remove_unused_columns=False,
            ),
        ).train()
    return np.diff(ends).tolist()


def speed(options: argparse.Namespace) -> None:
    """Windows/s of ray_qa, and of the Trainer with run_qa's defaults and at its best."""
    import torch

    from ray_qa.flops import peak_flops
    from ray_qa.model import resolve_precision

    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = Data(options.rows, options.tokenizer, token_types=False)
    precision = resolve_precision("auto", device)
    ours = Ours(data, distilbert().to(device), precision=precision)
    mine = ours.batches(options.steps)
    shuffled = np.random.default_rng(0).permutation(len(data.lengths))
    mixed = [shuffled[at : at + BATCH] for at in range(0, len(shuffled) - BATCH, BATCH)]
    dynamic = evenly(mixed, lambda batch: float(data.lengths[batch].max()), max(options.steps // 5, 2))
    found: dict[str, list[float]] = {"ray_qa": [], "trainer, bf16, dynamic": [], "trainer, run_qa's defaults": []}
    shares, peaks = [], []
    ours.run(mine[-1:])  # warm up on the longest
    for _ in range(options.repeats):
        peak = peak_flops(device, seconds=1.0)
        seconds = sum(ours.run(mine))
        found["ray_qa"].append(sum(map(len, mine)) / seconds)
        flops = sum(ours.flops_of(data.lengths[batch]) for batch in mine)
        shares.append(flops / seconds / peak)
        peaks.append(peak)
        # The first step is not measured; it is a repeated one.
        timed = trainer_seconds(data, distilbert(), [dynamic[0], *dynamic], bf16=True, padded=False)
        found["trainer, bf16, dynamic"].append(BATCH * len(timed) / sum(timed))
        timed = trainer_seconds(data, distilbert(), mixed[:3], bf16=False, padded=True)
        found["trainer, run_qa's defaults"].append(BATCH * len(timed) / sum(timed))
    middle = {name: median(values) for name, values in found.items()}
    say({
        "what": "speed", "device": str(device), "threads": options.threads, "precision": precision,
        "mean_window": float(data.lengths.mean()), "windows_per_second": found, "median": middle,
        "times_trainer_defaults": middle["ray_qa"] / middle["trainer, run_qa's defaults"],
        "times_trainer_bf16_dynamic": middle["ray_qa"] / middle["trainer, bf16, dynamic"],
        "share_of_peak": shares, "median_share_of_peak": median(shares), "peak_tflops": [peak / 1e12 for peak in peaks],
    })


def ranks(options: argparse.Namespace) -> None:
    """Windows/s of two one-thread workers against one, global batch 64."""
    import torch

    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(options.repeats):
        for world_size in found:
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(_rank, args=(world_size, folder, options), nprocs=world_size)
                found[world_size].append(json.loads(Path(folder, "speed").read_text()))
    middle = {count: median(values) for count, values in found.items()}
    say({"what": "ranks", "batch_size": 64, "windows_per_second": found, "ratio": middle[2] / middle[1]})


def _rank(rank: int, world_size: int, folder: str, options: argparse.Namespace) -> None:
    import torch
    import torch.distributed as dist

    from ray_qa.model import resolve_precision

    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size)
    data = Data(options.rows, options.tokenizer, token_types=False)
    ours = Ours(data, distilbert(), precision=resolve_precision("auto", "cpu"), batch_size=64)
    batches = ours.batches(max(options.steps // 10, 2))
    ours.run(batches[:1], rank, world_size)
    seconds = sum(ours.run(batches, rank, world_size))
    if rank == 0:
        Path(folder, "speed").write_text(json.dumps(sum(map(len, batches)) / seconds))
    if world_size > 1:
        dist.destroy_process_group()


def saving(options: argparse.Namespace) -> None:
    """What a checkpoint every 60 s takes of the loop: the copy, and the slower steps while it is written."""
    import torch

    from ray_qa.checkpoints import CheckpointWriter
    from ray_qa.model import resolve_precision
    from ray_qa.storage import locate

    torch.set_num_threads(options.threads)
    data = Data(options.rows, options.tokenizer, token_types=False)
    model = distilbert()
    ours = Ours(data, model, precision=resolve_precision("auto", "cpu"))
    batch = ours.batches(3)[1]
    ours.run([batch] * 3)
    folder = Path(tempfile.mkdtemp(prefix="ray_qa_saving_"))
    plain, stalls = [], []
    try:
        writer = CheckpointWriter(locate(folder), keep=2)
        for number in range(options.repeats):
            usual = median(ours.run([batch] * 5))
            begin = time.perf_counter()
            writer.save(number + 1, {"model": model.state_dict(), "optimizer": ours.optimization.state()}, {})
            copied = time.perf_counter() - begin
            during = []
            while writer.busy:
                during += ours.run([batch])
            plain.append(usual)
            stalls.append({
                "copy": copied, "steps_while_writing": len(during),
                "slower_by": sum(during) - usual * len(during),
            })
        writer.close()
    finally:
        shutil.rmtree(folder)
    lost = median(one["copy"] + max(one["slower_by"], 0.0) for one in stalls)
    say({
        "what": "saving", "step_seconds": plain, "checkpoints": stalls, "lost_seconds": lost,
        "share_of_60_s": lost / 60,
    })


def f1(options: argparse.Namespace) -> None:
    """F1 on held-out rows after equal trainings, paired by seed. Takes about an hour on two cores."""
    import dataclasses

    import torch
    from transformers import AutoModelForQuestionAnswering

    from ray_qa.engine import Engine
    from ray_qa.evaluation import score_rows
    from ray_qa.model import load_model, resolve_precision, save_model
    from ray_qa.options import AnswerOptions

    torch.set_num_threads(options.threads)
    data = Data(options.rows, options.model, token_types=True)
    table = _rows_of(options.eval_rows)
    precision = resolve_precision("auto", "cpu")
    num_steps = options.epochs * -(-len(data.lengths) // BATCH)
    differences = []
    for seed in map(int, options.seeds.split(",")):
        figures = {}
        for name in ("ray_qa", "trainer"):
            torch.manual_seed(seed)
            loaded = load_model(options.model, device="cpu", precision=precision, for_training=True)
            if name == "ray_qa":
                ours = Ours(data, loaded.model, precision=precision, num_steps=num_steps)
                ours.optimization.args = dataclasses.replace(ours.optimization.args, seed=seed)
                ours.sampler = type(ours.sampler)(data.lengths, batch_size=BATCH, seed=seed)
                ours.run([ours.sampler.batch(step) for step in range(num_steps)])
            else:
                orders = np.random.default_rng(seed)
                shuffled = [orders.permutation(len(data.lengths)) for _ in range(options.epochs)]
                batches = [order[at : at + BATCH] for order in shuffled for at in range(0, len(order), BATCH)]
                trainer_seconds(data, loaded.model, batches, bf16=precision == "bf16", padded=False)
            with tempfile.TemporaryDirectory() as folder:
                save_model(loaded.model, loaded.tokenizer, folder)
                AutoModelForQuestionAnswering.from_pretrained(folder)
                engine = Engine(load_model(folder, device="cpu", precision="fp32"), AnswerOptions())
                figures[name] = score_rows(table, engine.answer(table, with_loss=True)).f1
        differences.append(figures["ray_qa"] - figures["trainer"])
        say({"what": "f1", "seed": seed, "f1": figures, "difference": differences[-1]})
    say({"what": "f1", "epochs": options.epochs, "mean_difference": float(np.mean(differences))})


def _rows_of(path: str) -> Any:
    from ray_qa import schema
    from ray_qa.csv_index import index_csv
    from ray_qa.csv_parse import read_part
    from ray_qa.prediction import labelled_rows
    from ray_qa.storage import locate

    index = index_csv([locate(path)], required_columns=schema.TRAIN_COLUMNS, part_rows=10**9)
    (part,) = index.parts()
    return labelled_rows(read_part(index.files[0], part), False)


def say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=["speed", "ranks", "saving", "f1"], default="speed")
    parser.add_argument("--rows", required=True, help="CSV with context, question, answer_text, answer_start")
    parser.add_argument("--tokenizer", help="a model folder; its tokenizer cuts the windows")
    parser.add_argument("--model", help="where --what f1 starts")
    parser.add_argument("--eval-rows", help="for --what f1")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--steps", type=int, default=30, help="of ray_qa in one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    {"speed": speed, "ranks": ranks, "saving": saving, "f1": f1}[options.what](options)


if __name__ == "__main__":
    main()
