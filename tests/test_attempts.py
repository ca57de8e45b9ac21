"""Rows that kill their workers: real processes, and a model that really kills them."""

from __future__ import annotations

import csv
import gzip
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from ray.train import ScalingConfig

from ray_qa import evaluate, predict
from ray_qa.attempts import FRUITLESS_DEATHS, Watch, start_ledger
from ray_qa.errors import WorkError
from tests.killer_model import DEADLY, make_killer

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_ROWS = 300


@pytest.fixture(scope="module")
def killer(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_killer(tiny_model, tmp_path_factory.mktemp("killer") / "model")


def write_rows(path: Path, deadly: set[int], num_rows: int = NUM_ROWS) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["context", "question", "answer_text", "answer_start"])
        for i in range(num_rows):
            question = f"who has {i}?" + (f" {DEADLY}" if i in deadly else "")
            writer.writerow([f"Ann has {i}, Bob none.", question, "Ann", 0])
    return path


@pytest.mark.slow
def test_a_row_that_kills_its_worker_gets_an_error_and_the_rest_completes(
    killer: Path, tiny_model: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.csv", {17})
    done = predict(
        rows, model=killer, output_path=tmp_path / "out", trust_remote_code=True,
        scaling=ScalingConfig(num_workers=1),
    )
    assert (done.num_rows, done.num_errors) == (NUM_ROWS, 1)
    found = pq.read_table(tmp_path / "out").to_pylist()
    assert [row["row_index"] for row in found] == list(range(NUM_ROWS))
    assert [row["row_index"] for row in found if row["error"] is not None] == [17]
    assert "worker died 2 times" in found[17]["error"] and found[17]["answer"] == ""
    # The same weights answer in the same way where nothing kills.
    whole = predict(write_rows(tmp_path / "harmless.csv", set()), model=tiny_model).answers
    for row, expected in zip(found, whole, strict=True):
        if row["row_index"] != 17:
            assert (row["answer"], row["start"]) == (expected.answer, expected.start)
            assert row["score"] == pytest.approx(expected.score, rel=1e-5)


@pytest.mark.slow
def test_workers_that_are_fed_and_evaluation(killer: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.csv", {1}, num_rows=3)
    zipped = tmp_path / "rows.csv.gz"
    zipped.write_bytes(gzip.compress(rows.read_bytes()))
    result = evaluate(zipped, model=killer, trust_remote_code=True, scaling=ScalingConfig(num_workers=1)).result
    assert (result.num_rows, result.num_error_rows) == (3, 1)
    assert result.num_windows == 2


def test_workers_that_only_die_end_the_run() -> None:
    """The worker's side, with a process that says that it is another one every time."""
    ledger = start_ledger()
    watch = Watch(ledger, "me")
    assert not watch.is_needed
    for death in range(1, FRUITLESS_DEATHS):
        assert ray.get(ledger.arrive.remote("me", f"process {death}")) == death
    watch = Watch(ledger, "me")
    assert watch.is_needed
    with pytest.raises(WorkError, match=f"died {FRUITLESS_DEATHS} times in a row"):
        watch.check()
    watch.finished((0, 0, 1))
    Watch(ledger, "me").check()
    ray.kill(ledger)


@pytest.mark.parametrize("deadly", [set(), {0}, {4999}, {1234, 1235, 3000}, set(range(100, 140))], ids=str)
def test_deaths_are_bounded_and_every_row_comes_out_once(deadly: set[int]) -> None:
    """The search alone, on 5,000 rows; a death is an exception that nobody catches but a new worker."""
    class Death(BaseException):
        pass

    def compute(start: int, stop: int) -> list[str]:
        if deadly & set(range(start, stop)):
            raise Death
        computed.extend(range(start, stop))
        return [f"row {i}" for i in range(start, stop)]

    ledger = start_ledger()
    computed: list[int] = []
    deaths = 1
    ray.get(ledger.arrive.remote("me", "the first process"))
    while True:
        watch = Watch(ledger, "me")
        watch.check()
        ray.get(ledger.arrive.remote("me", f"process {deaths}"))  # the next Watch is another process
        try:
            found = watch.run(
                7, 5000, compute=compute, give_up=lambda at, reason: [f"row {at}: {reason}"],
                join=lambda ours, theirs: ours + theirs, pack=pickle.dumps, unpack=pickle.loads,
            )
            break
        except Death:
            deaths += 1
    assert [text.split(":")[0] for text in found] == [f"row {i}" for i in range(5000)]
    assert {i for i, text in enumerate(found) if "died 2 times" in text} == deadly
    assert sorted(computed) == sorted(set(range(5000)) - deadly)  # nothing that was answered is answered again
    assert deaths <= (3 + 5 * len(deadly) if deadly else 1)
    ray.kill(ledger)
