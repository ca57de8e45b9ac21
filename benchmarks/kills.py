"""Kills at random moments of a prediction, by SIGKILL, and what is left of the answers.

    .venv/bin/python benchmarks/kills.py --runs 60

A cluster of two nodes on this machine; in every run a job of its own, as a process of its own, and one kill:

    worker     a process that answers parts
    process    any worker process of Ray: one that answers parts, an idle one, the ledger of attempts, Ray Data's own
               actors (not a node's agents: their raylet dies with them, which is the kill of a node)
    node       the raylet of the second node, and with it all that runs there; another node is added later
    driver     the job itself; the same command is then started again

After each run the answers are compared, row by row, with those of a run that nothing was killed in. The model is the
tiny one of the examples, made slow by a pause in every forward pass, so that a kill finds work to destroy. The last
line is one JSON object; the exit code is 1 where a row was lost, doubled, out of order or changed, or a part that was
there before the kill was made again.
"""

from __future__ import annotations

import argparse
import contextlib
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

import pyarrow.parquet as pq

REPOSITORY = Path(__file__).resolve().parents[1]
KINDS = ("worker", "process", "node", "driver")

_SLOW_CODE = '''\
"""BERT for question answering with a pause in every forward pass."""
import time

from transformers import BertForQuestionAnswering


class SlowForQuestionAnswering(BertForQuestionAnswering):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        time.sleep({seconds})
        return super().forward(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
'''


def make_slow_model(folder: Path, seconds: float) -> Path:
    """The tiny model of the examples, with code that makes it slow; to be loaded with ``--trust-remote-code``."""
    sys.path.insert(0, os.fspath(REPOSITORY))
    from examples.tiny_model import make_model

    make_model(folder, REPOSITORY / "examples" / "train.csv")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForQuestionAnswering": "slow.SlowForQuestionAnswering"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "slow.py").write_text(_SLOW_CODE.format(seconds=seconds))
    return folder


def write_rows(path: Path, num_rows: int) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "context", "question"])
        for i in range(num_rows):
            writer.writerow([i, f"Ann has {i},\nBob has {i % 7}.", "" if i % 100 == 99 else f"who has {i}?"])
    return path


# --- processes --------------------------------------------------------------------------------------


def processes() -> dict[int, tuple[int, str]]:
    """Parent and name of every process of this machine."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(folder.name)] = (parent, name)
    return found


def descendants(roots: list[int]) -> dict[int, str]:
    """Processes under ``roots``, with their names."""
    known = processes()
    wanted, grown = set(roots), True
    while grown:
        children = {pid for pid, (parent, _) in known.items() if parent in wanted} - wanted
        wanted |= children
        grown = bool(children)
    return {pid: known[pid][1] for pid in wanted - set(roots) if pid in known}


class TwoNodes:
    """A head and a second node; the second one can be killed and is replaced."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False},
        )
        self.second = self.cluster.add_node(num_cpus=1)

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def raylets(self) -> list[int]:
        nodes = [self.cluster.head_node, self.second]
        return [entry.process.pid for node in nodes for entry in node.all_processes["raylet"]]

    def kill_second(self) -> None:
        os.kill(self.raylets()[1], signal.SIGKILL)

    def replace_second(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = self.cluster.add_node(num_cpus=1)

    def end(self) -> None:
        self.cluster.shutdown()


# --- one run ----------------------------------------------------------------------------------------


class Job:
    """The command `test` as a process."""

    def __init__(self, address: str, rows: Path, model: Path, output: Path, log: Path | None = None) -> None:
        self.output = output
        self.log = log or output.with_suffix(".log")
        command = [
            sys.executable, "-m", "ray_qa.cli", "test", "--input", rows, "--model", model, "--output", output,
            "--trust-remote-code", "--tokens-per-batch", "2048", "--max-error-rows", "0.5", "--keep-columns", "id",
            "--num-workers", "2",
        ]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [os.fspath(part) for part in command], stdout=log, stderr=log, cwd=REPOSITORY,
                env=os.environ | {"RAY_ADDRESS": address},
            )

    def parts(self) -> dict[str, tuple[int, int]]:
        """Published parts: what tells a file from one of the same name that was written later."""
        found = {}
        for path in self.output.glob("part-*"):
            state = path.stat()
            found[path.name] = (state.st_ino, state.st_mtime_ns)
        return found

    def wait_for(self, num_parts: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while len(self.parts()) < num_parts:
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{num_parts} parts never came (exit {self.process.poll()}): {self.log.read_text()}")
            time.sleep(0.02)

    def result(self, seconds: float) -> dict[str, Any]:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise RuntimeError(f"the job still ran after {seconds} s: {self.log.read_text()}") from None
        if code:
            raise RuntimeError(f"the job ended with {code}: {self.log.read_text()}")
        return self.said()

    def said(self) -> dict[str, Any]:
        """The JSON line; Ray may write below it when it ends."""
        return dict(json.loads([line for line in self.log.read_text().splitlines() if line.startswith("{")][-1]))


def run_with_kill(
    kind: str, nodes: TwoNodes, rows: Path, model: Path, output: Path, num_parts: int, pick: random.Random,
    seconds: float,
) -> dict[str, Any]:
    """One job with one kill; what became of it."""
    job = Job(nodes.address, rows, model, output)
    job.wait_for(pick.randint(1, num_parts // 2), seconds)
    time.sleep(pick.uniform(0, 0.5))
    before = job.parts()
    killed = ""
    begin = time.monotonic()
    if kind == "driver":
        job.process.kill()
        job.process.wait()
        before = job.parts()  # its workers may live on for a moment
        job = Job(nodes.address, rows, model, output)
    elif kind == "node":
        nodes.kill_second()
        if pick.random() < 0.5:
            time.sleep(pick.uniform(0, 5))
            nodes.replace_second()
    else:
        found = descendants(nodes.raylets())
        matching = sorted(
            pid for pid, name in found.items()
            if "PredictionWorker" in name or (kind == "process" and name.startswith("ray::") and "Agent" not in name)
        )
        victim = pick.choice(matching)
        killed = found[victim].strip()
        os.kill(victim, signal.SIGKILL)
    try:
        result = job.result(seconds)
    except RuntimeError as error:
        raise RuntimeError(f"after the kill of {kind} {killed}: {error}") from error
    after = job.parts()
    rewritten = [name for name, state in before.items() if after.get(name) != state]
    if kind == "node" and nodes.second.all_processes["raylet"][0].process.poll() is not None:
        nodes.replace_second()
    return {
        "kind": kind, "killed": killed, "parts_before": len(before), "rewritten_parts": len(rewritten),
        "num_resumed_rows": result["num_resumed_rows"], "seconds_after": round(time.monotonic() - begin, 1),
    }


def compare(output: Path, reference: list[dict[str, Any]]) -> dict[str, int]:
    """Rows lost, doubled, out of order and changed against the reference."""
    found = pq.read_table(output).to_pylist()
    indices = [row["row_index"] for row in found]
    expected = {row["row_index"]: row for row in reference}
    return {
        "lost": len(expected.keys() - set(indices)), "doubled": len(indices) - len(set(indices)),
        "out_of_order": sum(a >= b for a, b in zip(indices, indices[1:], strict=False)),
        "changed": sum(row != expected.get(row["row_index"]) for row in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--parts", type=int, default=12, help="of 256 rows")
    parser.add_argument("--pause", type=float, default=0.2, help="seconds of every forward pass")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="that one job may take")
    options = parser.parse_args()
    sys.path.insert(0, os.fspath(REPOSITORY))
    from ray_qa.results import verify

    pick = random.Random(options.seed)
    kinds = options.kinds.split(",")
    home = Path(tempfile.mkdtemp(prefix="ray_qa_kills_"))
    os.environ |= {"RAY_QA_HOME": os.fspath(home / "home"), "HF_MODULES_CACHE": os.fspath(home / "modules")}
    totals = dict.fromkeys(("lost", "doubled", "out_of_order", "changed", "rewritten_parts"), 0)
    killed = dict.fromkeys(kinds, 0)
    nodes = TwoNodes()
    try:
        rows = write_rows(home / "rows.csv", options.parts * 256 - 100)
        model = make_slow_model(home / "model", options.pause)
        begin = time.monotonic()
        Job(nodes.address, rows, model, home / "reference").result(options.seconds)
        print(json.dumps({"kind": "none", "seconds": round(time.monotonic() - begin, 1)}), flush=True)
        reference = pq.read_table(home / "reference").to_pylist()
        for number in range(options.runs):
            kind = kinds[number % len(kinds)]
            output = home / f"run-{number}"
            line = run_with_kill(kind, nodes, rows, model, output, options.parts, pick, options.seconds)
            verify(output)
            line |= compare(output, reference)
            killed[kind] += 1
            for name in totals:
                totals[name] += line[name]
            print(json.dumps({"run": number} | line), flush=True)
            shutil.rmtree(output)
    finally:
        nodes.end()
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps({"runs": options.runs, "rows_each": options.parts * 256 - 100, "kills": killed} | totals))
    return 1 if any(totals.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
