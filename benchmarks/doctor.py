"""What the check of labels finds in files of labelled rows, as they are and with their labels deliberately damaged.

    .venv/bin/python benchmarks/doctor.py ../shared/data/*.csv

Each damage is done to every answerable row of all files; what stands in the column "wrong" was repaired to another
place than the label had before. An answer that stands, exactly, elsewhere too is no damage that anybody can see.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, os.fspath(REPOSITORY))

Row = tuple[str, str, int]  # context, answer_text, answer_start


def moved(by: int) -> Callable[[Row], Row]:
    return lambda row: (row[0], row[1], row[2] + by)


def in_bytes(encoding: str, unit: int) -> Callable[[Row], Row]:
    return lambda row: (row[0], row[1], len(row[0][: row[2]].encode(encoding)) // unit)


def in_form(form: str) -> Callable[[Row], Row]:
    """The context alone changes its Unicode form; the label is that of the old one."""
    return lambda row: (unicodedata.normalize(form, row[0]), row[1], row[2])  # type: ignore[arg-type]


def with_crlf(row: Row) -> Row:
    """Every fifth space becomes a line break; the label counts it as one character, the context has two."""
    words = row[0].split(" ")
    lf = "".join(word + ("\n" if number % 5 == 4 else " ") for number, word in enumerate(words))[: len(row[0])]
    return lf.replace("\n", "\r\n"), lf[row[2] : row[2] + len(row[1])], row[2]


DAMAGES: dict[str, Callable[[Row], Row]] = {
    "none": lambda row: row, "+1": moved(1), "-2": moved(-2), "UTF-8 bytes": in_bytes("utf-8", 1),
    "UTF-16 units": in_bytes("utf-16-le", 2), "CRLF": with_crlf, "NFC": in_form("NFC"), "NFD": in_form("NFD"),
    "NFKC": in_form("NFKC"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=[REPOSITORY / "examples" / "train.csv"])
    options = parser.parse_args()
    from ray_qa.csv_index import index_csv
    from ray_qa.csv_parse import read_parts
    from ray_qa.labels import REASONS, check_labels
    from ray_qa.schema import TRAIN_COLUMNS
    from ray_qa.storage import locate

    rows: list[Row] = []
    unanswerable = 0
    for path in options.files:
        index = index_csv([locate(path)], required_columns=TRAIN_COLUMNS)
        found: Counter[str] = Counter()
        for _, table in read_parts(index.files[0], index.parts()):
            check = check_labels(table, handle_impossible_answer=True)
            found.update(check.reason)
            for row in table.to_pylist():
                if row["answer_text"]:
                    rows.append((row["context"], row["answer_text"], int(row["answer_start"])))
                else:
                    unanswerable += 1
        print(f"{path.name}: {index.num_rows} rows: {dict(found.most_common())}")
    print(f"\n{len(rows)} answerable rows and {unanswerable} without an answer; the former, damaged:\n")
    print("| damage | rows changed | ok | repaired | wrong | bad | reasons | rows/s |")
    print("|---|---|---|---|---|---|---|---|")
    for name, damage in DAMAGES.items():
        damaged = [damage(row) for row in rows]
        columns = [[row[i] for row in damaged] for i in range(3)]
        table = pa.table({
            "row_index": list(range(len(rows))), "context": columns[0], "question": ["who?"] * len(rows),
            "answer_text": columns[1], "answer_start": list(map(str, columns[2])),
        })
        begin = time.perf_counter()
        check = check_labels(table, handle_impossible_answer=False)
        seconds = time.perf_counter() - begin
        changed = sum(before != after for before, after in zip(rows, damaged, strict=True))
        statuses: Counter[str] = Counter()
        wrong = 0
        for row, after, reason, start in zip(rows, damaged, check.reason, check.answer_start, strict=True):
            status = REASONS[reason].status
            statuses[status] += 1
            # The same place, counted in words: damages move characters.
            if status == "repaired" and len(after[0][: int(start)].split()) != len(row[0][: row[2]].split()):
                wrong += 1
        reasons = ", ".join(f"{reason} {count}" for reason, count in Counter(check.reason).most_common())
        print(
            f"| {name} | {changed} | {statuses['ok']} | {statuses['repaired']} | {wrong} | {statuses['bad']} "
            f"| {reasons} | {len(rows) / seconds:,.0f} |", flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
