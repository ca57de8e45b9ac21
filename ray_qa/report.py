"""An evaluation as one web page: figures, charts by kind of row, calibration, and the worst rows.

The page stands alone: its charts are SVG drawn here, it holds no script and asks the network for nothing (its content
security policy forbids both), and whatever came from the input is escaped. Knows figures, not where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Protocol


class Shown(Protocol):
    """What the pages need of any row."""

    @property
    def row_index(self) -> int: ...
    @property
    def question(self) -> str: ...
    @property
    def golds(self) -> Sequence[str]: ...
    @property
    def pieces(self) -> Sequence[tuple[str, str]]: ...


class Row(Shown, Protocol):
    """A row of an evaluation; `slices.WorstRow` has it."""

    @property
    def prediction(self) -> str: ...
    @property
    def score(self) -> float: ...
    @property
    def f1(self) -> float: ...
    @property
    def negative_loss(self) -> float: ...
    @property
    def error(self) -> str | None: ...


def render(figures: Mapping[str, Any], worst: Sequence[Row]) -> str:
    """The page as HTML.

    Args:
        figures: those of `evaluation.EvalResult` by name, what `slices.Summary.to_json` gives, and facts of the run
            (model, input, precision); a figure that is missing or None is left out.
        worst: the rows to show, worst first.
    """
    model, source = _text(figures.get("model", "")), _text(figures.get("input", ""))
    charts = "".join(_slice_chart(found) for found in figures.get("slices", ()))
    parts = [
        f"<header><p class='eyebrow'>ray_qa evaluation</p><h1>{model or 'Evaluation'}</h1>"
        f"<p class='sub'>{source}</p></header>",
        _cards(figures),
        _no_answer(figures),
        "<h2>How far the score can be trusted</h2><div class='grid'>",
        _reliability_chart(
            figures.get("reliability", ()), figures.get("expected_calibration_error"), figures.get("calibration")
        ),
        _coverage_chart(figures.get("coverage", ())),
        "</div>",
        "<h2>By kind of row</h2>",
        "<p class='note'><span class='key f1'></span>F1 <span class='key em'></span>exact match, "
        "with its 95&nbsp;% interval: where intervals overlap, a difference may be chance.</p>",
        f"<div class='grid'>{charts}</div>",
        f"<h2>The {len(worst)} worst rows</h2>" if worst else "<h2>The worst rows</h2><p class='note'>None.</p>",
        "<p class='note'>Lowest F1 first, then highest loss. In the context: <mark class='gold'>the right answer</mark>"
        ", <mark class='prediction'>the model's answer</mark>, <mark class='both'>both</mark>.</p>" if worst else "",
        *(_row_card(number, row) for number, row in enumerate(worst, 1)),
        f"<footer>{_facts(figures)}</footer>",
    ]
    return _page(f"ray_qa: {model}", parts)


class Compared(Shown, Protocol):
    """A row of a comparison; `comparison.Example` has it."""

    @property
    def prediction_a(self) -> str: ...
    @property
    def prediction_b(self) -> str: ...
    @property
    def score_a(self) -> float: ...
    @property
    def score_b(self) -> float: ...
    @property
    def f1_a(self) -> float: ...
    @property
    def f1_b(self) -> float: ...


def render_comparison(figures: Mapping[str, Any], won: Sequence[Compared], lost: Sequence[Compared]) -> str:
    """The page of a comparison of two models as HTML.

    Args:
        figures: what compare.json holds: ``model_a``, ``model_b``, ``exact_match_difference``, ``f1_difference``, the
            two evaluations under ``a`` and ``b``, and facts of the run.
        won, lost: the rows to show, on which b is better and worse.
    """
    names = {model: _text(figures.get(f"model_{model}", model)) for model in "ab"}
    differences = [
        ("Exact match", figures["exact_match_difference"]), ("F1", figures["f1_difference"]),
    ]
    lines = "".join(
        f"<tr><th>{title}</th><td>{_number(figures['a'].get(name), digits)}{unit}</td>"
        f"<td>{_number(figures['b'].get(name), digits)}{unit}</td></tr>"
        for title, name, digits, unit in (
            ("Exact match", "exact_match", 1, " %"), ("F1", "f1", 1, " %"), ("Loss", "loss", 3, ""),
            ("Rows with an answer: F1", "has_answer_f1", 1, " %"),
            ("Rows without an answer: F1", "no_answer_f1", 1, " %"),
        ) if figures["a"].get(name) is not None or figures["b"].get(name) is not None
    )
    counts = "".join(
        f"<tr><th>{title}</th><td>{found['won']:,}</td><td>{found['lost']:,}</td><td>{found['tied']:,}</td></tr>"
        for title, found in differences
    )
    parts = [
        f"<header><p class='eyebrow'>ray_qa comparison</p><h1>{names['b']} against {names['a']}</h1>"
        f"<p class='sub'>{_text(figures.get('input', ''))}</p></header>",
        "<section class='cards'>",
        *(_card(f"{title} gained by b", f"{_signed(found['difference'])}<i>points</i>", _verdict(found))
          for title, found in differences),
        _card("Rows", _number(figures.get("num_rows")), "the same for both"),
        _card("Contexts", _number(figures.get("num_contexts")), "what the intervals are drawn over"),
        "</section>",
        "<h2>What b gains over a</h2><div class='grid'>", _difference_chart(differences),
        "<figure data-chart='figures'><figcaption><b>Figures</b></figcaption><table class='plain'>"
        f"<tr><th></th><th>a</th><th>b</th></tr>{lines}</table><table class='plain'>"
        f"<tr><th>rows</th><th>b better</th><th>b worse</th><th>the same</th></tr>{counts}</table>"
        f"<p class='note'>a: {names['a']}<br>b: {names['b']}</p></figure></div>",
    ]
    for title, rows in (("won by b", won), ("lost by b", lost)):
        parts.append(f"<h2>Rows {title}</h2>")
        parts.append(
            f"<p class='note'>The {len(rows)} with the largest difference in F1; first those where the model that is "
            "worse was surest. In the context: <mark class='gold'>the right answer</mark>.</p>" if rows
            else "<p class='note'>None.</p>"
        )
        parts += [_compared_card(number, row) for number, row in enumerate(rows, 1)]
    parts.append(f"<footer>{_facts(figures)}</footer>")
    return _page(f"ray_qa: {names['b']} against {names['a']}", parts)


def _signed(value: float) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:+.2f}"


def _verdict(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return "too few contexts for an interval"
    verdict = "chance may explain it" if found["low"] <= 0 <= found["high"] else "more than chance"
    return f"{_signed(found['low'])} to {_signed(found['high'])} (95&nbsp;%): {verdict}"


def _difference_chart(differences: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Each difference as a dot with its interval, against no difference at all."""
    left, right, line, width = 90.0, 500.0, 56.0, 520.0
    values = [abs(found[name]) for _, found in differences for name in ("difference", "low", "high")
              if found[name] is not None and math.isfinite(found[name])]
    largest = max([0.5, *values]) * 1.1
    middle, scale = (left + right) / 2, (right - left) / 2 / largest
    height = 20 + line * len(differences) + 24
    content = []
    for share in (-1, -0.5, 0, 0.5, 1):
        x = middle + share * largest / 1.1 * scale
        content.append(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='10' y2='{height - 24:.1f}' class='{'rule' if share else 'ideal'}'/>"
        )
        tick = f"{share * largest / 1.1:+.1f}" if share else "0"
        content.append(_label(x, height - 8, tick, anchor="middle", kind="tick"))
    for i, (title, found) in enumerate(differences):
        y = 20 + (i + 0.5) * line
        content.append(_label(left - 10, y + 4, title, anchor="end", kind="name"))
        if found["low"] is not None:
            low, high = middle + found["low"] * scale, middle + found["high"] * scale
            content.append(
                f"<path d='M{low:.1f} {y:.1f}H{high:.1f}M{low:.1f} {y - 6:.1f}v12M{high:.1f} {y - 6:.1f}v12' "
                "class='whisker'/>"
            )
        if math.isfinite(found["difference"]):
            x = middle + found["difference"] * scale
            content.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='6' fill='var(--em)'/>")
    note = (
        "<br>In percentage points, with the 95&nbsp;% interval (whole contexts drawn again and again): where it spans "
        "the dashed line, the difference may be chance. To the right of it: b is better."
    )
    chart = _svg(width, height, "".join(content), "Differences with their intervals")
    return _figure("Difference", note, chart, "difference")


def _compared_card(number: int, row: Compared) -> str:
    golds = " <span class='or'>or</span> ".join(
        f"<mark class='gold'>{_text(gold)}</mark>" if gold else "<i>no answer</i>" for gold in row.golds
    )
    answers = "".join(
        f"<dt>{model}</dt><dd>{_text(text) if text else '<i>no answer</i>'} <small>score {score:.3f} · F1 {f1:.2f}"
        "</small></dd>"
        for model, text, score, f1 in (
            ("a", row.prediction_a, row.score_a, row.f1_a), ("b", row.prediction_b, row.score_b, row.f1_b)
        )
    )
    return (
        f"<article class='row' data-row='{row.row_index}'><div class='head'><span>{number}</span>"
        f"<h3>{_text(row.question)}</h3><small>row {row.row_index:,}</small></div>"
        f"<dl><dt>right</dt><dd>{golds}</dd>{answers}</dl><p class='context'>{_pieces(row.pieces)}</p></article>"
    )


def _page(title: str, parts: Sequence[str]) -> str:
    """The whole page; ``title`` and ``parts`` are HTML."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _text(value: object) -> str:
    return escape(str(value), quote=True)


def _number(value: Any, digits: int = 1) -> str:
    """A figure for a reader; a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _card(title: str, value: str, note: str = "") -> str:
    return (
        f"<div class='card'><div class='label'>{title}</div><div class='value'>{value}</div>"
        f"<small>{note}</small></div>"
    )


def _cards(figures: Mapping[str, Any]) -> str:
    left_out = figures.get("num_bad_rows") or 0
    repaired = figures.get("num_repaired_rows") or 0
    errors = figures.get("num_error_rows") or 0
    notes = [f"{left_out:,} left out" if left_out else "", f"{repaired:,} repaired" if repaired else "",
             f"{errors:,} without an answer" if errors else ""]
    return (
        "<section class='cards'>"
        + _card("Exact match", f"{_number(figures.get('exact_match'))}<i>%</i>", "equal to a right answer")
        + _card("F1", f"{_number(figures.get('f1'))}<i>%</i>", "words shared with a right answer")
        + _card("Loss", _number(figures.get("loss"), 3), "mean over windows")
        + _card("Rows", _number(figures.get("num_rows")), ", ".join(filter(None, notes)) or "all of the input")
        + _card("Windows", _number(figures.get("num_windows")), "pieces that the model reads")
        + "</section>"
    )


def _no_answer(figures: Mapping[str, Any]) -> str:
    if not figures.get("num_no_answer"):
        return ""
    lines = "".join(
        f"<tr><th>{title}</th><td>{_number(figures.get(f'num_{name}'))}</td>"
        f"<td>{_number(figures.get(f'{name}_exact_match'))} %</td><td>{_number(figures.get(f'{name}_f1'))} %</td></tr>"
        for name, title in (("has_answer", "with an answer"), ("no_answer", "without an answer"))
    )
    best = ""
    if figures.get("best_f1") is not None:
        best = (
            "<p class='note'>With the best null threshold for these rows: exact match "
            f"<b>{_number(figures.get('best_exact_match'))}&nbsp;%</b> (answer nothing above a null score of "
            f"{_number(figures.get('best_exact_match_threshold'), 4)}), F1 "
            f"<b>{_number(figures.get('best_f1'))}&nbsp;%</b> "
            f"(above {_number(figures.get('best_f1_threshold'), 4)}).</p>"
        )
    return (
        "<h2>Rows with and without an answer</h2><table class='plain'><tr><th></th><th>rows</th><th>exact match</th>"
        f"<th>F1</th></tr>{lines}</table>{best}"
    )


def _figure(title: str, note: str, chart: str, kind: str) -> str:
    return f"<figure data-chart='{kind}'><figcaption><b>{_text(title)}</b>{note}</figcaption>{chart}</figure>"


def _svg(width: float, height: float, content: str, label: str) -> str:
    return f"<svg viewBox='0 0 {width:g} {height:g}' role='img' aria-label='{_text(label)}'>{content}</svg>"


def _label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' class='{kind}'>{_text(text)}</text>"


def _slice_chart(found: Mapping[str, Any]) -> str:
    """One bar per label: F1, exact match in it, the interval of exact match; counts and loss beside."""
    left, right, line, width = 112.0, 330.0, 30.0, 520.0
    buckets = found["buckets"]
    height = 24 + line * len(buckets) + 18
    scale = (right - left) / 100
    content = []
    for share in (0, 25, 50, 75, 100):
        x = left + share * scale
        content.append(f"<line x1='{x:.1f}' x2='{x:.1f}' y1='20' y2='{height - 16:.1f}' class='rule'/>")
        content.append(_label(x, height - 3, str(share), anchor="middle", kind="tick"))
    for x, head in ((384, "EM %"), (428, "F1 %"), (470, "loss"), (516, "rows")):
        content.append(_label(x, 12, head, anchor="end", kind="tick"))
    for i, bucket in enumerate(buckets):
        y = 24 + i * line
        exact, f1 = bucket["exact_match"], bucket["f1"]
        low, high = left + bucket["exact_match_low"] * scale, left + bucket["exact_match_high"] * scale
        content += [
            f"<g class='bucket'><title>{_text(bucket['label'])}</title>",
            _label(left - 8, y + 15, bucket["label"], anchor="end", kind="name"),
            f"<rect x='{left}' y='{y + 2:.1f}' width='{f1 * scale:.1f}' height='18' rx='2' class='f1'/>",
            f"<rect x='{left}' y='{y + 6:.1f}' width='{exact * scale:.1f}' height='10' rx='1' class='em'/>",
            *(f"<path d='M{low:.1f} {y + 11:.1f}H{high:.1f}M{low:.1f} {y + 7:.1f}v8M{high:.1f} {y + 7:.1f}v8' "
              f"class='{kind}'/>" for kind in ("halo", "whisker")),
            _label(384, y + 15, _number(exact), anchor="end", kind="cell"),
            _label(428, y + 15, _number(f1), anchor="end", kind="cell"),
            _label(470, y + 15, _number(bucket["loss"], 2), anchor="end", kind="cell"),
            _label(516, y + 15, _number(bucket["num_rows"]), anchor="end", kind="cell"),
            "</g>",
        ]
    chart = _svg(width, height, "".join(content), f"Exact match and F1 by {found['title']}")
    return _figure(found["title"], "", chart, f"slice-{_text(found['name'])}")


_SIZE, _MARGIN = 400.0, 44.0


def _axes(x_title: str, y_title: str) -> str:
    """Both axes from 0 to 100 % in a square."""
    inner = _SIZE - 2 * _MARGIN
    content = []
    for share in (0, 25, 50, 75, 100):
        x, y = _MARGIN + share / 100 * inner, _SIZE - _MARGIN - share / 100 * inner
        content += [
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='{_MARGIN}' y2='{_SIZE - _MARGIN}' class='rule'/>",
            f"<line x1='{_MARGIN}' x2='{_SIZE - _MARGIN}' y1='{y:.1f}' y2='{y:.1f}' class='rule'/>",
            _label(x, _SIZE - _MARGIN + 16, str(share), anchor="middle", kind="tick"),
            _label(_MARGIN - 6, y + 4, str(share), anchor="end", kind="tick"),
        ]
    content.append(_label(_SIZE / 2, _SIZE - 8, x_title, anchor="middle", kind="axis"))
    content.append(_label(_MARGIN - 30, _MARGIN - 18, y_title, kind="axis"))
    return "".join(content)


def _at(x_share: float, y_share: float) -> tuple[float, float]:
    """Where 0..1 on both axes lies."""
    inner = _SIZE - 2 * _MARGIN
    return _MARGIN + x_share * inner, _SIZE - _MARGIN - y_share * inner


def _calibration(found: Mapping[str, Any]) -> str:
    """What the calibration gains on contexts that its fit has not seen."""
    names = (("negative_log_likelihood", "negative log-likelihood"), ("brier_score", "Brier score"))
    lines = "".join(
        f"<tr><td>{title}</td><td>{found[name]['before']:.3f}</td><td>{found[name]['after']:.3f}</td>"
        f"<td>{found[name]['gain_low']:.3f} to {found[name]['gain_high']:.3f}</td></tr>"
        for name, title in names
    )
    return (
        f"<p class='calibration'>Calibrated (the curve): temperature {found['temperature']:.2f}, offset "
        f"{found['offset']:+.2f}. Fitted on half of the contexts and measured on the other "
        f"{found['num_rows_measured']:,} rows (lower is better; 95&nbsp;% interval over contexts):</p>"
        f"<table class='plain'><tr><th></th><th>before</th><th>after</th><th>gain</th></tr>{lines}</table>"
    )


def _reliability_chart(
    bins: Sequence[Mapping[str, Any]], error: float | None, calibration: Mapping[str, Any] | None
) -> str:
    """Bars of exact match per bin of the score, against the diagonal of a score that means what it says."""
    largest = max((found["num_rows"] for found in bins), default=1)
    content = [_axes("score of the answer, %", "exact match, %")]
    counts = []
    for found in bins:
        left, top = _at(found["low"], found["exact_match"] / 100)
        right, bottom = _at(found["high"], 0)
        opacity = 0.25 + 0.75 * math.sqrt(found["num_rows"] / largest)
        title = f"score {found['low']:.0%}–{found['high']:.0%}: {found['num_rows']:,} rows, mean score " \
                f"{found['score']:.1%}, exact match {found['exact_match']:.1f} %"
        content.append(
            f"<rect x='{left + 1:.1f}' y='{top:.1f}' width='{right - left - 2:.1f}' height='{bottom - top:.1f}' "
            f"class='em' opacity='{opacity:.2f}'><title>{_text(title)}</title></rect>"
        )
        counts.append(_label((left + right) / 2, top - 4, f"{found['num_rows']:,}", anchor="middle", kind="tick count"))
    (x1, y1), (x2, y2) = _at(0, 0), _at(1, 1)
    content.append(f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' class='ideal'/>")
    below = ""
    if calibration is not None:
        line = " ".join("{:.1f},{:.1f}".format(*_at(*point)) for point in calibration["curve"])
        content.append(f"<polyline points='{line}' class='line curve'/>")
        below = _calibration(calibration)
    note = (
        "<br>Of the answers with a score of 0.8, are 8 in 10 right? Bars below the dashed line: the model is too sure "
        "of itself. Above a bar: rows."
        + ("" if error is None else f" Expected calibration error: {error:.3f}.")
    )
    chart = _svg(_SIZE, _SIZE, "".join([*content, *counts]), "Reliability diagram")
    return _figure("Reliability", note, chart + below, "reliability")


def _coverage_chart(points: Sequence[Mapping[str, Any]]) -> str:
    """Exact match and F1 over the best-scored share of rows."""
    content = [_axes("answers kept, %, highest score first", "%")]
    for name in ("f1", "exact_match"):
        line = " ".join("{:.1f},{:.1f}".format(*_at(p["coverage"] / 100, p[name] / 100)) for p in points)
        content.append(f"<polyline points='{line}' class='line {'f1' if name == 'f1' else 'em'}'/>")
    for point in points:
        x, y = _at(point["coverage"] / 100, point["exact_match"] / 100)
        title = f"score at least {point['threshold']:.3f}: {point['coverage']:.0f} % of rows, exact match " \
                f"{point['exact_match']:.1f} %, F1 {point['f1']:.1f} %"
        content.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' class='spot'><title>{_text(title)}</title></circle>")
    note = (
        "<br>How good the answers are if only those with the highest scores are kept. "
        "<span class='key f1'></span>F1 <span class='key em'></span>exact match"
    )
    chart = _svg(_SIZE, _SIZE, "".join(content), "Coverage and accuracy")
    table = "".join(
        f"<tr><td>{_number(point['coverage'], 0)} %</td><td>{point['threshold']:.3f}</td>"
        f"<td>{_number(point['exact_match'])} %</td><td>{_number(point['f1'])} %</td></tr>"
        for point in _near(points, (10, 25, 50, 75, 100))
    )
    head = "<tr><th>kept</th><th>score from</th><th>exact match</th><th>F1</th></tr>"
    return _figure("Coverage and accuracy", note, f"{chart}<table class='plain'>{head}{table}</table>", "coverage")


def _near(points: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> list[Mapping[str, Any]]:
    """The points whose coverage is nearest to each of ``shares``, each point once."""
    chosen: dict[float, Mapping[str, Any]] = {}
    for share in shares if points else ():
        point = min(points, key=lambda p: abs(p["coverage"] - share))
        chosen[point["coverage"]] = point
    return list(chosen.values())


def _row_card(number: int, row: Row) -> str:
    golds = " <span class='or'>or</span> ".join(
        f"<mark class='gold'>{_text(gold)}</mark>" if gold else "<i>no answer</i>" for gold in row.golds
    )
    prediction = f"<mark class='prediction'>{_text(row.prediction)}</mark>" if row.prediction else "<i>no answer</i>"
    error = f"<p class='error'>{_text(row.error)}</p>" if row.error else ""
    return (
        f"<article class='row' data-row='{row.row_index}'><div class='head'><span>{number}</span>"
        f"<h3>{_text(row.question)}</h3><small>row {row.row_index:,}<br>score {row.score:.3f} · F1 {row.f1:.2f} · "
        f"loss {-row.negative_loss:.2f}</small></div>{error}"
        f"<dl><dt>right</dt><dd>{golds}</dd><dt>model</dt><dd>{prediction}</dd></dl>"
        f"<p class='context'>{_pieces(row.pieces)}</p></article>"
    )


def _pieces(pieces: Sequence[tuple[str, str]]) -> str:
    return "".join(
        f"<span class='gap'>[… {_text(text)} …]</span>" if mark == "gap"
        else f"<mark class='{mark}'>{_text(text)}</mark>" if mark else _text(text)
        for text, mark in pieces
    )


def _facts(figures: Mapping[str, Any]) -> str:
    names = ("precision", "device", "num_workers", "rows_per_second", "normalization", "language", "version")
    facts = [f"{name.replace('_', ' ')}: {_text(figures[name])}" for name in names if figures.get(name) is not None]
    return " · ".join(facts)


_STYLE = """
:root{color-scheme:light dark;--page:#f6f7f9;--card:#fff;--ink:#1b2430;--soft:#5d6b7c;--rule:#e3e7ec;--em:#2a5fb4;
--f1:#b9d0f2;--f1-line:#86aeea;--curve:#d9731a;--gold:#c5ecd0;--gold-ink:#0d4a22;--pred:#ffd9c2;--pred-ink:#7a2c05;--both:#e6defc;--both-ink:#41207e}
@media(prefers-color-scheme:dark){:root{--page:#12161c;--card:#1b212a;--ink:#e6ebf2;--soft:#94a3b5;--rule:#2b3440;
--em:#6fa3f2;--f1:#2c4c7c;--f1-line:#41689f;--curve:#f0994f;--gold:#1d4a2c;--gold-ink:#c9f2d6;--pred:#5c2f16;--pred-ink:#ffdcc7;--both:#3c2d66;
--both-ink:#e3d9ff}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:36px 24px 60px}
.eyebrow{margin:0;color:var(--em);font-weight:600;letter-spacing:.04em;font-size:13px}
h1{margin:2px 0;font-size:27px;line-height:1.25;overflow-wrap:anywhere}h2{margin:40px 0 8px;font-size:20px}
.sub,.note,small,footer{color:var(--soft)}.sub{margin:0;overflow-wrap:anywhere}.note{margin:0 0 14px}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:14px;margin-top:24px}
.card,figure,.row{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.card{padding:14px 18px}.label{font-weight:600;color:var(--soft);font-size:13px}
.value{font-size:31px;font-weight:650;line-height:1.3;font-variant-numeric:tabular-nums}
.value i{font-size:17px;font-style:normal;color:var(--soft);margin-left:2px}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(460px,100%),1fr));gap:14px}
figure{margin:0;padding:16px 20px}figcaption{margin-bottom:10px;color:var(--soft)}
figcaption b{color:var(--ink);font-size:16px}svg{display:block;width:100%;height:auto}
figure[data-chart=reliability] svg,figure[data-chart=coverage] svg{max-width:440px;margin:0 auto}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif;fill:var(--ink)}
svg text.tick,svg text.axis{fill:var(--soft)}svg text.tick{font-size:11px}
svg text.count{paint-order:stroke;stroke:var(--card);stroke-width:3px;stroke-linejoin:round}
svg text.cell{font-variant-numeric:tabular-nums}
.rule{stroke:var(--rule)}rect.f1{fill:var(--f1)}rect.em{fill:var(--em)}
.ideal{stroke:var(--ink);stroke-width:1.3;stroke-dasharray:5 4}
.whisker{stroke:var(--ink);stroke-width:1.3;fill:none}.halo{stroke:var(--card);stroke-width:3.5;fill:none}
.line{fill:none;stroke-width:2.5;stroke-linejoin:round}.line.em{stroke:var(--em)}.line.f1{stroke:var(--f1-line)}
.line.curve{stroke:var(--curve)}.calibration{margin:10px 0 0;color:var(--soft)}
.spot{fill:transparent}.spot:hover{fill:var(--em)}
.key{display:inline-block;width:12px;height:12px;border-radius:2px;margin:0 5px 0 8px;vertical-align:-1px}
.key.em{background:var(--em)}.key.f1{background:var(--f1)}
table.plain{border-collapse:collapse;margin:10px 0;font-variant-numeric:tabular-nums}
table.plain th,table.plain td{padding:3px 20px 3px 0;text-align:left;border-bottom:1px solid var(--rule)}
table.plain th{color:var(--soft);font-weight:500}
.row{margin-bottom:14px;padding:16px 20px}.head{display:flex;gap:14px;align-items:flex-start}
.head>span{flex:none;min-width:28px;height:28px;border-radius:8px;background:var(--page);text-align:center;
line-height:28px;font-size:13px;color:var(--soft)}
.head h3{margin:1px 0 0;flex:1;font-size:16px;overflow-wrap:anywhere}.head small{flex:none;text-align:right;
font-variant-numeric:tabular-nums;line-height:1.4}
dl{display:grid;grid-template-columns:auto 1fr;gap:4px 12px;margin:8px 0 10px 42px}dt{color:var(--soft);font-size:13px;
padding-top:1px}dd{margin:0;overflow-wrap:anywhere}.or{color:var(--soft);font-size:13px}
.context{margin:0 0 0 42px;padding-top:10px;border-top:1px solid var(--rule);color:var(--soft);white-space:pre-wrap;
overflow-wrap:anywhere;font-size:14px;unicode-bidi:plaintext}
.error{margin:6px 0 0 42px;color:var(--pred-ink)}.gap{opacity:.7;font-style:italic}
mark{border-radius:3px;padding:1px 3px;color:inherit}mark.gold{background:var(--gold);color:var(--gold-ink)}
mark.prediction{background:var(--pred);color:var(--pred-ink)}mark.both{background:var(--both);color:var(--both-ink)}
footer{margin-top:36px;font-size:13px}
@media(max-width:560px){.head{flex-wrap:wrap}.head small{flex-basis:100%;text-align:left}
dl,.context,.error{margin-left:0}}
@media print{body{background:#fff}.card,figure,.row{break-inside:avoid}}
"""
