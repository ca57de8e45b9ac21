"""The index and the parts against Python's csv module: equal rows and positions, or a clear error."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import multiprocessing
import pickle
import random
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest
from corpus_csv import CORPUS, Case
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ray_qa import csv_index, csv_scan, storage
from ray_qa.csv_index import CSVIndex, index_csv
from ray_qa.csv_parse import read_part, read_parts
from ray_qa.errors import CSVError, InputError, OptionError

SHARED = Path(__file__).parents[2] / "shared"
COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "zst": lambda data: pa.compress(data, "zstd", asbytes=True),
}
LINE_ENDS = ["\n", "\r\n", "\n\n", "\r\n\r\n", "\n\r\n", "\r"]
PIECES = [b"", b'"', b",", b"\n", b"\0", b"\xff", b"\xc3", b"\r", b"z"]


def write(folder: Path, data: bytes, name: str = "file.csv") -> storage.Location:
    path = folder / name
    path.write_bytes(data)
    return storage.locate(path)


def index(location: storage.Location, required=("q",), **kwargs) -> CSVIndex:
    return index_csv([location], required_columns=required, **kwargs)


def read_all(found: CSVIndex, columns=None) -> list[list[str]]:
    """All rows of all parts, after checking that positions, counts and types are as promised."""
    rows: list[list[str]] = []
    parts = list(found.parts())
    for number, file in enumerate(found.files):
        mine = [part for part in parts if part.file == number]
        if mine:
            assert (mine[-1].end, mine[0].first_row) == (file.body_end, file.first_row)
            assert all(a.end == b.start for a, b in zip(mine, mine[1:], strict=False))
        for part, table in read_parts(file, mine, columns):
            assert part.num_rows == table.num_rows > 0
            assert part.first_row == len(rows)
            assert table.column_names == ["row_index", *(file.columns if columns is None else columns)]
            assert table.schema.types == [pa.int64(), *[pa.string()] * (table.num_columns - 1)]
            assert all(column.null_count == 0 for column in table.columns)
            assert table["row_index"].to_pylist() == list(range(len(rows), len(rows) + part.num_rows))
            rows += map(list, zip(*[column.to_pylist() for column in table.columns[1:]], strict=True))
    assert found.num_rows == len(rows) and found.num_parts == len(parts)
    return rows


def reference(data: bytes, delimiter: str) -> list[list[str]] | None:
    """What Python's csv reads: header and records; None where it must not be trusted."""
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError:
        return None
    if "\0" in text or data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]
    # A mark on a line of its own behind the text comes back as a record, unless a quote is open there.
    marked = [row for row in csv.reader(io.StringIO(text + "\nMARK", newline=""), delimiter=delimiter) if row]
    if marked != [*rows, ["MARK"]] or not rows or any(len(row) != len(rows[0]) for row in rows):
        return None
    return rows


# --- property tests ---------------------------------------------------------------------------------

ATOMS = ['"', '"', '""', ",", ",", "\n", "\n", "\r\n", "\r", "a", "b c", "é", "日本", " ", "\ufeff", "null",
         "NA", '","', '"\n"', 'x"', '"y', ";", "\t", "\\", "\u2028", "\x85", "\x0b", "\U0001f600"]
fields = st.lists(st.sampled_from([a for a in ATOMS if a != "\r"] + ["w"] * 12), max_size=6).map("".join)


@st.composite
def regular_text(draw) -> str:
    """A table as a program writes it: quoted where needed or everywhere, any line ends, blank lines."""
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(fields, min_size=width, max_size=width), max_size=12))
    header = ["q", "second", "third column", "fourth\nname"][:width]
    ends = draw(st.lists(st.sampled_from(LINE_ENDS), min_size=1, max_size=3))
    quote_all = draw(st.booleans())

    def written(field: str) -> str:
        if quote_all or field == "" and width == 1 or any(c in field for c in ',;\t"\r\n'):
            return '"' + field.replace('"', '""') + '"'
        return field

    text = ""
    for i, row in enumerate([header, *rows]):
        text += ",".join(map(written, row)) + ends[i % len(ends)]
    if draw(st.booleans()):
        text = text.rstrip("\r\n")
    return draw(st.sampled_from(["", "", "\ufeff"])) + text


wild_text = st.lists(st.sampled_from(ATOMS), max_size=40).map(lambda atoms: "q,r\n" + "".join(atoms))


@st.composite
def damaged_bytes(draw) -> bytes:
    """A regular table with one or two bytes put in, taken out, or replaced."""
    data = bytearray(draw(regular_text()).encode())
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(data)))
        taken = draw(st.integers(0, 2))
        data[at : at + taken] = draw(st.sampled_from(PIECES))
    return bytes(data)


contents = st.one_of(regular_text().map(str.encode), wild_text.map(str.encode), damaged_bytes())
chunk_sizes = st.one_of(st.integers(1, 40), st.sampled_from([64, 1000, 1 << 20]))
part_sizes = st.one_of(st.none(), st.integers(1, 5))
COUNTEREXAMPLE = b'q,b\n5" y,"p\nq,r"\nx,"s\nt\nu"\ny,6" z\n'


def check_against_csv(folder: Path, data: bytes, chunk_bytes: int, part_rows: int | None) -> None:
    expected = reference(data, ",")
    location = write(folder, data)
    try:
        found = index(location, delimiter=",", chunk_bytes=chunk_bytes, part_rows=part_rows)
        rows = read_all(found)
    except CSVError:
        assert expected is None or expected[0].count("q") != 1
        return
    assert expected is not None, f"read {rows}, where csv is not to be trusted"
    assert rows == expected[1:]
    whole = index(location, delimiter=",", part_rows=part_rows)
    assert list(found.parts()) == list(whole.parts())
    assert found.digest == whole.digest and found.files == whole.files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("csv")


QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=500, deadline=None, suppress_health_check=QUIET, derandomize=True, database=None)
@given(contents, chunk_sizes, part_sizes)
@example(COUNTEREXAMPLE, 17, None)
@example(COUNTEREXAMPLE, 17, 1)
def test_equals_python_csv_or_refuses(folder, data, chunk_bytes, part_rows):
    check_against_csv(folder, data, chunk_bytes, part_rows)


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=QUIET, database=None)
@given(contents, chunk_sizes, part_sizes)
def test_equals_python_csv_or_refuses_at_length(folder, data, chunk_bytes, part_rows):
    check_against_csv(folder, data, chunk_bytes, part_rows)


# --- the corpus -------------------------------------------------------------------------------------


def check_case(case: Case, location: storage.Location, chunk_bytes: int, part_rows: int | None) -> None:
    def read() -> tuple[CSVIndex, list[list[str]]]:
        found = index(
            location, case.required, delimiter=case.delimiter, chunk_bytes=chunk_bytes, part_rows=part_rows
        )
        return found, read_all(found)

    if case.rows is None:
        with pytest.raises(CSVError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(location.uri)
        assert all(words in message for words in case.error), message
        if case.record is not None:
            assert caught.value.record == case.record, message
        if case.byte_offset is not None:
            assert caught.value.byte_offset == case.byte_offset, message
        return
    found, rows = read()
    assert rows == case.rows
    assert found.files[0].mode == case.mode
    assert found.files[0].columns == (case.columns or case.required)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_corpus(case, tmp_path):
    location = write(tmp_path, case.data)
    for chunk_bytes in (1, 2, 3, 5, 7, 1 << 20):
        for part_rows in (None, 1):
            check_case(case, location, chunk_bytes, part_rows)


@pytest.mark.parametrize("codec", COMPRESS)
@pytest.mark.parametrize("case", [c for c in CORPUS if not c.data.startswith((b"PK", b"\x1f\x8b"))],
                         ids=lambda case: case.name)
def test_corpus_compressed(case, codec, tmp_path):
    check_case(case, write(tmp_path, COMPRESS[codec](case.data), f"file.csv.{codec}"), 5, 1)


def test_corpus_agrees_with_csv():
    """What the corpus expects is what Python's csv reads, not what this code happens to give."""
    for case in CORPUS:
        delimiter = {None: ",", "tab": "\t"}.get(case.delimiter, case.delimiter)
        if "sniffed" in case.name:
            delimiter = "\t" if b"\t" in case.data else ";"
        if case.rows is not None:
            read = reference(case.data, delimiter)
            assert read is not None and read[1:] == case.rows, case.name
    assert len(CORPUS) >= 40 and len({case.name for case in CORPUS}) == len(CORPUS)


# --- larger files -----------------------------------------------------------------------------------


def table_bytes(num_rows: int, *, line_end: str = "\n", long_every: int = 0) -> tuple[bytes, list[list[str]]]:
    draw = random.Random(0)
    words = ["alpha", "b,c", 'say "x"', "two\nlines", "é日本", "", "null", "plain text that goes on"]
    rows = [[" ".join(draw.choices(words, k=draw.randrange(12))), f"{i}"] for i in range(num_rows)]
    for i in range(0, num_rows if long_every else 0, long_every or 1):
        rows[i][0] = f'long {i} "\n' * 200_000
    text = io.StringIO()
    # Where lines end in CR, the writer would leave an LF in a field without quotes.
    quoting = csv.QUOTE_ALL if line_end == "\r" else csv.QUOTE_MINIMAL
    csv.writer(text, lineterminator=line_end, quoting=quoting).writerows([["q", "r"], *rows])
    return text.getvalue().encode(), rows


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_larger_file_with_any_chunks(tmp_path, line_end):
    data, rows = table_bytes(30_000, line_end=line_end)
    assert len(data) > 3 << 19  # more than one hash block, and granules of several bytes
    location = write(tmp_path, data)
    whole = index(location)
    assert whole.files[0].mode == "ranges"
    assert read_all(whole) == rows
    assert read_all(index(location, part_rows=30_000)) == rows  # one part of several parse blocks
    for chunk_bytes in (4_099, 100_003, 1 << 20):
        found = index(location, chunk_bytes=chunk_bytes)
        assert list(found.parts()) == list(whole.parts())
        assert found.files == whole.files and found.digest == whole.digest


def test_records_longer_than_chunks_and_parse_blocks(tmp_path):
    data, rows = table_bytes(40, long_every=15)
    location = write(tmp_path, data)
    found = index(location, chunk_bytes=300_000)
    assert found.files[0].mode == "ranges" and read_all(found) == rows
    # The same with a stray quote in front: fields far above the csv module's own limit.
    found = index(write(tmp_path, data[:4] + b'\na"b,c\n' + data[4:].lstrip()))
    assert found.files[0].mode == "serial" and read_all(found) == [['a"b', "c"], *rows]


def test_header_longer_than_the_first_read(tmp_path):
    columns = [f"column number {i}" for i in range(20_000)] + ["q"]
    location = write(tmp_path, (",".join(columns) + "\n" + "," * 20_000 + "yes\n").encode())
    found = index(location)
    assert found.files[0].columns == tuple(columns)
    assert read_part(found.files[0], found.part(0), ["q"]).to_pylist() == [{"row_index": 0, "q": "yes"}]


def test_header_without_end(tmp_path):
    with pytest.raises(CSVError, match="header does not end within 16 MiB"):
        index(write(tmp_path, b'q,"r\n' + b"a,b\n" * 5_000_000))


def test_pools_give_what_map_gives(tmp_path):
    data, _ = table_bytes(5_000)
    location = write(tmp_path, data)
    irregular = write(tmp_path, b'q,r\na"b,c\n' * 9 + b"x,y\n", "irregular.csv")
    expected = index_csv([location, irregular], required_columns=["q"])
    pools = [
        ThreadPoolExecutor(2), ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")),
    ]
    for pool in pools:
        with pool:
            found = index_csv(
                [location, irregular], required_columns=["q"], chunk_bytes=20_011, map_chunks=pool.map
            )
        assert found.digest == expected.digest and found.files == expected.files
        assert list(found.parts()) == list(expected.parts())


# --- parts ------------------------------------------------------------------------------------------


def test_rows_in_a_part_follow_the_input_alone(tmp_path, monkeypatch):
    location = write(tmp_path, b"q,r\n" + b"a,b\n" * 1_000)
    assert [part.num_rows for part in index(location).parts()] == [256, 256, 256, 232]
    assert [part.num_rows for part in index(location, part_rows=600).parts()] == [600, 400]
    assert {part.num_rows for part in index(location, part_rows=1).parts()} == {1}
    monkeypatch.setattr(csv_index, "PARTS_WANTED", 2)
    assert [part.num_rows for part in index(location).parts()] == [500, 500]
    monkeypatch.setattr(csv_index, "MAX_PART_ROWS", 400)
    assert [part.num_rows for part in index(location).parts()] == [400, 400, 200]
    monkeypatch.setattr(csv_index, "MAX_PART_BYTES", 400)
    assert [part.num_rows for part in index(location).parts()] == [100] * 10
    assert [part.num_rows for part in index(location, part_rows=600).parts()] == [600, 400]


@pytest.mark.parametrize("granule", [1, 64, 4096])
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_borders_of_the_blocks_that_are_scanned_leave_no_trace(tmp_path, monkeypatch, line_end, granule):
    record = b'"a ""b""' + line_end + b'c, d",plain' + line_end
    location = write(tmp_path, b"q,r" + line_end + b"".join(record * (i % 3) + line_end * (i % 2) for i in range(90)))
    monkeypatch.setattr(csv_index, "_MAX_GRANULES", max(1, 2_000 // granule))
    expected = index(location, part_rows=7)
    assert expected.num_rows == 90
    monkeypatch.setattr(csv_scan, "_BIT_BLOCK", 64)
    for chunk_bytes in (1, 63, 64, 65, 1000):
        found = index(location, part_rows=7, chunk_bytes=chunk_bytes)
        assert list(found.parts()) == list(expected.parts()) and found.digest == expected.digest


def test_parts_by_bytes(tmp_path):
    location = write(tmp_path, b"q,r\n" + b"a,b\n" * 10_000)
    counts = [part.num_rows for part in index(location, part_bytes=12_000).parts()]
    assert sum(counts) == 10_000 and len(counts) == 4
    assert all(2_900 <= count <= 3_100 for count in counts[:3])  # one in 32
    assert index(location, part_bytes=1 << 30).num_parts == 1
    assert index(location, part_bytes=1).num_parts == 10_000
    assert index(location).num_bytes == 40_000
    with pytest.raises(OptionError, match="part_rows and part_bytes are both given"):
        index(location, part_bytes=1, part_rows=1)


def test_parts_are_near_the_wanted_size_in_larger_files(tmp_path):
    data, rows = table_bytes(30_000)
    sizes = [part.num_rows for part in index(write(tmp_path, data)).parts()]
    assert sum(sizes) == 30_000 and all(250 <= size <= 262 for size in sizes[:-1])


def test_parts_do_not_follow_chunks_where_record_starts_are_sampled(tmp_path, monkeypatch):
    data, rows = table_bytes(1_000)
    location = write(tmp_path, data)
    for most_granules in (10, 100, 300):
        monkeypatch.setattr(csv_index, "_MAX_GRANULES", most_granules)
        whole = index(location, part_rows=1)
        assert most_granules / 4 < whole.num_parts <= most_granules
        assert read_all(whole) == rows
        for chunk_bytes in (500, 777, 4_096):
            assert list(index(location, part_rows=1, chunk_bytes=chunk_bytes).parts()) == list(whole.parts())


def test_one_part_can_be_read_alone(tmp_path):
    data, rows = table_bytes(1_000)
    for name, stored in (("file.csv", data), ("file.csv.gz", gzip.compress(data))):
        found = index(write(tmp_path, stored, name), part_rows=100)
        part = found.part(7)
        table = read_part(found.files[0], part, ["r"])
        positions = list(range(700, 800))
        assert table.to_pydict() == {"row_index": positions, "r": list(map(str, positions))}
        assert read_part(found.files[0], part, []).column_names == ["row_index"]
        with pytest.raises(CSVError, match="lacks the column nothing"):
            read_part(found.files[0], part, ["nothing"])


def test_parts_of_a_compressed_file_come_in_order(tmp_path):
    data, rows = table_bytes(1_000)
    found = index(write(tmp_path, gzip.compress(data), "file.csv.gz"), part_rows=100)
    some = [found.part(2), found.part(5)]
    tables = [table["row_index"].to_pylist() for _, table in read_parts(found.files[0], some)]
    assert tables == [list(range(200, 300)), list(range(500, 600))]
    with pytest.raises(ValueError, match="in order"):
        list(read_parts(found.files[0], some[::-1]))


def test_index_is_small_and_can_be_pickled(tmp_path):
    found = index(write(tmp_path, b"q,r\n" + b"a,b\n" * 10_000), part_rows=1)
    stored = pickle.dumps(found)
    assert len(stored) < 16 * found.num_parts + 2_000
    again = pickle.loads(stored)
    assert list(again.parts()) == list(found.parts()) and again.files == found.files
    assert len(pickle.dumps(found.part(0))) < 200
    assert repr(found).startswith("CSVIndex(1 files, 10000 rows, 10000 parts")
    for wrong in (-1, 10_000):
        with pytest.raises(IndexError):
            found.part(wrong)
        with pytest.raises(IndexError):
            found.locate_row(wrong)


# --- several files ----------------------------------------------------------------------------------


def test_list_of_files_counts_on(tmp_path):
    contents = {
        "a.csv": b"q,r\n1,a\n2,b\n", "b.csv.gz": gzip.compress(b"r;q\nc;3\n\nd;4\ne;5\n"), "c.csv": b"q,r\n",
        "d.csv": b'q,r\n6",f\n7,g\n', "e.csv.zst": COMPRESS["zst"](b"q\tr\n8\th\n"),
    }
    locations = [write(tmp_path, data, name) for name, data in contents.items()]
    found = index_csv(locations, required_columns=["q", "r"], part_rows=2, chunk_bytes=3)
    numbers = ["1", "2", "3", "4", "5", '6"', "7", "8"]
    assert read_all(found, ["r", "q"]) == [list(pair) for pair in zip("abcdefgh", numbers, strict=True)]
    assert [(part.file, part.num_rows) for part in found.parts()] == [(0, 2), (1, 2), (1, 1), (3, 2), (4, 1)]
    assert [file.num_rows for file in found.files] == [2, 3, 0, 2, 1]
    assert [file.first_row for file in found.files] == [0, 2, 5, 5, 7]
    assert [file.mode for file in found.files] == ["ranges", "ranges", "ranges", "serial", "ranges"]
    uris = [location.uri for location in locations]
    positions = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (3, 0), (3, 1), (4, 0)]
    assert [found.locate_row(row) for row in range(8)] == [(uris[file], record) for file, record in positions]


def test_error_in_a_later_file_counts_in_that_file(tmp_path):
    first = write(tmp_path, b"q,r\n" + b"a,b\n" * 10, "first.csv")
    second = write(tmp_path, b"q,r\n" + b"a,b\n" * 3 + b"c\n", "second.csv")
    found = index_csv([first, second], required_columns=["q"], part_rows=2)
    with pytest.raises(CSVError, match=r"second.csv, record 3, byte 16: 1 field where") as caught:
        read_all(found)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


# --- compressed files -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", COMPRESS)
def test_compressed_file_reads_as_its_text(codec, tmp_path):
    data, rows = table_bytes(80_000)
    assert len(data) > 4 << 20  # more than one block of the stream
    stored = COMPRESS[codec](data)
    found = index(write(tmp_path, stored, f"file.csv.{codec}"))
    plain = index(write(tmp_path, data))
    assert read_all(found) == rows
    assert found.files[0].digest == plain.files[0].digest and found.files[0].mode == "ranges"
    # By its content, not only by its name; and members one behind the other are one file.
    half = len(data) // 2
    joined = COMPRESS[codec](data[:half]) + COMPRESS[codec](data[half:])
    found = index(write(tmp_path, joined, "joined.csv"))
    assert found.files[0].digest == plain.files[0].digest
    assert read_all(found) == rows


@pytest.mark.parametrize("codec", COMPRESS)
def test_damaged_compressed_file_is_refused(codec, tmp_path):
    stored = COMPRESS[codec](table_bytes(20_000)[0])
    with pytest.raises(CSVError, match="damaged or cut short"):
        index(write(tmp_path, stored[: len(stored) * 2 // 3], f"file.csv.{codec}"))
    middle = len(stored) // 2
    with pytest.raises(CSVError):
        damaged = stored[:middle] + b"\0" * 50 + stored[middle + 50 :]
        read_all(index(write(tmp_path, damaged, f"file.csv.{codec}")))


def test_plain_text_under_a_compressed_name(tmp_path):
    assert read_all(index(write(tmp_path, b"q,r\na,b\n", "file.csv.gz"))) == [["a", "b"]]


# --- what does not fit ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (b"q,r\na,b\nc,d\ne,f\ng,h\n", "had 16 bytes, now 20"),
        (b"q,r\na,b\n", "had 16 bytes, now 8"),
        (b"q,r\na,b\nc,ddd,f\n"[:10] + b"d-e_f\n", "now hold 2 records"),
        (b'q,r\na,b\nc,"\ne,f\n', "odd number of quotes"),
        (b"q,r\na,b\nc,d\n\n,,f", "fields where the header has 2"),
    ],
)
def test_file_that_changed_after_it_was_indexed(tmp_path, now, words):
    found = index(write(tmp_path, b"q,r\na,b\nc,d\ne,f\n"), part_rows=3)
    write(tmp_path, now)
    with pytest.raises(CSVError, match=words):
        read_all(found)


def test_digest_follows_content_and_dialect(tmp_path):
    data, _ = table_bytes(20_000)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    original = index(write(tmp_path, data, "a.csv"))
    assert index(write(tmp_path, data, "b.csv"), part_rows=9).digest == original.digest
    assert index(write(tmp_path, bytes(changed), "c.csv")).digest != original.digest
    both = write(tmp_path, b"q;q,q\n1;2,2\n", "d.csv")
    assert index(both, (), delimiter=",").digest != index(both, (), delimiter=";").digest


def test_arguments_out_of_range(tmp_path):
    location = write(tmp_path, b"q,r\na,b\n")
    with pytest.raises(OptionError, match=r"delimiter is '\|'; allowed: ',', ';', 'tab' or None"):
        index(location, delimiter="|")
    for name in ("chunk_bytes", "part_rows"):
        with pytest.raises(OptionError, match=f"{name} is 0"):
            index(location, **{name: 0})
    with pytest.raises(InputError, match="no input file"):
        index_csv([], required_columns=["q"])
    with pytest.raises(InputError, match="absent.csv: cannot be read"):
        index(storage.locate(tmp_path / "absent.csv"))


def test_worker_memory_stays_near_its_part(tmp_path):
    """In a process of its own: peak above the imports, for a file of many chunks and parts."""
    row = b'"' + b"some words, quoted\n" * 40 + b'",r\n'
    path = tmp_path / "file.csv"
    path.write_bytes(b"q,r\n" + row * 80_000)
    script = f"""
import pyarrow.csv
from ray_qa import csv_index, csv_parse, storage

def status(name):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(name))

location = storage.locate({str(path)!r})
small = csv_index.index_csv([location], required_columns=["q"], chunk_bytes=1 << 20, part_rows=20)
csv_parse.read_part(small.files[0], small.part(0))
base = status("VmRSS")
found = csv_index.index_csv([location], required_columns=["q"], chunk_bytes=8 << 20, part_rows=10_000)
print((status("VmHWM") - base) / (8 << 20))
for part, table in csv_parse.read_parts(found.files[0], found.parts()):
    del table
print((status("VmHWM") - base) / (part.end - part.start))
"""
    output = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    chunks, parts = map(float, output.split())
    assert chunks < 6 and parts < 6, output


@pytest.mark.shared
@pytest.mark.parametrize("path", sorted((SHARED / "data").glob("*.csv")), ids=lambda path: path.name)
def test_shared_data(path):
    expected = reference(path.read_bytes(), ",")
    found = index(storage.locate(path), ("context", "question"), chunk_bytes=50_021)
    assert expected is not None and read_all(found) == expected[1:]
    assert found.files[0].mode == "ranges"
