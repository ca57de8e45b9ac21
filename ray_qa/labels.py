"""Checks that an answer stands in its context where the row says, and repairs labels that are off.

Works on one table of rows at a time. It does not know where the rows come from, how many bad ones
a job allows, or what becomes of them: it says per row what was found, and adds up the totals.

A label is right when ``context[answer_start : answer_start + len(answer_text)] == answer_text``,
counted in code points. A label that is not right is repaired only where the text leaves one
reading. The rule, in full:

1. *Places*: where answer_text stands in the context, as it is or up to form (white space, invisible
   marks such as U+FEFF, Unicode compatibility forms), never splitting a character of the context.
2. A place is *explained* when answer_start points at it exactly, or does so when counted in UTF-8
   bytes, in UTF-16 units, with CRLF for LF or LF for CRLF, without U+FEFF, in NFC, NFD, NFKC or
   NFKD, or in the context stripped or with runs of white space as one space; when it misses it by
   at most MAX_SHIFT characters; or when only white space lies between.
3. One explained place: it is taken. Several: the row is ambiguous, with one exception: the place at
   answer_start itself (only the form of answer_text differs) wins over places that are merely near,
   unless answer_text stands at one of those exactly as given.
4. None explained: a text that stands in the context exactly once (as it is; failing that, up to
   form) is taken from there; several times is ambiguous. A missing, negative or senseless
   answer_start is never made up, nor is one beyond the context that rule 2 does not explain.
"""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ray_qa import schema

#: Characters by which answer_start may miss the answer and still count as merely shifted.
MAX_SHIFT = 3
#: Bad rows that a report keeps with their text.
FIRST_BAD_ROWS = 10
#: A text that stands in its context more often than this is ambiguous without a further look.
MAX_PLACES = 10_000

Status = Literal["ok", "repaired", "bad"]


class Reason(NamedTuple):
    """What a reason code means: ``sentence`` says what is wrong and how to mend it."""

    status: Status
    column: str
    sentence: str


REASONS: dict[str, Reason] = {
    "ok": Reason("ok", "", "The answer stands at answer_start."),
    "no_answer": Reason(
        "ok", schema.ANSWER_TEXT, "The row has no answer, as handle_impossible_answer allows."
    ),
    "shifted": Reason(
        "repaired", schema.ANSWER_START,
        f"answer_start missed the answer by at most {MAX_SHIFT} characters and was moved to it.",
    ),
    "whitespace": Reason(
        "repaired", schema.ANSWER_TEXT,
        "Text or position differed from the context in white space only; the context's own was taken.",
    ),
    "line_endings": Reason(
        "repaired", schema.ANSWER_START,
        "Text or position belonged to other line endings (CRLF, LF); the context's own were taken.",
    ),
    "byte_order_mark": Reason(
        "repaired", schema.ANSWER_START,
        "Text or position did not count an invisible mark (such as U+FEFF) that the context holds.",
    ),
    "unicode_form": Reason(
        "repaired", schema.ANSWER_TEXT,
        "Text or position belonged to another Unicode form (NFC, NFD, NFKC, NFKD); the context's was taken.",
    ),
    "utf8_bytes": Reason(
        "repaired", schema.ANSWER_START, "answer_start was counted in UTF-8 bytes; it is now in characters."
    ),
    "utf16_units": Reason(
        "repaired", schema.ANSWER_START, "answer_start was counted in UTF-16 units; it is now in characters."
    ),
    "elsewhere_once": Reason(
        "repaired", schema.ANSWER_START,
        "answer_text was not at answer_start but stands in the context exactly once; that place was taken.",
    ),
    "blank_context": Reason(
        "bad", schema.CONTEXT, "The context is blank; fill it in or take the row out."
    ),
    "blank_question": Reason(
        "bad", schema.QUESTION, "The question is blank; fill it in or take the row out."
    ),
    "blank_answer": Reason(
        "bad", schema.ANSWER_TEXT,
        "answer_text is blank; fill it in, or set handle_impossible_answer=True where a blank answer "
        "means that the context holds none.",
    ),
    "blank_answer_with_start": Reason(
        "bad", schema.ANSWER_TEXT,
        "answer_text is blank although answer_start points into the context; fill in the text, or leave "
        "answer_start blank or -1 for a row without an answer.",
    ),
    "start_missing": Reason(
        "bad", schema.ANSWER_START,
        "answer_start is blank; set it to the 0-based character at which answer_text begins.",
    ),
    "start_not_a_number": Reason(
        "bad", schema.ANSWER_START,
        "answer_start is not a whole number; set it to the 0-based character at which answer_text begins.",
    ),
    "start_negative": Reason(
        "bad", schema.ANSWER_START,
        "answer_start is negative although there is an answer_text; set it to the 0-based character at which "
        "the text begins, or blank the text (with handle_impossible_answer=True) if there is no answer.",
    ),
    "start_beyond_context": Reason(
        "bad", schema.ANSWER_START,
        "answer_start lies beyond the end of the context, in characters and in every other unit tried; set "
        "it to the 0-based character at which answer_text begins.",
    ),
    "ambiguous": Reason(
        "bad", schema.ANSWER_START,
        "answer_text is not at answer_start, and stands at several places that it could mean; set "
        "answer_start to the right one.",
    ),
    "not_found": Reason(
        "bad", schema.ANSWER_TEXT,
        "answer_text does not stand in the context; copy it literally from there.",
    ),
    "answers_not_a_list": Reason(
        "bad", schema.ANSWERS,
        'answers is not a JSON list of strings; write it as ["Paris", "the city of Paris"], or leave it blank.',
    ),
    "answers_without_answer_text": Reason(
        "bad", schema.ANSWERS,
        "answers names right answers although answer_text is blank; put one of them into answer_text, with its "
        "answer_start, or leave both blank.",
    ),
}

# Zero-width space, word joiner, soft hyphen, direction marks, byte order mark. Not the joiners
# U+200C and U+200D, which change words in Indic scripts and Persian.
_INVISIBLE = "\ufeff\u200b\u2060\u00ad\u200e\u200f"
_BLANKS = "".join(chr(i) for i in range(0x3001) if chr(i).isspace()) + _INVISIBLE
_FIRST_MARK = "\u0300"
_BLANK_RUN = re.compile(r"\s+")
_INTEGER = re.compile(r"([+-]?)0*([0-9]+)(?:\.0*)?")
_FORMS: tuple[Literal["NFC", "NFD", "NFKC", "NFKD"], ...] = ("NFC", "NFD", "NFKC", "NFKD")


@dataclass(frozen=True)
class LabelCheck:
    """The labels of one table after checking, one entry per row in the table's order.

    ``answer_start`` (int64[n]) and ``answer_text`` (n strings) are the repaired labels: for usable
    rows ``context[start : start + len(text)] == text``; -1 and "" where there is no answer, and in
    unusable rows. ``usable`` is bool[n]; ``reason`` holds a key of REASONS per row.
    """

    num_rows: int
    answer_start: np.ndarray
    answer_text: list[str]
    usable: np.ndarray
    reason: list[str]

    @property
    def num_bad(self) -> int:
        return self.num_rows - int(self.usable.sum())


class BadRow(NamedTuple):
    """One unusable row as a report shows it: ``found`` is what stands there, ``mend`` what to do."""

    row_index: int
    column: str
    reason: str
    found: str
    mend: str


def check_labels(table: pa.Table, *, handle_impossible_answer: bool) -> LabelCheck:
    """Check and, where only one reading is left, repair the labels of ``table``.

    Args:
        table: columns row_index (int64), context, question, answer_text, answer_start (strings
            without nulls). The words "null", "NA" and "None" are text like any other. An optional
            column answers (see `gold_answers`) is checked too.
        handle_impossible_answer: rows with a blank answer_text and an answer_start that is blank
            or -1 are legal rows without an answer.
    """
    contexts = table.column(schema.CONTEXT).to_pylist()
    questions = table.column(schema.QUESTION).to_pylist()
    texts = table.column(schema.ANSWER_TEXT).to_pylist()
    raw_starts = table.column(schema.ANSWER_START)
    starts = _plain_integers(raw_starts)
    num_rows = len(contexts)
    reasons = ["ok"] * num_rows
    rows = zip(contexts, questions, texts, starts, strict=True)
    suspects = [
        i
        for i, (context, question, text, start) in enumerate(rows)
        if start < 0
        or not context.startswith(text, start)
        or not text.strip(_BLANKS)
        or not question.strip(_BLANKS)
    ]
    for i in suspects:
        reasons[i], starts[i], texts[i] = _check_row(
            contexts[i], questions[i], texts[i], raw_starts[i].as_py(), handle_impossible_answer
        )
    if schema.ANSWERS in table.column_names:
        _check_answers(table.column(schema.ANSWERS).to_pylist(), reasons, starts, texts)
    bad_codes = {code for code, reason in REASONS.items() if reason.status == "bad"}
    return LabelCheck(
        num_rows=num_rows,
        answer_start=np.array(starts, dtype=np.int64),
        answer_text=texts,
        usable=np.array([reason not in bad_codes for reason in reasons], dtype=np.bool_),
        reason=reasons,
    )


def gold_answers(answer_text: str, answers: str = "") -> list[str]:
    """The right answers of a checked row: answer_text and the strings in the JSON list ``answers``; [""] for none.

    Raises:
        ValueError: ``answers`` is not a JSON list of strings; check_labels lets no such row through.
    """
    further = json.loads(answers) if answers.strip() else []
    if not isinstance(further, list) or not all(isinstance(answer, str) for answer in further):
        raise ValueError("not a JSON list of strings")
    golds = dict.fromkeys(answer for answer in (answer_text, *further) if answer.strip(_BLANKS))
    return list(golds) or [""]


def _check_answers(answers: list[str], reasons: list[str], starts: list[int], texts: list[str]) -> None:
    """Mark the rows, usable so far, whose further answers are not."""
    for i, raw in enumerate(answers):
        if not raw.strip() or REASONS[reasons[i]].status == "bad":
            continue
        try:
            golds = gold_answers(texts[i], raw)
        except (ValueError, RecursionError):
            reasons[i], starts[i], texts[i] = "answers_not_a_list", -1, ""
            continue
        if not texts[i] and golds != [""]:
            reasons[i], starts[i], texts[i] = "answers_without_answer_text", -1, ""


def check_inputs(table: pa.Table) -> list[str | None]:
    """Per row of ``table`` (columns context, question): None, or the sentence why it has no answer."""
    contexts, questions = table.column(schema.CONTEXT).to_pylist(), table.column(schema.QUESTION).to_pylist()
    problems: list[str | None] = [None] * len(contexts)
    for i, (context, question) in enumerate(zip(contexts, questions, strict=True)):
        if not question.strip(_BLANKS):
            problems[i] = REASONS["blank_question"].sentence
        if not context.strip(_BLANKS):
            problems[i] = REASONS["blank_context"].sentence
    return problems


@dataclass
class LabelReport:
    """Totals over many checks, and the bad rows with the smallest row_index. Mergeable in any order."""

    counts: Counter[str] = field(default_factory=Counter)
    first_bad_rows: list[BadRow] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return sum(self.counts.values())

    @property
    def num_bad(self) -> int:
        return self._total("bad")

    @property
    def num_repaired(self) -> int:
        return self._total("repaired")

    def _total(self, status: Status) -> int:
        return sum(count for code, count in self.counts.items() if REASONS[code].status == status)

    def add(self, check: LabelCheck, table: pa.Table) -> LabelReport:
        """Add ``check``, the outcome of check_labels on ``table``; returns the report itself."""
        self.counts.update(check.reason)
        bad = np.flatnonzero(~check.usable)
        row_indices = table.column(schema.ROW_INDEX).to_numpy()[bad]
        first = bad[np.argsort(row_indices, kind="stable")[:FIRST_BAD_ROWS]]
        rows = zip(first, table.take(first).to_pylist(), strict=True)
        self._keep([bad_row_of(row, check.reason[i]) for i, row in rows])
        return self

    def merge(self, other: LabelReport) -> LabelReport:
        """Add the totals and rows of ``other``; returns the report itself."""
        self.counts.update(other.counts)
        self._keep(other.first_bad_rows)
        return self

    def _keep(self, rows: list[BadRow]) -> None:
        self.first_bad_rows = sorted([*self.first_bad_rows, *rows])[:FIRST_BAD_ROWS]

    def describe(self, locate_row: Callable[[int], tuple[str, int]]) -> str:
        """The report as text: totals per reason, then the first bad rows, one a line.

        Args:
            locate_row: gives the file and the 0-based record in it for a row_index.
        """
        lines = [f"{self.num_bad:,} of {self.num_rows:,} rows cannot be used{self._totals('bad')}"]
        if self.num_repaired:
            lines[0] += f"; {self.num_repaired:,} were repaired{self._totals('repaired')}"
        for row in self.first_bad_rows:
            file, record = locate_row(row.row_index)
            where = f"{file}, record {record}, column {row.column}"
            lines.append(f"  {where}: {row.reason}: found {row.found}. {row.mend}")
        if self.num_bad > len(self.first_bad_rows):
            lines.append(f"  and {self.num_bad - len(self.first_bad_rows):,} more")
        return "\n".join(lines)

    def _totals(self, status: Status) -> str:
        codes = [code for code in REASONS if REASONS[code].status == status and self.counts[code]]
        totals = [f"{code} {self.counts[code]:,}" for code in codes]
        return f" ({', '.join(totals)})" if totals else ""


def bad_row_of(row: dict[str, object], reason: str) -> BadRow:
    """``row`` (a row of the table as a dictionary) as the report shows it."""
    column = REASONS[reason].column
    text, start = str(row[schema.ANSWER_TEXT]), str(row[schema.ANSWER_START])
    context = str(row[schema.CONTEXT])
    found = _excerpt(str(row[column]))
    mend = REASONS[reason].sentence
    if reason.startswith("start_") or reason == "ambiguous":
        found = f"answer_start {found} for answer_text {_excerpt(text)}"
        places = sorted(_places(context, text.strip(_BLANKS))[0])
        if places:
            more = f" and {len(places) - 5} more places" if len(places) > 5 else ""
            mend += f" The text stands at {', '.join(map(str, places[:5]))}{more}."
        else:
            mend += " The text does not stand in the context at all."
    elif reason == "not_found":
        at = max(0, _parse_start(start) or 0)
        found += f", while the context has {_excerpt(context[at:])} at answer_start {at}"
    elif reason == "blank_answer_with_start":
        found += f" with answer_start {_excerpt(start)}"
    return BadRow(int(str(row[schema.ROW_INDEX])), column, reason, found, mend)


def _excerpt(text: str, limit: int = 60) -> str:
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "..."


def _plain_integers(column: pa.ChunkedArray) -> list[int]:
    """The column's plain non-negative integers; -1 for whatever else stands there."""
    plain = pc.match_substring_regex(column, "^[0-9]{1,18}$")
    return pc.cast(pc.if_else(plain, column, "-1"), pa.int64()).to_pylist()


def _parse_start(raw: str) -> int | None:
    """A whole number, as '12', '+12' or '12.0' (how pandas writes a column with gaps); else None."""
    match = _INTEGER.fullmatch(raw.strip(_BLANKS))
    if match is None:
        return None
    sign, digits = match.groups()
    value = int(digits) if len(digits) <= 18 else 10**18
    return -value if sign == "-" else value


def _check_row(
    context: str, question: str, text: str, raw_start: str, handle_impossible_answer: bool
) -> tuple[str, int, str]:
    """Reason code, answer_start and answer_text of a row that the quick check did not pass."""
    start = _parse_start(raw_start)
    blank_start = not raw_start.strip(_BLANKS)
    if not context.strip(_BLANKS):
        return "blank_context", -1, ""
    if not question.strip(_BLANKS):
        return "blank_question", -1, ""
    if not text.strip(_BLANKS):
        if not handle_impossible_answer:
            return "blank_answer", -1, ""
        if blank_start or start == -1:
            return "no_answer", -1, ""
        return ("start_not_a_number" if start is None else "blank_answer_with_start"), -1, ""
    if blank_start:
        return "start_missing", -1, ""
    if start is None:
        return "start_not_a_number", -1, ""
    if start < 0:
        return "start_negative", -1, ""
    if context.startswith(text, start):
        return "ok", start, text
    return _repair(context, text, start)


def _repair(context: str, text: str, start: int) -> tuple[str, int, str]:
    """Find the one place that ``text`` and ``start`` can mean (the rule is in the module docstring)."""
    beyond = start >= len(context)
    core = text.strip(_BLANKS)
    lead = len(text) - len(text.lstrip(_BLANKS))
    places, literal = _places(context, core)
    if not places:
        return ("start_beyond_context" if beyond else "not_found"), -1, ""
    if len(places) > MAX_PLACES:
        return "ambiguous", -1, ""

    explained = _explained(context, sorted(places), {start, start + lead})
    exact = [place for place, reason in explained.items() if reason == "exact"]
    if len(exact) == 1 and len(explained) > 1:
        others = [place for place in explained if place != exact[0]]
        as_given = any(place >= lead and context.startswith(text, place - lead) for place in others)
        if not as_given and all(explained[place] == "shifted" for place in others):
            explained = {exact[0]: "exact"}
    if len(explained) > 1:
        return "ambiguous", -1, ""
    if explained:
        ((place, reason),) = explained.items()
    elif beyond:
        return "start_beyond_context", -1, ""
    else:
        choices = literal or list(places)
        if len(choices) > 1:
            return "ambiguous", -1, ""
        place, reason = choices[0], "elsewhere_once"
    found = context[place : places[place]]
    return (_difference(found, text) if reason == "exact" else reason), place, found


def _places(context: str, core: str) -> tuple[dict[int, int], list[int]]:
    """Where ``core`` stands: start -> end of every place, and the starts of the literal ones.

    At most MAX_PLACES + 1 of each kind are looked for.
    """
    if not core:
        return {}, []
    literal = list(_finds(context, core))
    places = {place: place + len(core) for place in literal}
    folded, starts, ends = _fold_context(context)
    wanted = _fold(core)[0]
    for first in _finds(folded, wanted) if wanted else ():
        last = first + len(wanted) - 1
        splits_before = first > 0 and starts[first - 1] == starts[first]
        splits_after = last + 1 < len(folded) and starts[last + 1] == starts[last]
        if not splits_before and not splits_after:
            places.setdefault(starts[first], ends[last])
    return places, literal


def _finds(text: str, part: str) -> Iterator[int]:
    """Starts of ``part`` in ``text``, overlapping ones too, MAX_PLACES + 1 at most."""
    at = -1
    for _ in range(MAX_PLACES + 1):
        at = text.find(part, at + 1)
        if at < 0:
            return
        yield at


@lru_cache(maxsize=1)  # rows with the same context mostly follow each other
def _fold_context(context: str) -> tuple[str, array[int], array[int]]:
    return _fold(context)


def _fold(text: str) -> tuple[str, array[int], array[int]]:
    """``text`` in NFKD, runs of white space as one space, invisible marks left out.

    With it, per folded character, start and end of what it stands for in ``text``.
    """
    folded: list[str] = []
    starts, ends = array("q"), array("q")
    in_blank = False
    for start, end, form in _units(text):
        if form.isspace():
            if in_blank:
                ends[-1] = end
                continue
            form = " "
        elif form in _INVISIBLE:
            continue
        in_blank = form == " "
        folded.append(form)
        for _ in form:
            starts.append(start)
            ends.append(end)
    return "".join(folded), starts, ends


def _units(text: str) -> Iterator[tuple[int, int, str]]:
    """(start, end, NFKD) of the smallest runs whose NFKD forms, joined, are the NFKD of the text.

    One character each, but where a run of combining marks changes its order.
    """
    position, size = 0, len(text)
    while position < size:
        end = position + 1
        while end < size and text[end] >= _FIRST_MARK and unicodedata.combining(_nfkd(text[end])[0]):
            end += 1
        if end == position + 1:
            yield position, end, _nfkd(text[position])
            position = end
            continue
        forms = [_nfkd(character) for character in text[position:end]]
        if "".join(forms) != unicodedata.normalize("NFKD", text[position:end]):
            yield position, end, unicodedata.normalize("NFKD", text[position:end])
        else:
            for i, form in enumerate(forms, position):
                yield i, i + 1, form
        position = end


@lru_cache(maxsize=65536)
def _nfkd(character: str) -> str:
    # The NFKD of some signs (¨) and of NO-BREAK SPACE begins with a space: only the latter is one.
    return " " if character.isspace() else unicodedata.normalize("NFKD", character)


def _explained(context: str, places: list[int], targets: set[int]) -> dict[int, str]:
    """The places that one of ``targets`` (code points, or some other unit) can mean, and why.

    The first reason that fits is given: exact, the other ways of counting, shifted, white space.
    """
    explained: dict[int, str] = {}
    for place in places:
        if place in targets:
            explained[place] = "exact"
    for reason, measure, offset in _ways_to_count(context):
        counted, position = offset, 0
        for place in places:
            # All measures add up over pieces, because no place begins within a line ending or blank.
            counted += measure(context[position:place])
            position = place
            if counted in targets and counted != place:
                explained.setdefault(place, reason)
    for place in places:
        if any(abs(place - target) <= MAX_SHIFT for target in targets):
            explained.setdefault(place, "shifted")
        elif any(target < place and not context[target:place].strip(_BLANKS) for target in targets):
            explained.setdefault(place, "whitespace")
    return explained


def _ways_to_count(context: str) -> Iterator[tuple[str, Callable[[str], int], int]]:
    """Reason, length of a piece, and what to add, of each way to count that differs in this context."""
    if "\ufeff" in context:
        yield "byte_order_mark", lambda piece: len(piece) - piece.count("\ufeff"), 0
    units = [_characters] if context.isascii() else [_characters, _utf8_bytes, _utf16_units]
    if "\n" in context or "\r" in context:
        for unit in units:
            yield "line_endings", _after(_lf, unit), 0
            yield "line_endings", _after(_crlf, unit), 0
    if not context.isascii():
        yield "utf8_bytes", _utf8_bytes, 0
        yield "utf16_units", _utf16_units, 0
        for form in _FORMS:
            yield "unicode_form", _after(partial(unicodedata.normalize, form), _characters), 0
    indent = len(context) - len(context.lstrip(_BLANKS))
    if indent:
        yield "whitespace", _characters, -indent
    yield "whitespace", _collapsed, 0
    if indent:
        yield "whitespace", _collapsed, -_collapsed(context[:indent])


def _after(change: Callable[[str], str], measure: Callable[[str], int]) -> Callable[[str], int]:
    return lambda piece: measure(change(piece))


def _characters(piece: str) -> int:
    return len(piece)


def _utf8_bytes(piece: str) -> int:
    return len(piece.encode())


def _utf16_units(piece: str) -> int:
    return len(piece.encode("utf-16-le")) // 2


def _collapsed(piece: str) -> int:
    return len(_BLANK_RUN.sub(" ", piece))


def _lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _crlf(text: str) -> str:
    return _lf(text).replace("\n", "\r\n")


def _difference(found: str, text: str) -> str:
    """The reason code for the form in which ``found`` differs from ``text``, which it stands for."""
    if found != text and _lf(found) == _lf(text):
        return "line_endings"
    if "".join(found.split()) == "".join(text.split()):
        return "whitespace"
    if found.strip(_BLANKS) == text.strip(_BLANKS) or _visible(found) == _visible(text):
        return "byte_order_mark"
    return "unicode_form"


def _visible(text: str) -> str:
    return "".join(character for character in text if character not in _INVISIBLE and not character.isspace())
