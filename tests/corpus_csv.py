"""Small odd and malformed files, each with what must come of it.

A case ends in ``rows`` (the records, all columns), or in ``error``: words that the message must hold.
"""

from __future__ import annotations

from typing import NamedTuple


class Case(NamedTuple):
    name: str
    data: bytes
    rows: list[list[str]] | None = None
    error: tuple[str, ...] = ()
    record: int | None = None
    byte_offset: int | None = None
    mode: str = "ranges"
    delimiter: str | None = None
    required: tuple[str, ...] = ("q", "r")
    columns: tuple[str, ...] | None = None


BOM = b"\xef\xbb\xbf"

CORPUS = [
    # --- files that are read -------------------------------------------------------------------------
    Case("plain", b"q,r\na,b\nc,d\n", [["a", "b"], ["c", "d"]]),
    Case("no line end at the end", b"q,r\na,b\nc,d", [["a", "b"], ["c", "d"]]),
    Case("CRLF", b"q,r\r\na,b\r\nc,d\r\n", [["a", "b"], ["c", "d"]]),
    Case("CR alone", b"q,r\ra,b\rc,d\r", [["a", "b"], ["c", "d"]]),
    Case("mixed line ends", b"q,r\r\na,b\nc,d\re,f", [["a", "b"], ["c", "d"], ["e", "f"]]),
    Case("CR CR LF", b"q,r\r\r\na,b\r\r\nc,d\r\r\n", [["a", "b"], ["c", "d"]]),
    Case("blank lines are no records", b"\n\nq,r\n\n\r\na,b\n\n\nc,d\n\n\n", [["a", "b"], ["c", "d"]]),
    Case("byte order mark", BOM + b"q,r\na,b\n", [["a", "b"]]),
    Case("byte order mark before a quoted header", BOM + b'"q","r"\na,b\n', [["a", "b"]]),
    Case("byte order mark in front of a record is text", b"q,r\n" + BOM + b"a,b\n", [["\ufeffa", "b"]]),
    Case(
        "two files with marks put together", BOM + b"q,r\na,b\n" + BOM + b"q,r\nc,d\n",
        [["a", "b"], ["\ufeffq", "r"], ["c", "d"]],
    ),
    Case("quoted line feeds", b'q,r\n"a\nb\n\nc",d\n', [["a\nb\n\nc", "d"]]),
    Case("quoted CRLF stays CRLF", b'q,r\r\n"a\r\nb",d\r\n', [["a\r\nb", "d"]]),
    Case("quoted CR", b'q,r\n"a\rb",d\n', [["a\rb", "d"]]),
    Case("quoted delimiters", b'q,r\n"a,b","c,"\n', [["a,b", "c,"]]),
    Case("doubled quotes", b'q,r\n"a ""b"" c",""""\n', [['a "b" c', '"']]),
    Case("nothing but quotes", b'q,r\n"","""""""\n', error=("closed",), record=0, byte_offset=4),
    Case("doubled quotes at both ends", b'q,r\n"""a""","""b"""\n', [['"a"', '"b"']]),
    Case("empty fields", b'q,r\n,\n"",""\n,""\n', [["", ""], ["", ""], ["", ""]]),
    Case("words for missing values are text", b"q,r\nnull,NA\nNone,NaN\nN/A,nan\n",
         [["null", "NA"], ["None", "NaN"], ["N/A", "nan"]]),
    Case("numbers and dates stay text", b"q,r\n007,1e5\n2020-01-01,TRUE\n",
         [["007", "1e5"], ["2020-01-01", "TRUE"]]),
    Case("spaces stay", b"q,r\n a , b \n", [[" a ", " b "]]),
    Case("one column", b'q\na\n\n""\nb\n', [["a"], [""], ["b"]], required=("q",)),
    Case("quoted header with line feed", b'"q","two\nlines",r\na,b,c\n', [["a", "b", "c"]],
         columns=("q", "two\nlines", "r")),
    Case("spaces around names", b"q , r\na,b\n", [["a", "b"]], columns=("q", "r")),
    Case("columns in another order", b"x,r,q\n1,2,3\n", [["1", "2", "3"]], columns=("x", "r", "q")),
    Case("repeated extra column", b"q,x,r,x,x_2\n1,2,3,4,5\n", [["1", "2", "3", "4", "5"]],
         columns=("q", "x", "r", "x_3", "x_2")),
    Case("blank name (a pandas index)", b",q,r\n0,a,b\n", [["0", "a", "b"]], columns=("column_1", "q", "r")),
    Case("a column called row_index", b"row_index,q,r\n9,a,b\n", [["9", "a", "b"]],
         columns=("row_index_2", "q", "r")),
    Case("header only", b"q,r\n", []),
    Case("header only, no line end", b"q,r", []),
    Case("header and blank lines", b"q,r\n\n\r\n\n", []),
    Case("semicolons, sniffed", b'q;r\na,1;"b;2"\n', [["a,1", "b;2"]]),
    Case("tabs, sniffed", b"q\tr\na,b\tc;d\n", [["a,b", "c;d"]]),
    Case("semicolons, given", b"q;r\na;b\n", [["a", "b"]], delimiter=";"),
    Case("tabs, given", b"q\tr\na\tb\n", [["a", "b"]], delimiter="tab"),
    Case("sniffed by the needed columns", b"q;r;a,b,c,d\n1;2;3\n", [["1", "2", "3"]],
         columns=("q", "r", "a,b,c,d")),
    Case("all of Unicode", "q,r\né,日本語\n\u2028,\U0001f600\x85\n".encode(),
         [["é", "日本語"], ["\u2028", "\U0001f600\x85"]]),
    Case("backslash is no escape", b'q,r\na\\,b\n"c\\",d\n', [["a\\", "b"], ["c\\", "d"]]),
    Case("apostrophes are no quotes", b"q,r\n'a,b'\n", [["'a", "b'"]]),
    # --- not RFC 4180, read serially as Python's csv reads it -----------------------------------------
    Case("inch signs and quoted line feeds", b'q,r\n5" y,"p\nq,r"\nx,"s\nt\nu"\ny,6" z\n',
         [['5" y', "p\nq,r"], ["x", "s\nt\nu"], ["y", '6" z']], mode="serial"),
    Case("stray quote in a field", b'q,r\na"b,c\nd,e\n', [['a"b', "c"], ["d", "e"]], mode="serial"),
    Case("stray quote at the end of a field", b'q,r\na",c\n', [['a"', "c"]], mode="serial"),
    Case("text behind a closing quote", b'q,r\n"a"b,c\n', [["ab", "c"]], mode="serial"),
    Case("space before a quoted field", b'q,r\na, "b"\n', [["a", ' "b"']], mode="serial"),
    Case("space behind a quoted field", b'q,r\n"a" ,b\n', [["a ", "b"]], mode="serial"),
    Case("doubled quotes in a field without quotes", b'q,r\na ""b"",c\n', [['a ""b""', "c"]], mode="serial"),
    Case("stray quote in the header only", b'q,r,5"\na,b,c\n', [["a", "b", "c"]], columns=("q", "r", '5"')),
    Case("backslash before a quote", b'q,r\n"a \\"b\\" c",d\n', [['a \\b\\" c"', "d"]], mode="serial"),
    # --- refused -------------------------------------------------------------------------------------
    Case("empty file", b"", error=("empty", "q, r")),
    Case("blank lines only", b"\n\r\n\n", error=("empty",)),
    Case("byte order mark only", BOM, error=("empty",)),
    Case("quote never closed", b'q,r\na,b\n"c,d\ne,f\n', error=("never closed",), record=1, byte_offset=8),
    Case("quote never closed, no line end", b'q,r\na,"b', error=("never closed",), record=0, byte_offset=4),
    Case("quote opened by the last byte", b'q,r\na,b\nc,"', error=("never closed",), record=1, byte_offset=8),
    Case("quote never closed behind a stray one", b'q,r\na"b,c\nx,"y\nz,w\n', error=("never closed",),
         record=1, byte_offset=10),
    Case("quote in the header never closed", b'q,"r\na,b\n', error=("header", "never closed"),
         required=("q",)),
    Case("too few fields", b"q,r\na,b\nc\n", error=("1 field where the header has 2",), record=1,
         byte_offset=8),
    Case("too many fields", b"q,r\na,b\nc,d,e\n", error=("3 fields", "has 2"), record=1, byte_offset=8),
    Case("delimiter at the end of a record", b"q,r\na,b,\n", error=("3 fields",), record=0, byte_offset=4),
    Case("a line of spaces", b"q,r\na,b\n  \nc,d\n", error=("1 field where",), record=1, byte_offset=8),
    Case("too few fields behind a stray quote", b'q,r\na"b,c\nd\n', error=("1 field where",), record=1,
         byte_offset=10),
    Case("space before a quoted delimiter", b'q,r\na, "b,c"\n', error=("3 fields",), record=0, byte_offset=4),
    Case("unescaped quotes around a delimiter", b'q,r\n"a "b, c" d",e\n', error=("3 fields",), record=0,
         byte_offset=4),
    Case("bad UTF-8", b"q,r\na,b\nc,\xff\n", error=("0xff", "UTF-8"), record=1, byte_offset=10),
    Case("Latin-1", b"q,r\ncaf\xe9,b\n", error=("0xe9", "UTF-8"), record=0, byte_offset=7),
    Case("a character cut short", b"q,r\na,b\xc3", error=("0xc3", "UTF-8"), record=0, byte_offset=7),
    Case("a surrogate", b"q,r\na,\xed\xa0\x80\n", error=("UTF-8",), record=0, byte_offset=6),
    Case("bad UTF-8 in a quoted field", b'q,r\n"a\nb\xff",c\n', error=("0xff",), record=0, byte_offset=8),
    Case("bad UTF-8 behind a stray quote", b'q,r\na"b,c\nd,\xff\n', error=("0xff",), record=1, byte_offset=12,
         mode="serial"),
    Case("bad UTF-8 in the header", b"q,r,\xff\na,b,c\n", error=("header", "UTF-8")),
    Case("NUL byte", b"q,r\na,b\nc,d\0\n", error=("NUL",), record=1, byte_offset=11),
    Case("NUL byte in a quoted field", b'q,r\na,b\n"c\n\0",d\n', error=("NUL",), record=1, byte_offset=11),
    Case("NUL byte behind a stray quote", b'q,r\na"b,c\nd,\0\n', error=("NUL",), record=1, byte_offset=12),
    Case("NUL byte in the header", b"q,r\0\na,b\n", error=("NUL",), byte_offset=3),
    Case("UTF-16 with a mark", "q,r\na,b\n".encode("utf-16"), error=("UTF-16", "UTF-8")),
    Case("UTF-16 without a mark", "q,r\na,b\n".encode("utf-16-le"), error=("NUL", "UTF-16")),
    Case("a column is missing", b"question,text\na,b\n", error=("lacks the column q, r", "question, text")),
    Case("another case of letters", b"Q,r\na,b\n", error=("lacks the column q", "Q, r")),
    Case("no header", b"a,b\nc,d\n", error=("lacks the column",)),
    Case("a needed column twice", b"q,r,q\n1,2,3\n", error=("column q more than once",)),
    Case("another delimiter than the one given", b"q;r\na;b\n", error=("lacks", "q;r"), delimiter=","),
    Case("an Excel file", b"PK\x03\x04" + bytes(40), error=("Excel",)),
    Case("a gzip header and nothing else", b"\x1f\x8b\x08\0\0\0\0\0\0\x03", error=("damaged or cut short",)),
]
