"""The label doctor: every reason code, and that no repair ever points at another place."""

from __future__ import annotations

import csv
import pickle
import random
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ray_qa.labels import FIRST_BAD_ROWS, MAX_SHIFT, REASONS, LabelReport, check_inputs, check_labels, gold_answers

DATA = Path(__file__).parents[2] / "shared" / "data"
COLUMNS = ("context", "question", "answer_text", "answer_start")


def table_of(rows: list[tuple[str, str, str, str]], first: int = 0) -> pa.Table:
    columns = {name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(COLUMNS)}
    return pa.table({"row_index": pa.array(range(first, first + len(rows)), pa.int64()), **columns})


def check_one(
    context: str, text: str, start: object, *, question: str = "Who?", no_answer: bool = False
) -> tuple[str, int, str]:
    """Reason, answer_start and answer_text of one row; checks the invariant of usable rows on the way."""
    table = table_of([(context, question, text, str(start))])
    check = check_labels(table, handle_impossible_answer=no_answer)
    (reason,), (found,), at = check.reason, check.answer_text, int(check.answer_start[0])
    if REASONS[reason].status == "bad":
        assert (bool(check.usable[0]), at, found, check.num_bad) == (False, -1, "", 1)
    else:
        assert (bool(check.usable[0]), check.num_bad) == (True, 0)
        no_text = reason == "no_answer"
        assert (at, found) == (-1, "") if no_text else context[at : at + len(found)] == found != ""
    return reason, at, found


TEXT = "The café opened in 1999.\nIt closed in 2004, reopened in 2010 as Café Zoë 🎈 and thrives."


@pytest.mark.parametrize(
    ("context", "text", "start", "expected"),
    [
        (TEXT, "café", 4, ("ok", 4, "café")),
        (TEXT, "café", "4.0", ("ok", 4, "café")),
        (TEXT, "café", " +4 ", ("ok", 4, "café")),
        ("NA", "NA", 0, ("ok", 0, "NA")),
        ("a null and None", "null", 2, ("ok", 2, "null")),
        (TEXT, "café", 5, ("shifted", 4, "café")),
        (TEXT, "café", 1, ("shifted", 4, "café")),
        ("cat and cat", "cat", 7, ("shifted", 8, "cat")),
        ("cat       cat", "cat", 4, ("whitespace", 10, "cat")),
        (TEXT, " café\n", 4, ("whitespace", 4, "café")),
        (TEXT, "café ", 4, ("ok", 4, "café ")),
        (TEXT, "café\u00a0opened", 4, ("whitespace", 4, "café opened")),
        (TEXT, "1999. It", 19, ("whitespace", 19, "1999.\nIt")),
        (TEXT, "1999.\r\nIt", 19, ("line_endings", 19, "1999.\nIt")),
        ("5, 5", "5 ", 0, ("whitespace", 0, "5")),
        ("  x 1 y 1 z 1", "1", 8, ("ok", 8, "1")),
        ("    x 1 y      1 z", "1", 2, ("whitespace", 6, "1")),
        (TEXT, "cafe\u0301", 4, ("unicode_form", 4, "café")),
        ("cafe\u0301", "café", 0, ("unicode_form", 0, "cafe\u0301")),
        ("The ﬁle", "file", 4, ("unicode_form", 4, "ﬁle")),
        ("\ufeffcat or dog or cat", "cat", 0, ("byte_order_mark", 1, "cat")),
        ("ca\u200bt", "cat", 0, ("byte_order_mark", 0, "ca\u200bt")),
        ("a\r\nb\r\nc\r\nd\r\ne one xyz one", "one", 10, ("line_endings", 14, "one")),
        ("a\nb\nc\nd\ne one xyz one", "one", 14, ("line_endings", 10, "one")),
        ("ééééé two xyz xyz two", "two", 11, ("utf8_bytes", 6, "two")),
        ("🎈🎈🎈🎈🎈 two xyz xyz two", "two", 11, ("utf16_units", 6, "two")),
        ("ééééé two xyz two", "two", 11, ("ambiguous", -1, "")),  # bytes, or three too few?
        ("éé two", "two", 100, ("start_beyond_context", -1, "")),
        ("中文中文中文 two", "two", 19, ("utf8_bytes", 7, "two")),
        (TEXT, "thrives", 0, ("elsewhere_once", TEXT.index("thrives"), "thrives")),
        (TEXT, "in", 40, ("ambiguous", -1, "")),
        ("cat cat", "cat", 2, ("ambiguous", -1, "")),
        ("a" * 30_000, "a", 40_000, ("ambiguous", -1, "")),
        (TEXT, "tea", 4, ("not_found", -1, "")),
        ("½ cup", "1", 0, ("not_found", -1, "")),
        ("née", "e\u0300", 1, ("not_found", -1, "")),
        (TEXT, "café", "", ("start_missing", -1, "")),
        (TEXT, "café", " \t", ("start_missing", -1, "")),
        (TEXT, "café", "NA", ("start_not_a_number", -1, "")),
        (TEXT, "café", "4.5", ("start_not_a_number", -1, "")),
        (TEXT, "café", "1_0", ("start_not_a_number", -1, "")),
        (TEXT, "café", "0x4", ("start_not_a_number", -1, "")),
        (TEXT, "café", "٤", ("start_not_a_number", -1, "")),
        (TEXT, "café", -1, ("start_negative", -1, "")),
        (TEXT, "café", "9" * 5000, ("start_beyond_context", -1, "")),
        (" \ufeff", "x", 0, ("blank_context", -1, "")),
        (TEXT, "", 3, ("blank_answer", -1, "")),
        (TEXT, " \u200b", -1, ("blank_answer", -1, "")),
    ],
)
def test_reason_codes(context, text, start, expected):
    assert check_one(context, text, start) == expected


@pytest.mark.parametrize(
    ("text", "start", "reason"),
    [
        ("", "", "no_answer"), (" ", "-1", "no_answer"), ("", "-1.0", "no_answer"),
        ("", "0", "blank_answer_with_start"), ("", "-2", "blank_answer_with_start"),
        ("", "NA", "start_not_a_number"), ("café", "-1", "start_negative"), ("café", "4", "ok"),
    ],
)
def test_rows_without_an_answer_where_they_are_allowed(text, start, reason):
    assert check_one(TEXT, text, start, no_answer=True)[0] == reason


@pytest.mark.parametrize("no_answer", [False, True])
def test_a_blank_question_is_bad_even_where_the_answer_is_right(no_answer):
    assert check_one(TEXT, "café", 4, question=" ", no_answer=no_answer)[0] == "blank_question"
    assert check_one("", "", -1, no_answer=no_answer)[0] == "blank_context"


def test_every_code_says_how_to_mend_and_names_its_column():
    for code, reason in REASONS.items():
        assert reason.status in ("ok", "repaired", "bad") and reason.sentence.endswith("."), code
        assert reason.column in (*COLUMNS, "answers") or code == "ok"
    assert "handle_impossible_answer=True" in REASONS["blank_answer"].sentence


@pytest.mark.parametrize(
    ("answers", "reason", "golds"),
    [
        ("", "ok", ["café"]),
        (" [] ", "ok", ["café"]),
        ('["The café", "café", " ", "Café Zoë"]', "ok", ["café", "The café", "Café Zoë"]),
        ("The café", "answers_not_a_list", None),
        ('"The café"', "answers_not_a_list", None),
        ('["The café", 3]', "answers_not_a_list", None),
        ('{"text": "The café"}', "answers_not_a_list", None),
        ("[" * 100_000, "answers_not_a_list", None),
    ],
)
def test_further_answers(answers, reason, golds):
    table = table_of([(TEXT, "Who?", "café", "4")]).append_column("answers", pa.array([answers]))
    check = check_labels(table, handle_impossible_answer=False)
    assert check.reason == [reason] and check.usable[0] == (golds is not None)
    if golds is not None:
        assert gold_answers(check.answer_text[0], answers) == golds
    else:
        text = LabelReport().add(check, table).describe(lambda row: ("a.csv", row))
        assert f"a.csv, record 0, column answers: {reason}: found {answers[:9]!r}"[:-1] in text


def test_further_answers_of_a_row_without_an_answer():
    columns = [(TEXT, "Who?", "", "-1")] * 2
    table = table_of(columns).append_column("answers", pa.array(['["Zoë"]', '[" "]']))
    check = check_labels(table, handle_impossible_answer=True)
    assert check.reason == ["answers_without_answer_text", "no_answer"]
    assert gold_answers("", '[" "]') == [""]
    # What else is wrong with a row is said first.
    table = table_of([(TEXT, "Who?", "zebra", "4")]).append_column("answers", pa.array(["x"]))
    assert check_labels(table, handle_impossible_answer=False).reason == ["not_found"]


def test_check_inputs():
    rows = [(TEXT, "Who?", "", ""), ("\ufeff ", "Who?", "", ""), (TEXT, "\n", "", ""), ("NA", "null", "", "")]
    problems = check_inputs(table_of(rows))
    assert problems[0] is None and problems[3] is None
    assert problems[1].startswith("The context is blank") and problems[2].startswith("The question is blank")


def test_an_empty_table():
    check = check_labels(table_of([]), handle_impossible_answer=False)
    assert (check.num_rows, check.num_bad, check.answer_start.dtype) == (0, 0, np.int64)
    assert LabelReport().add(check, table_of([])).num_rows == 0
    assert check_inputs(table_of([])) == []


# Properties. A context is built of pieces that each damage treats differently.
PIECES = st.sampled_from(
    ["a", "b", "cat", "1", "11", ".", " ", "  ", "\n", "\r\n", "\t", "é", "Ü", "e\u0301", "a\u0323\u0301",
     "각", "中", "文", "🎈", "👩\u200d👩\u200d👧", "ก", "กำ", "ดี", "कि", "क\u093c", "ﬁ", "２", "½", "ال",
     "\ufeff", "\u00a0", "\u200b"]
)


@st.composite
def labelled(draw) -> tuple[str, int, int]:
    """A context, and start and end of an answer that neither begins nor ends with a blank."""
    context = "".join(draw(st.lists(PIECES, min_size=1, max_size=25)))
    start = draw(st.integers(0, len(context) - 1))
    end = draw(st.integers(start + 1, min(len(context), start + 8)))
    blank = "\ufeff\u200b"
    assume(not any(c.isspace() or c in blank for c in (context[start], context[end - 1])))
    return context, start, end


def folded(text: str) -> str:
    """Equal for texts that differ in form only; says it in another way than labels.py does."""
    plain = unicodedata.normalize("NFKD", text.translate(dict.fromkeys(map(ord, "\ufeff\u200b"))))
    return "".join(plain.split())


Damage = Callable[[str, int, int], tuple[str, str, int, int]]


def shift(by: int) -> Damage:
    return lambda context, start, end: (context, context[start:end], start + by, start)


def in_context(change: Callable[[str], str]) -> Damage:
    """The context was changed after labelling."""
    return lambda context, start, end: (
        change(context), context[start:end], start, len(change(context[:start]))
    )


def in_label(change: Callable[[str], str]) -> Damage:
    """The label was made on a changed copy of the context."""
    return lambda context, start, end: (
        context, change(context[start:end]), len(change(context[:start])), start
    )


def counted(size: Callable[[str], int]) -> Damage:
    return lambda context, start, end: (context, context[start:end], size(context[:start]), start)


def to_lf(text: str) -> str:
    return text.replace("\r\n", "\n")


def to_crlf(text: str) -> str:
    return to_lf(text).replace("\n", "\r\n")


def to_form(form: str) -> Callable[[str], str]:
    return lambda text: unicodedata.normalize(form, text)


#: name -> damage, and what the context must be beforehand for the damage to be one single cause.
DAMAGES: dict[str, tuple[Damage, Callable[[str], str]]] = {
    **{f"shift {by:+}": (shift(by), str) for by in range(-MAX_SHIFT, MAX_SHIFT + 1)},
    "utf-8 bytes": (counted(lambda text: len(text.encode())), str),
    "utf-16 units": (counted(lambda text: len(text.encode("utf-16-le")) // 2), str),
    "context to CRLF": (in_context(to_crlf), to_lf),
    "context to LF": (in_context(to_lf), to_crlf),
    "label from CRLF": (in_label(to_crlf), to_lf),
    "bytes of CRLF": (counted(lambda text: len(to_crlf(text).encode())), to_lf),
    "context to NFD": (in_context(to_form("NFD")), to_form("NFC")),
    "context to NFC": (in_context(to_form("NFC")), to_form("NFD")),
    "label in NFD": (in_label(to_form("NFD")), str),
    "label in NFKC": (in_label(to_form("NFKC")), str),
    "BOM put before": (in_context(lambda text: "\ufeff" + text), lambda text: text.replace("\ufeff", "")),
    "BOM taken away": (in_label(lambda text: text.replace("\ufeff", "")), str),
    "text padded": (lambda context, start, end: (context, f"\n {context[start:end]} ", start, start), str),
    "indent gone": (
        lambda context, start, end: (
            context, context[start:end], start - (len(context) - len(context.lstrip())), start
        ),
        str,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
@settings(max_examples=60, deadline=None)
@given(row=labelled())
def test_a_damaged_label_is_restored_or_refused_but_never_moved(name, row):
    damage, prepare = DAMAGES[name]
    context, start, end = row
    # A combining mark may join the letter before it when the form changes: keep the cuts apart from those.
    parts = [prepare(context[:start]), prepare(context[start:end]), prepare(context[end:])]
    context, start, end = "".join(parts), len(parts[0]), len(parts[0]) + len(parts[1])
    for form in ("NFC", "NFD", "NFKC"):
        cut = [unicodedata.normalize(form, part) for part in parts]
        assume("".join(cut) == unicodedata.normalize(form, context))
    assume(unicodedata.combining(context[start]) == 0)
    damaged, text, at, truth = damage(context, start, end)
    reason, found_at, found = check_one(damaged, text, at)
    status = REASONS[reason].status
    if status == "ok":  # by chance the same text stands at the damaged position: nobody can tell
        assert found == text and found_at == at
    elif status == "repaired":
        assert found_at == truth, (damaged, text, at, reason)
        assert folded(found) == folded(text)
        assert (found[0] + found[-1]).strip() == found[0] + found[-1]
    else:
        assert reason == "ambiguous" or (at < 0 and reason == "start_negative") or at >= len(damaged)


@pytest.mark.parametrize("name", DAMAGES)
@settings(max_examples=20, deadline=None)
@given(row=labelled(), words=st.sampled_from(["Zürich", "東京", "x y\nz", "Q🎈"]))
def test_an_answer_that_stands_once_is_always_restored(name, row, words):
    damage, prepare = DAMAGES[name]
    context = prepare(f"{row[0]} {words} {row[0]}")
    start = context.index(prepare(words))
    damaged, text, at, truth = damage(context, start, start + len(prepare(words)))
    assume(0 <= at)
    assert check_one(damaged, text, at)[1] == truth


@settings(max_examples=200, deadline=None)
@given(
    st.lists(PIECES, max_size=12).map("".join), st.lists(PIECES, max_size=4).map("".join), st.integers(-2, 40)
)
def test_whatever_the_label_a_usable_row_holds_the_invariant(context, text, start):
    reason, _, found = check_one(context, text, start)
    if REASONS[reason].status == "repaired":
        assert folded(found) == folded(text)


def test_the_report_is_the_same_in_whatever_order_it_is_merged():
    rng = random.Random(3)
    labels = [(rng.choice(["café", "in", "tea", ""]), rng.choice(["4", "5", "40", "-1"])) for _ in range(90)]
    rows = [(TEXT, "Who?", *label) for label in labels]
    reports = []
    for seed in range(4):
        size = 7 + 10 * seed
        parts = [table_of(rows[at : at + size], at) for at in range(0, len(rows), size)]
        random.Random(seed).shuffle(parts)
        report = LabelReport()
        for part in parts:
            one = LabelReport().add(check_labels(part, handle_impossible_answer=False), part)
            report.merge(pickle.loads(pickle.dumps(one)))
        reports.append(report)
    assert all(report == reports[0] for report in reports)
    whole = check_labels(table_of(rows), handle_impossible_answer=False)
    assert reports[0].counts == Counter(whole.reason)
    assert (reports[0].num_rows, reports[0].num_bad) == (90, whole.num_bad)
    smallest = [int(i) for i in np.flatnonzero(~whole.usable)[:FIRST_BAD_ROWS]]
    assert [row.row_index for row in reports[0].first_bad_rows] == smallest


def test_the_report_says_where_what_and_how_to_mend():
    rows = [
        (TEXT, "Who?", "café", "5"), (TEXT, "Who?", "tea", "4"), (TEXT, "Who?", "in", "40"),
        (TEXT, "Who?", "café", "NA"), (TEXT, "", "café", "4"), (TEXT, "Who?", "", ""),
    ]
    rows += [(TEXT, "Who?", "tea", "")] * 12
    table = table_of(rows, first=1000)
    report = LabelReport().add(check_labels(table, handle_impossible_answer=False), table)
    text = report.describe(lambda row_index: ("b.csv", row_index - 1000))
    lines = text.splitlines()
    assert lines[0] == (
        "17 of 18 rows cannot be used (blank_question 1, blank_answer 1, start_missing 12, "
        "start_not_a_number 1, ambiguous 1, not_found 1); 1 were repaired (shifted 1)"
    )
    assert lines[1].startswith(
        "  b.csv, record 1, column answer_text: not_found: found 'tea', while the context has 'café opened in"
    )
    assert "record 2, column answer_start: ambiguous: found answer_start '40' for answer_text" in lines[2]
    assert lines[2].endswith("The text stands at 16, 35, 53.")
    assert "found answer_start 'NA' for answer_text 'café'" in lines[3] and lines[3].endswith("stands at 4.")
    assert "column question: blank_question: found ''" in lines[4]
    assert "handle_impossible_answer=True" in lines[5]
    assert lines[6].endswith("The text does not stand in the context at all.")
    assert (len(lines), lines[-1]) == (12, "  and 7 more")


def test_a_report_without_bad_rows():
    table = table_of([(TEXT, "Who?", "café", "4")])
    report = LabelReport().add(check_labels(table, handle_impossible_answer=False), table)
    assert report.describe(lambda row_index: ("x", row_index)) == "0 of 1 rows cannot be used"


# The doctor over real files, and copies of them damaged on purpose.


@cache
def rows_of(path: Path) -> list[tuple[str, str, str, int]]:
    with open(path, encoding="utf-8", newline="") as file:
        return [
            (row["context"], row["question"], row["answer_text"], int(row["answer_start"]))
            for row in csv.DictReader(file)
        ]


def line_per_sentence(context: str) -> str:
    return context.replace(". ", ".\n")


#: name -> damage, and the share of each file's rows that must be usable afterwards.
FILE_DAMAGES: dict[str, tuple[Damage, float]] = {
    "none": (shift(0), 1.0),
    "+1": (shift(1), 0.998),
    "-2": (shift(-2), 0.999),
    "UTF-8 bytes": (DAMAGES["utf-8 bytes"][0], 0.993),
    "UTF-16 units": (DAMAGES["utf-16 units"][0], 1.0),
    "context CRLF": (in_context(to_crlf), 1.0),
    "context CRLF, a line per sentence": (
        lambda context, start, end: DAMAGES["context to CRLF"][0](line_per_sentence(context), start, end), 1.0
    ),
    "context NFC": (in_context(to_form("NFC")), 0.999),
    "context NFD": (in_context(to_form("NFD")), 0.999),
    "context NFKC": (in_context(to_form("NFKC")), 0.97),
    "label NFD": (in_label(to_form("NFD")), 1.0),
    "BOM": (in_context(lambda text: "\ufeff" + text), 1.0),
    "text padded": (DAMAGES["text padded"][0], 0.998),
}


@pytest.mark.shared
@pytest.mark.parametrize("name", FILE_DAMAGES)
def test_real_files_damaged(name, record_property):
    damage, least = FILE_DAMAGES[name]
    for path in sorted(DATA.glob("*.csv")):
        rows, truths = [], []
        for context, question, text, start in rows_of(path):
            at, truth = start, -1
            if text:
                context, text, at, truth = damage(context, start, start + len(text))
            rows.append((context, question, text, str(at)))
            truths.append(truth)
        check = check_labels(table_of(rows), handle_impossible_answer=True)
        counts = Counter(check.reason)
        record_property(path.name, str(dict(counts)))
        moved = np.flatnonzero(check.usable & (check.answer_start != np.array(truths)))
        # Only rows whose damaged label happens to be right as well may differ: nothing was repaired.
        assert {check.reason[i] for i in moved} <= {"ok"}, path.name
        assert len(moved) <= 2, path.name
        below_zero = sum(bool(row[2]) and int(row[3]) < 0 for row in rows)  # never mended
        assert counts["start_negative"] == below_zero
        assert check.num_bad - below_zero <= (1 - least) * check.num_rows, (path.name, counts)
        labels = zip(rows, check.answer_start.tolist(), check.answer_text, strict=True)
        for (context, *_), start, text in labels:
            assert start == -1 or context[start : start + len(text)] == text
        if name == "none":
            assert set(counts) <= {"ok", "no_answer"}, path.name
            assert counts["no_answer"] == sum(not row[2] for row in rows)


@pytest.mark.shared
def test_rows_without_an_answer_are_refused_unless_asked_for():
    rows = [(*row[:3], str(row[3])) for row in rows_of(DATA / "squad2-eval.csv")]
    check = check_labels(table_of(rows), handle_impossible_answer=False)
    assert Counter(check.reason) == {"ok": 803, "blank_answer": 826}
