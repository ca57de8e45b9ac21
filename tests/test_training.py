"""Training on Ray Train: the same model for any workers, a plain model folder, clear refusals."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.train import ScalingConfig
from safetensors.torch import load_file

from ray_qa import progress, schema
from ray_qa.batches import TrainingSampler, collate, rank_slice
from ray_qa.csv_index import CSVIndex, index_csv
from ray_qa.csv_parse import read_part
from ray_qa.engine import Engine
from ray_qa.errors import BadRowsError, InputError, OptionError, OutputError, WorkError
from ray_qa.evaluation import evaluate, score_rows
from ray_qa.folder_lock import FolderLock
from ray_qa.held_out import context_keys, limit_of
from ray_qa.labels import LabelReport
from ray_qa.model import ModelSource, load_model, load_tokenizer, resolve_model
from ray_qa.optimization import Optimization, num_steps_of
from ray_qa.options import AnswerOptions, QATrainArgs
from ray_qa.prediction import labelled_rows
from ray_qa.preparation import PreparationReport, Prepared, Shard, _Plan, make_shard, prepare
from ray_qa.prepared_windows import PreparedWindows
from ray_qa.storage import cache_home, locate
from ray_qa.training import train, train_windows
from ray_qa.windows import WindowMaker
from tests.test_reporters import events_in

Row = tuple[str, str, str, str]
TWO_ROWS: list[Row] = [
    ("October 31st is the date", "what is the date?", "October 31st", "0"),
    ("November 23rd is the date", "what is the date?", "November 23rd", "0"),
]
REPOSITORY = Path(__file__).resolve().parents[1]
TWO_WORKERS = ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1})


def rows_of(num_rows: int) -> list[Row]:
    rows = []
    for i in range(num_rows):
        context = f"{'much was said and little done. ' * (i % 5)}The house number of Anna is {100 + i}."
        rows.append((context, "what is the house number?", f"{100 + i}", str(context.index(str(100 + i)))))
    return rows


def write(path: Path, rows: Sequence[Row]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(schema.TRAIN_COLUMNS)
        writer.writerows(rows)
    return path


def index_of(folder: Path, num_rows: int) -> CSVIndex:
    path = write(folder / "rows.csv", rows_of(num_rows))
    return index_csv([locate(path)], required_columns=schema.TRAIN_COLUMNS, part_rows=10)


def maker_of(model: Path) -> WindowMaker:
    tokenizer, model_max_length = load_tokenizer(model)
    return WindowMaker(tokenizer, max_seq_length=32, doc_stride=4, model_max_length=model_max_length)


@pytest.fixture(scope="module")
def source(tiny_model: Path) -> ModelSource:
    return resolve_model(tiny_model, allow_untrained_head=True)


def prepared_here(model: Path, tmp_path: Path, num_rows: int) -> Prepared:
    """Shards of ten rows each, made in this process."""
    index = index_of(tmp_path, num_rows)
    maker = maker_of(model)
    folder = locate(tmp_path / "shards")
    plan = _Plan(maker, folder, "key", False, True)
    shards = []
    for part in index.parts():
        facts, num_bytes = make_shard(plan, read_part(index.files[0], part))
        shards.append(Shard(**facts["shard"], num_bytes=num_bytes))
    report = PreparationReport(LabelReport())
    return Prepared(
        folder, "key", maker.template, maker.max_seq_length, maker.doc_stride, tuple(shards), report,
        reused=False,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_every_window_once_per_epoch_for_any_number_of_ranks(
    world_size: int, tiny_model: Path, tmp_path: Path
) -> None:
    windows = PreparedWindows(prepared_here(tiny_model, tmp_path, 43))
    assert len(windows.lengths) > 43
    everything = [windows.select(np.array([i]))[0].input_ids.tobytes() for i in range(len(windows.lengths))]
    sampler = TrainingSampler(windows.lengths, batch_size=8, seed=5)
    for epoch in (0, 1):
        seen: list[bytes] = []
        rows: set[int] = set()
        for step in range(epoch * sampler.steps_per_epoch, (epoch + 1) * sampler.steps_per_epoch):
            batch = sampler.batch(step)
            for rank in range(world_size):
                mine, row_index = windows.select(rank_slice(batch, rank, world_size, windows.lengths))
                assert len(mine) == len(row_index)
                seen += [mine.select(np.array([i])).input_ids.tobytes() for i in range(len(mine))]
                rows |= set(row_index.tolist())
        assert sorted(seen) == sorted(everything)
        assert rows == set(range(43))


def test_selected_windows_come_in_the_order_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    windows = PreparedWindows(prepared_here(tiny_model, tmp_path, 35))
    order = np.random.default_rng(0).permutation(len(windows.lengths))[:20]
    mine, rows = windows.select(order)
    np.testing.assert_array_equal(mine.lengths, windows.lengths[order])
    for at, index in enumerate(order.tolist()):
        alone, row = windows.select(np.array([index]))
        np.testing.assert_array_equal(mine.select(np.array([at])).input_ids, alone.input_ids)
        assert rows[at] == row[0]


def kill_a_training_worker() -> int:
    """SIGKILL one training worker among this process' descendants; gives its pid."""
    parents, workers = {}, []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if b"RayTrainWorker" in (folder / "cmdline").read_bytes():
                workers.append(int(folder.name))
        except OSError:
            continue
    for pid in sorted(workers, reverse=True):
        ancestor = pid
        while ancestor > 1 and ancestor != os.getpid():
            ancestor = parents.get(ancestor, 1)
        if ancestor == os.getpid():
            os.kill(pid, signal.SIGKILL)
            return pid
    raise AssertionError("no training worker is running")


def train_in_process(
    prepared: Prepared, model: Path, args: QATrainArgs
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same training in this process alone, in float64."""
    loaded = load_model(model, device="cpu", precision="fp32", for_training=True)
    loaded.model.double()
    windows = PreparedWindows(prepared)
    sampler = TrainingSampler(windows.lengths, batch_size=args.batch_size, seed=args.seed)
    num_steps = num_steps_of(args, sampler.steps_per_epoch)
    optimization = Optimization(
        loaded.model, args, num_steps=num_steps, tokens_per_batch=256, make_inputs=loaded.inputs
    )
    losses = []
    template = prepared.template
    for step in range(num_steps):
        batch = sampler.batch(step)
        mine, rows = windows.select(batch)
        report = optimization.step(
            step, lengths=mine.lengths, rows=rows, num_windows=len(batch),
            make_batch=lambda at, mine=mine: collate(
                mine, at, template, template.pad_token_id, with_labels=True
            ),
        )
        losses.append(report.loss)
    return loaded.model.state_dict(), losses


@pytest.mark.usefixtures("ray_session")
class TestOnRay:
    def test_two_rows_train_by_default_and_give_a_plain_model_folder(
        self, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from transformers import AutoModelForQuestionAnswering, AutoTokenizer

        monkeypatch.setattr(progress, "_FIRST_LINE", 0.0)
        path = write(tmp_path / "two.csv", TWO_ROWS)
        output = tmp_path / "tuned"
        args = QATrainArgs(learning_rate=1e-3, num_train_epochs=12, logging_steps=5, precision="fp32")
        with caplog.at_level("INFO", logger="ray_qa"):
            result = train(path, model=str(tiny_model), args=args, output=output)
        assert caplog.messages[0].startswith("train: 2 rows in 1 parts; 1 ")
        assert [line for line in caplog.messages if "of 12 steps" in line and "loss " in line]
        assert (result.num_rows, result.num_used_rows, result.num_windows) == (2, 2, 2)
        assert (result.num_steps, result.num_train_epochs, result.num_workers) == (12, 12.0, 1)
        assert result.last_loss < result.first_loss / 2
        assert [line["step"] for line in result.history] == [5, 10]
        assert result.label_counts == {"ok": 2}
        assert result.evaluations == []
        model = AutoModelForQuestionAnswering.from_pretrained(output)
        assert AutoTokenizer.from_pretrained(output)("what?", "that")["input_ids"]
        assert (output / "model.safetensors").is_file()
        assert not list(output.glob("_*")), "something of the run was left"
        start = AutoModelForQuestionAnswering.from_pretrained(tiny_model)
        assert not torch.equal(model.qa_outputs.weight, start.qa_outputs.weight)
        assert json.loads((output / "result.json").read_text()) == result.to_json()

        # The same call again finds that it is done; another one keeps its hands off.
        stamp = (output / "model.safetensors").stat().st_mtime_ns
        again = train(path, model=str(tiny_model), args=args, output=output)
        assert again.was_finished and again.last_loss == result.last_loss
        assert (output / "model.safetensors").stat().st_mtime_ns == stamp
        with pytest.raises(OutputError, match="holds the model of another training"):
            train(path, model=str(tiny_model), args=QATrainArgs(num_train_epochs=1), output=output)

    def test_two_workers_one_of_them_killed_give_the_model_of_one_process(
        self, tiny_model: Path, source: ModelSource, tmp_path: Path
    ) -> None:
        """float64, no dropout, weight decay, partial batches, a last epoch cut short: weights and losses to 1e-9."""
        index = index_of(tmp_path, 43)
        args = QATrainArgs(
            learning_rate=1e-3, weight_decay=0.1, num_train_epochs=14.6, logging_steps=1, save_steps=7, max_failures=1
        )
        prepared = prepare(index, maker_of(tiny_model), args, locate(tmp_path / "windows"))
        folder = tmp_path / "checkpoints"
        killed: list[int] = []

        def kill_one() -> None:
            while not list(folder.glob("step-*/checkpoint.json")):
                time.sleep(0.01)
            killed.append(kill_a_training_worker())

        killer = threading.Thread(target=kill_one)
        killer.start()
        done = train_windows(
            prepared, source, args, scaling=TWO_WORKERS, precision="fp32", dtype="float64",
            checkpoint_folder=locate(folder),
        )
        killer.join()
        assert killed and done.journal.resumed_at_steps and done.journal.resumed_at_steps[0] % 7 == 0
        weights, losses = train_in_process(prepared, tiny_model, args)
        assert done.num_workers == 2 and done.num_steps == len(losses) == math.ceil(14.6 * done.steps_per_epoch) > 100
        assert [line["step"] for line in done.journal.lines] == list(range(1, done.num_steps + 1))
        np.testing.assert_allclose([line["loss"] for line in done.journal.lines], losses, rtol=0, atol=1e-9)
        trained = load_model(done.model.directory, device="cpu", precision="fp32", for_training=True).model.state_dict()
        for name, value in load_file(Path(done.model.directory, "model.safetensors")).items():
            assert value.dtype == torch.float64
            assert (value - weights[name]).abs().max() < 1e-9, name
            # The folder holds what load_model reads back as float32.
            assert (trained[name].double() - value).abs().max() < 1e-7, name
        shutil.rmtree(done.model.directory)

        # As after the death of the driver: a new call, another number of workers, the same folder.
        left = sorted(int(child.name.removeprefix("step-")) for child in folder.iterdir())
        last = (done.num_steps - 1) // 7 * 7
        assert left == [last - 7, last]
        shutil.rmtree(folder / f"step-{last:012d}")
        again = train_windows(
            prepared, source, args, scaling=ScalingConfig(num_workers=1), precision="fp32", dtype="float64",
            checkpoint_folder=locate(folder),
        )
        assert again.journal.resumed_at_steps[-1] == last - 7
        for name, value in load_file(Path(again.model.directory, "model.safetensors")).items():
            assert (value - weights[name]).abs().max() < 1e-9, name
        shutil.rmtree(again.model.directory)

    def test_watched_the_best_model_comes_out_and_its_story_stands_beside_it(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        """Contexts held out, steps too large for them, early stopping; card, curves and event files."""
        path = write(tmp_path / "rows.csv", rows_of(90))
        args = QATrainArgs(
            learning_rate=0.02, lr_scheduler_type="constant", max_steps=60, precision="fp32", eval_ratio=0.3,
            eval_steps=4, early_stopping_patience=2, logging_steps=4, max_seq_length=64, doc_stride=8,
        )
        result = train(path, model=str(tiny_model), args=args, output=tmp_path / "tuned")
        assert result.num_held_out_rows == 27 and result.num_used_rows == 63
        assert result.stopped_early and result.best is not None
        assert result.model_step == result.best["step"] == result.num_steps - 8 < 60
        assert [line["step"] for line in result.evaluations] == list(range(4, result.num_steps + 1, 4))
        assert min(line["loss"] for line in result.evaluations) == result.best["loss"]
        assert {line["num_rows"] for line in result.evaluations} == {27}
        assert 0 < result.share_of_peak < 1 and result.saving_seconds > 0

        # The very rows that were held out, and the very weights that were best.
        keys = context_keys([row[0] for row in rows_of(90)], args.seed)
        limit = limit_of(np.unique(keys), 0.3)
        held_out = [row for row, key in zip(rows_of(90), keys, strict=True) if key < limit]
        assert len(held_out) == 27
        index = index_csv([locate(write(tmp_path / "out.csv", held_out))], required_columns=schema.TRAIN_COLUMNS)
        loaded = load_model(tmp_path / "tuned", device="cpu", precision="fp32")
        engine = Engine(loaded, AnswerOptions(max_seq_length=64, doc_stride=8))
        table = labelled_rows(read_part(index.files[0], next(iter(index.parts()))), False)
        assert score_rows(table, engine.answer(table, with_loss=True)).loss == pytest.approx(
            result.best["loss"], rel=1e-5
        )

        card = (tmp_path / "tuned" / "README.md").read_text()
        assert "| trained on | rows.csv |" in card and str(tmp_path) not in card
        assert f"| step of this model | {result.model_step} |" in card
        assert (tmp_path / "tuned" / "training.png").read_bytes().startswith(b"\x89PNG")
        events = events_in(tmp_path / "tuned" / "runs")
        for kind, lines in (("train", result.history), ("eval", result.evaluations)):
            for name in ("loss", "windows_per_second" if kind == "train" else "f1"):
                told = [(step, values[f"{kind}/{name}"]) for step, values in events if f"{kind}/{name}" in values]
                assert told == [(line["step"], pytest.approx(line[name])) for line in lines]
        assert not list((cache_home() / "checkpoints").glob("*"))

    @pytest.mark.slow
    def test_after_the_death_of_the_driver_the_same_call_goes_on(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home, output = tmp_path / "home", tmp_path / "tuned"
        monkeypatch.setenv("RAY_QA_HOME", str(home))
        path = write(tmp_path / "rows.csv", rows_of(43))
        call = textwrap.dedent(f"""
            import ray
            from ray_qa.options import AnswerOptions, QATrainArgs
from ray_qa.prediction import labelled_rows
            from ray_qa.training import train

            def run(output, max_steps=100):
                return train(
                    {str(path)!r}, model={str(tiny_model)!r}, output=output,
                    args=QATrainArgs(learning_rate=1e-3, max_steps=max_steps, precision="fp32", save_steps=10),
                )
        """)
        address = ray.get_runtime_context().gcs_address
        start = f"ray.init(address={address!r}, log_to_driver=False)"
        driver = subprocess.Popen([sys.executable, "-c", f"{call}\n{start}\nrun({str(output)!r})"], cwd=REPOSITORY)
        try:
            while not list(home.glob("checkpoints/*/step-*/checkpoint.json")):
                assert driver.poll() is None, "the driver ended by itself"
                time.sleep(0.02)
        finally:
            driver.kill()
            driver.wait()
        assert not (output / "config.json").exists() and (output / "_run.json").exists()
        names: dict[str, Any] = {}
        exec(call, names)
        result = names["run"](output)
        assert result.resumed_at_steps and result.num_steps == 100
        assert (output / "config.json").exists() and not list(output.glob("_*"))
        assert not list(home.glob("checkpoints/*"))
        whole = names["run"](tmp_path / "whole")
        assert whole.resumed_at_steps == []
        assert whole.last_loss == pytest.approx(result.last_loss, abs=1e-5)

    @pytest.mark.slow
    def test_fewer_rows_than_workers_and_the_ranks_evaluate_like_eval(
        self, tiny_model: Path, tmp_path: Path
    ) -> None:
        path = write(tmp_path / "one.csv", TWO_ROWS[:1])
        # Three parts (of 256 rows) for two ranks.
        eval_path = write(tmp_path / "eval.csv", rows_of(600))
        args = QATrainArgs(learning_rate=1e-3, max_steps=2, precision="fp32")
        result = train(path, model=str(tiny_model), args=args, scaling=TWO_WORKERS, eval_paths=eval_path)
        assert (result.num_workers, result.num_windows, result.num_steps) == (2, 1, 2)
        assert [line["step"] for line in result.evaluations] == [1, 2]
        assert result.evaluations[0]["loss"] != result.evaluations[1]["loss"]
        outside = evaluate(eval_path, model=result.model_directory).result
        last = result.evaluations[-1]
        assert (last["num_rows"], outside.num_rows) == (600, 600)
        assert last["loss"] == pytest.approx(outside.loss, rel=1e-6)
        assert (last["exact_match"], last["f1"]) == (outside.exact_match, outside.f1)
        shutil.rmtree(result.model_directory)

    @pytest.mark.slow
    def test_a_loss_that_is_no_number_names_step_and_rows(self, tiny_model: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "two.csv", TWO_ROWS)
        args = QATrainArgs(learning_rate=1e30, num_train_epochs=5)
        with pytest.raises(WorkError, match=r"stopped at step [1-4] of 5: .*row_index\): 0, 1;"):
            train(path, model=str(tiny_model), args=args, output=tmp_path / "tuned")

    def test_bad_rows_stop_before_workers_start(self, tiny_model: Path, tmp_path: Path) -> None:
        path = write(tmp_path / "bad.csv", [*TWO_ROWS, ("a b", "q?", "nowhere", "0")])
        with pytest.raises(BadRowsError, match=r"bad\.csv, record 2, column answer_text"):
            train(path, model=str(tiny_model), output=tmp_path / "tuned")
        assert not (tmp_path / "tuned").exists()


@pytest.mark.slow
def test_weights_after_kills_are_those_of_a_training_left_alone() -> None:
    """A worker, a driver, a node that is replaced, and a node whose loss changes the number of workers."""
    command = [sys.executable, REPOSITORY / "benchmarks" / "training_kills.py", "--runs", "4"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [*command, "--kinds", "worker,driver,node,elastic"], env=environment, capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["kills"] == dict.fromkeys(
        ("worker", "driver", "node", "elastic"), 1
    )


@pytest.mark.parametrize(
    ("options", "eval_paths", "message"),
    [
        ({"eval_ratio": 0.5}, "rows.csv", "eval_ratio is 0.5 and there are rows of their own"),
        ({"eval_steps": 5}, None, "eval_steps is 5 and there are no rows to evaluate on"),
        ({"early_stopping_patience": 2}, None, "early_stopping_patience is 2 and there are no rows"),
    ],
)
def test_evaluations_that_cannot_be(
    options: dict[str, Any], eval_paths: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        train(tmp_path / "rows.csv", model="m", args=QATrainArgs.of(options), eval_paths=eval_paths)


def test_a_folder_is_one_trainings_at_a_time(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "two.csv", TWO_ROWS)
    with FolderLock(locate(tmp_path)), pytest.raises(OutputError, match="another job is at work in this folder"):
        train(path, model=str(tiny_model), output=tmp_path)


def test_what_cannot_be_an_output_is_refused_first(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "two.csv", TWO_ROWS)
    with pytest.raises(OutputError, match="cannot be used as an output folder"):
        train(path, model=str(tiny_model), output=path / "tuned")
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"is not empty \(found notes\.txt\)"):
        train(path, model=str(tiny_model), output=full)


@pytest.mark.usefixtures("ray_session")
def test_a_header_without_rows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no row to train on"):
        train(write(tmp_path / "none.csv", []), model=str(tiny_model))
