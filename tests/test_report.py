"""The page in a real browser: charts and rows are there, and whatever the input holds stays text."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pytest

from ray_qa.comparison import Example
from ray_qa.report import render, render_comparison
from ray_qa.slices import DETAILS, Summary
from tests.test_slices import random_lines

HOSTILE = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
CONTEXT = f"Ann has 3 keys & {HOSTILE} Bob's \"none\" 東京 العالم."
FIGURES = {
    "loss": 1.25, "exact_match": 43.6, "f1": 57.3, "num_rows": 60, "num_windows": 75, "num_bad_rows": 2,
    "num_repaired_rows": 0, "num_error_rows": 1, "num_has_answer": 50, "num_no_answer": 10,
    "has_answer_exact_match": 40.0, "has_answer_f1": 50.0, "no_answer_exact_match": 70.0, "no_answer_f1": 70.0,
    "best_exact_match": 51.5, "best_exact_match_threshold": 0.25, "best_f1": 60.0, "best_f1_threshold": 0.5,
    "model": f"model {HOSTILE}", "input": f"rows {HOSTILE}.csv", "precision": "fp32",
}


def page() -> str:
    lines = random_lines(11, 60)
    for line in lines:
        line |= {"question": f"who? {HOSTILE}", "prediction": "Ann" + HOSTILE, "golds": ["Bob's", HOSTILE],
                 "answer_start": 8, "answer_end": 40, "start": 0, "end": 14, "error": f"long {HOSTILE}"}
    summary = Summary.of(pa.Table.from_pylist(lines, schema=DETAILS), [CONTEXT] * len(lines))
    return render(FIGURES | summary.to_json(), summary.worst)


class Reader(HTMLParser):
    """Tags, classes and text of a page as a browser would see them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.charts: list[str] = []
        self.rows = 0
        self.addresses: list[str] = []
        self.context = ""
        self.marks: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.charts += [str(found["data-chart"])] if "data-chart" in found else []
        self.rows += "data-row" in found
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "p" and found.get("class") == "context" and not self.context:
            self._inside = True
        if tag == "mark" and self._inside:
            self.marks.append(str(found["class"]))
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag != "p"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.context += data


def check(html: str) -> None:
    reader = Reader(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags) and not reader.addresses
    slices = {f"slice-{name}" for name in
              ("question_word", "answer_length", "answer_position", "context_length", "num_windows")}
    assert set(reader.charts) == slices | {"reliability", "coverage"} and len(reader.charts) == 7
    assert reader.tags.count("svg") == 7 and reader.rows == 50
    assert reader.context == CONTEXT
    assert reader.marks == ["prediction", "both", "gold"]


def test_page_has_its_charts_and_rows_and_no_foreign_markup() -> None:
    html = page()
    check(html)
    assert "url(" not in html and "@import" not in html
    for text in ("43.6", "57.3", "1.250", "2 left out", "Rows with and without an answer", "51.5", "row "):
        assert text in html


def comparison_page(**changes: object) -> str:
    example = Example(-1.0, -0.5, 7, f"who? {HOSTILE}", ("Bob's", HOSTILE), "Ann" + HOSTILE, "", 0.5, 0.25, 0.0, 1.0,
                      (("Ann & ", ""), (HOSTILE, "gold")))
    gained = {"difference": 2.5, "low": 0.75, "high": 4.25, "won": 80, "lost": 50, "tied": 1060}
    figures = {
        "model_a": f"first {HOSTILE}", "model_b": "second", "input": f"{HOSTILE}.csv", "num_rows": 1190,
        "num_contexts": 240, "exact_match_difference": gained, "f1_difference": gained | {"low": -0.5}, "a": FIGURES,
        "b": FIGURES, "precision": "fp32",
    }
    return render_comparison(figures | changes, [example] * 3, [example] * 2)


def check_comparison(html: str) -> None:
    reader = Reader(html)
    assert not {"script", "img", "link", "iframe", "object"} & set(reader.tags) and not reader.addresses
    assert reader.rows == 5 and reader.charts == ["difference", "figures"] and reader.tags.count("svg") == 1
    assert reader.context == f"Ann & {HOSTILE}" and reader.marks == ["gold"]


def test_page_of_a_comparison_has_its_figures_and_rows_and_no_foreign_markup() -> None:
    html = comparison_page()
    check_comparison(html)
    for text in ("+2.50", "+0.75 to +4.25 (95&nbsp;%): more than chance", "-0.50 to +4.25 (95&nbsp;%): chance may",
                 "<td>80</td><td>50</td><td>1,060</td>", "1,190", "240", "43.6", "score 0.500 · F1 0.00"):
        assert text in html, text


def test_page_of_a_comparison_without_intervals_or_rows() -> None:
    nothing = {"difference": float("nan"), "low": None, "high": None, "won": 0, "lost": 0, "tied": 0}
    html = comparison_page(exact_match_difference=nothing, f1_difference=nothing)
    assert "too few contexts for an interval" in html and "nan" not in html


def test_page_shows_what_a_calibration_gains() -> None:
    gain = {"before": 0.671, "after": 0.597, "gain_low": 0.035, "gain_high": 0.115}
    found = {"temperature": 1.83, "offset": -0.41, "num_rows_measured": 596, "negative_log_likelihood": gain,
             "brier_score": gain, "curve": [[0.0, 0.0], [0.5, 0.4], [1.0, 1.0]]}
    html = render(FIGURES | Summary().to_json() | {"calibration": found}, ())
    for text in ("temperature 1.83", "offset -0.41", "596 rows", "<td>0.671</td><td>0.597</td><td>0.035 to 0.115</td>"):
        assert text in html
    assert "points='44.0,356.0 200.0,231.2 356.0,44.0' class='line curve'" in html
    assert "class='line curve'" not in page()


def test_page_of_nothing() -> None:
    html = render({"loss": float("nan"), "num_rows": 0} | Summary().to_json(), ())
    assert "–" in html and "nan" not in html.lower() and "None." in html
    assert "Rows with and without" not in html


@pytest.fixture(scope="module")
def chromium() -> str:
    """Debian's Chromium; skipped where it is absent, except in CI, which installs it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        if os.environ.get("CI"):
            pytest.fail("chromium is absent; in CI it has to be there (apt-get install chromium)", pytrace=False)
        pytest.skip("chromium is absent")
    return found


def browse(chromium: str, address: str, folder: Path, *flags: str) -> str:
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={folder / 'profile'}", *flags, address,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_browser_draws_the_page(chromium: str, tmp_path: Path) -> None:
    path, picture = tmp_path / "report.html", tmp_path / "report.png"
    path.write_text(page(), encoding="utf-8")
    dom = browse(chromium, path.as_uri(), tmp_path, "--dump-dom")
    check(re.sub(r"<!--.*?-->", "", dom))
    title = re.search(r"<title>(.*?)</title>", dom)
    assert title is not None and title[1].startswith("ray_qa: model ")  # and not "taken": nothing was run
    browse(chromium, path.as_uri(), tmp_path, f"--screenshot={picture}", "--window-size=1200,1600", "--hide-scrollbars")
    data = picture.read_bytes()
    assert data.startswith(b"\x89PNG") and int.from_bytes(data[16:20], "big") == 1200
    assert len(data) > 50_000  # an empty page of this size has some 10 kB


def test_a_browser_draws_the_comparison(chromium: str, tmp_path: Path) -> None:
    path = tmp_path / "compare.html"
    path.write_text(comparison_page(), encoding="utf-8")
    dom = browse(chromium, path.as_uri(), tmp_path, "--dump-dom")
    check_comparison(re.sub(r"<!--.*?-->", "", dom))
    assert "<title>ray_qa: second against first &lt;script&gt;" in dom  # and not "taken": nothing was run


def test_the_browser_would_have_run_it(chromium: str, tmp_path: Path) -> None:
    """The same text unescaped takes the title: the test above can fail."""
    path = tmp_path / "open.html"
    path.write_text(f"<!doctype html><title>safe</title>{HOSTILE}", encoding="utf-8")
    assert "<title>taken</title>" in browse(chromium, path.as_uri(), tmp_path, "--dump-dom")
