"""Kill trainings at random moments, and compare the weights that come out with those of a training left alone.

    python benchmarks/training_kills.py --runs 20                   # worker, process, node, driver in turn, and elastic
    python benchmarks/training_kills.py --runs 3 --kinds worker,driver,elastic

On two local nodes of one CPU each, two workers train a tiny model in float64 without dropout, with a checkpoint every
few steps. In every run, at a random step, a SIGKILL hits

* worker: a training worker,
* process: any process that Ray started for the training on either node,
* node: the raylet of the second node, which is replaced; the training waits for it,
* driver: the process that called `train`, which is then called again,
* elastic: the second node, with num_workers=(1, 2): the training goes on with one worker, and with two again where the
  node is replaced.

With two workers all the time the weights must be those of the reference bit by bit; after a change of the number of
workers they may differ by 1e-9. One JSON line a run, and one with the totals; exit code 1 where weights differ by more.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(REPOSITORY))

from benchmarks.kills import TwoNodes, descendants  # noqa: E402

KINDS = ("worker", "process", "node", "driver", "elastic")
SAVE_STEPS = 10
TOLERANCE = 1e-9


def make_inputs(folder: Path, num_rows: int = 200) -> tuple[Path, Path]:
    """A tiny model without dropout, and labelled rows."""
    from examples.tiny_model import make_model

    model = folder / "model"
    make_model(model, REPOSITORY / "examples" / "train.csv")
    config = json.loads((model / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (model / "config.json").write_text(json.dumps(config))
    rows = folder / "rows.csv"
    with open(rows, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["context", "question", "answer_text", "answer_start"])
        for i in range(num_rows):
            context = f"{'much was said and little done. ' * (i % 5)}The house number of Anna is {100 + i}."
            writer.writerow([context, "what is the house number?", 100 + i, context.index(str(100 + i))])
    return model, rows


class Training:
    """A process that calls `ray_qa.train`, and what it leaves behind."""

    def __init__(self, address: str, folder: Path, output: Path, num_steps: int, *, elastic: bool) -> None:
        self.output, self.elastic = output, elastic
        self.log = output.with_suffix(".log")
        self.checkpoints = folder / "home" / "checkpoints"
        command = [
            sys.executable, __file__, "--drive", folder, "--output", output, "--steps", num_steps,
            *(["--elastic"] if elastic else []),
        ]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [os.fspath(part) if isinstance(part, Path) else str(part) for part in command],
                stdout=log, stderr=log, cwd=REPOSITORY, env=os.environ | {"RAY_ADDRESS": address},
            )

    def saved_step(self) -> int:
        """The newest checkpoint that is complete."""
        found = self.checkpoints.glob("*/step-*/checkpoint.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=0)

    def wait_for(self, step: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while self.saved_step() < step:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"step {step} never came (exit {self.process.poll()}): {self.log.read_text()}")
            time.sleep(0.01)

    def result(self, seconds: float) -> dict[str, Any]:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise RuntimeError(f"the training still ran after {seconds} s: {self.log.read_text()}") from None
        if code:
            raise RuntimeError(f"the training ended with {code}: {self.log.read_text()}")
        return dict(json.loads((self.output / "result.json").read_text()))


def drive(folder: Path, output: Path, num_steps: int, elastic: bool) -> None:
    """What the driver's process does."""
    import logging

    from ray.train import ScalingConfig

    from ray_qa import QATrainArgs, train

    logging.basicConfig(level=logging.INFO)
    workers: Any = (1, 2) if elastic else 2
    train(
        folder / "rows.csv", model=os.fspath(folder / "model"), output=output, dtype="float64",
        scaling=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1}),
        args=QATrainArgs(
            max_steps=num_steps, learning_rate=1e-3, weight_decay=0.1, batch_size=16, precision="fp32", report_to=(),
            save_steps=SAVE_STEPS, logging_steps=1, max_failures=20,
        ),
    )


def run_with_kill(
    kind: str, nodes: TwoNodes, folder: Path, output: Path, num_steps: int, pick: random.Random, seconds: float
) -> dict[str, Any]:
    """One training with one kill; what became of it."""
    training = Training(nodes.address, folder, output, num_steps, elastic=kind == "elastic")
    training.wait_for(SAVE_STEPS * pick.randint(1, num_steps // SAVE_STEPS * 2 // 3), seconds)
    time.sleep(pick.uniform(0, 0.1))
    killed, begin, at = kind, time.monotonic(), training.saved_step()
    if kind == "driver":
        training.process.kill()
        training.process.wait()
        training = Training(nodes.address, folder, output, num_steps, elastic=False)
    elif kind in ("node", "elastic"):
        nodes.kill_second()
        if kind == "node" or pick.random() < 0.5:
            time.sleep(pick.uniform(0, 3))
            nodes.replace_second()
            killed += ", replaced"
    else:
        found = descendants(nodes.raylets())
        victim = pick.choice(sorted(
            pid for pid, name in found.items()
            if "RayTrainWorker" in name or (kind == "process" and name.startswith("ray::") and "Agent" not in name)
        ))
        killed = found[victim].strip()
        os.kill(victim, signal.SIGKILL)
    try:
        result = training.result(seconds)
    except RuntimeError as error:
        if kind != "process":
            raise RuntimeError(f"after the kill of {kind} {killed}: {error}") from error
        # Whoever leads the training may have been hit: then the call fails, and the same call goes on.
        killed += ", called again"
        result = Training(nodes.address, folder, output, num_steps, elastic=False).result(seconds)
    if nodes.second.all_processes["raylet"][0].process.poll() is not None:
        nodes.replace_second()
    return {
        "kind": kind, "killed": killed, "saved_step_at_kill": at, "resumed_at_steps": result["resumed_at_steps"],
        "num_workers_at_end": result["num_workers"], "seconds_after": round(time.monotonic() - begin, 1),
    }


def difference(first: Path, second: Path) -> float:
    """The largest difference between two models' weights; 0.0 only where they are equal bit by bit."""
    from safetensors.numpy import load_file

    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys() and all(value.dtype == "float64" for value in one.values())
    found = 0.0
    for name, value in one.items():
        if value.tobytes() != other[name].tobytes():
            found = max(found, float(abs(value - other[name]).max()), 5e-324)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300, help="that one training may take")
    parser.add_argument("--drive", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--elastic", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive is not None:
        drive(options.drive, options.output, options.steps, options.elastic)
        return 0
    pick = random.Random(options.seed)
    kinds = options.kinds.split(",")
    folder = Path(tempfile.mkdtemp(prefix="ray_qa_training_kills_"))
    os.environ["RAY_QA_HOME"] = os.fspath(folder / "home")
    killed, largest = dict.fromkeys(kinds, 0), {"equal_workers": 0.0, "resized": 0.0}
    nodes = TwoNodes()
    try:
        make_inputs(folder)
        begin = time.monotonic()
        reference = folder / "reference"
        Training(nodes.address, folder, reference, options.steps, elastic=False).result(options.seconds)
        print(json.dumps({"kind": "none", "seconds": round(time.monotonic() - begin, 1)}), flush=True)
        for number in range(options.runs):
            kind = kinds[number % len(kinds)]
            output = folder / f"run-{number}"
            line = run_with_kill(kind, nodes, folder, output, options.steps, pick, options.seconds)
            line["difference"] = difference(output, reference)
            which = "resized" if kind == "elastic" else "equal_workers"
            largest[which] = max(largest[which], line["difference"])
            killed[kind] += 1
            print(json.dumps({"run": number} | line), flush=True)
            shutil.rmtree(output)
    finally:
        nodes.end()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps({"runs": options.runs, "steps_each": options.steps, "kills": killed, "largest": largest}))
    return 1 if largest["equal_workers"] > 0 or largest["resized"] > TOLERANCE else 0


if __name__ == "__main__":
    raise SystemExit(main())
