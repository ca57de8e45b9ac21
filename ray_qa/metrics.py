"""Exact match, F1 and no-answer figures of predicted answers, as sums that can be merged.

Knows strings and numbers only: not the model, not the files, not how rows are spread over workers.

Sources: normalization, exact match and F1 are those of SQuAD's evaluation (Rajpurkar et al. 2016),
with SQuAD 2.0's rule that an empty answer scores 1 against an empty gold answer and 0 against any
other (Rajpurkar et al. 2018); "mlqa" is the normalization of MLQA's evaluation (Lewis et al. 2020);
the best null threshold is SQuAD 2.0's.
"""

from __future__ import annotations

import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Literal, NamedTuple

import numpy as np

from ray_qa.errors import OptionError

Normalization = Literal["squad", "mlqa"]


class _Language(NamedTuple):
    """How MLQA's normalization treats a language: what is an article, what a token of its own (regexes)."""

    articles: str = "(?!)"
    unspaced: str = "(?!)"


_HAN = "\u4e00-\u9fa5"  # MLQA's own range; rarer ideographs stay with their neighbours
# Vowel signs and tones of Thai, Lao, Burmese and Khmer: they belong to the letter before them.
_MARKS = "".join(
    chr(i) for i in (*range(0x0E00, 0x10A0), *range(0x1780, 0x1800)) if unicodedata.category(chr(i))[0] == "M"
)

#: Languages of ``normalization="mlqa"``. en, es, de, ar, hi, vi and zh are MLQA's. The rest is ours:
#: no article is removed, and F1 counts words between white space, but characters (with the marks
#: on them) where the script has no spaces between words: Thai, Lao, Khmer, Burmese, Japanese.
#: Such figures compare with each other, not with published ones that used a word segmenter.
#: "other" stands for any further language with spaces.
LANGUAGES: dict[str, _Language] = {
    "en": _Language(articles=r"\b(?:a|an|the)\b"),
    "es": _Language(articles=r"\b(?:un|una|unos|unas|el|la|los|las)\b"),
    "de": _Language(articles=r"\b(?:ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b"),
    "ar": _Language(articles="ال"),  # wherever it stands, also inside a word: so MLQA does
    "hi": _Language(),
    "vi": _Language(articles=r"\b(?:của|là|cái|chiếc|những)\b"),
    "zh": _Language(unspaced=f"[{_HAN}]"),
    "ja": _Language(unspaced=f"[{_HAN}々〇\u3040-\u30ff\u31f0-\u31ff\uff66-\uff9f]"),
    "th": _Language(unspaced=f"[\u0e00-\u0e7f][{_MARKS}]*"),
    "lo": _Language(unspaced=f"[\u0e80-\u0eff][{_MARKS}]*"),
    "km": _Language(unspaced=f"[\u1780-\u17ff][{_MARKS}]*"),
    "my": _Language(unspaced=f"[\u1000-\u109f][{_MARKS}]*"),
    "other": _Language(),
}

_SQUAD_PUNCTUATION = str.maketrans("", "", string.punctuation)
_SQUAD_ARTICLES = re.compile(LANGUAGES["en"].articles)


def normalize(text: str, *, normalization: Normalization = "squad", language: str = "en") -> str:
    """``text`` as it is compared: lower case, no punctuation, no articles, tokens between single spaces.

    "squad" removes ASCII punctuation and English articles whatever ``language`` says; "mlqa" removes
    all Unicode punctuation and the articles of ``language`` (a key of LANGUAGES), and separates the
    characters of scripts without spaces.

    Raises:
        OptionError: a normalization or language that is not there.
    """
    return _normalizer(normalization, language)(text)


@cache
def _normalizer(normalization: str, language: str) -> Callable[[str], str]:
    if normalization == "squad":
        return _normalize_squad
    if normalization != "mlqa":
        raise OptionError(f"normalization is {normalization!r}; allowed: 'squad', 'mlqa'")
    if language not in LANGUAGES:
        raise OptionError(f"language is {language!r}; allowed: {', '.join(map(repr, LANGUAGES))}")
    # Category P and ASCII's symbols; built once, because it looks at every code point.
    removed = dict.fromkeys(i for i in range(sys.maxunicode + 1) if unicodedata.category(chr(i))[0] == "P")
    removed.update(_SQUAD_PUNCTUATION)
    articles = re.compile(LANGUAGES[language].articles)
    unspaced = re.compile(f"({LANGUAGES[language].unspaced})")

    def normalize_mlqa(text: str) -> str:
        bare = articles.sub(" ", text.lower().translate(removed))
        return " ".join(unspaced.sub(r" \1 ", bare).split())

    return normalize_mlqa


def _normalize_squad(text: str) -> str:
    return " ".join(_SQUAD_ARTICLES.sub(" ", text.lower().translate(_SQUAD_PUNCTUATION)).split())


class RowScore(NamedTuple):
    """One row: exact_match is 0 or 1, f1 from 0 to 1; has_answer: some gold answer is not empty."""

    exact_match: float
    f1: float
    has_answer: bool


def score_row(
    prediction: str, golds: Sequence[str], *, normalization: Normalization = "squad", language: str = "en"
) -> RowScore:
    """The best score of ``prediction`` over the gold answers; no gold answer at all is the same as [""]."""
    normalizer = _normalizer(normalization, language)
    predicted = normalizer(prediction)
    normalized = {normalizer(gold) for gold in golds} or {""}
    has_answer = any(gold.strip() for gold in golds)
    if predicted in normalized:
        return RowScore(1.0, 1.0, has_answer)
    return RowScore(0.0, max(_token_f1(predicted.split(), gold.split()) for gold in normalized), has_answer)


def exact_match(
    prediction: str, golds: Sequence[str], *, normalization: Normalization = "squad", language: str = "en"
) -> float:
    """1.0 where ``prediction`` equals one of ``golds`` after normalization, else 0.0."""
    return score_row(prediction, golds, normalization=normalization, language=language).exact_match


def f1(
    prediction: str, golds: Sequence[str], *, normalization: Normalization = "squad", language: str = "en"
) -> float:
    """Harmonic mean of token precision and recall, 0 to 1, against the gold answer that fits best."""
    return score_row(prediction, golds, normalization=normalization, language=language).f1


def _token_f1(predicted: list[str], gold: list[str]) -> float:
    shared = sum((Counter(predicted) & Counter(gold)).values())
    # 2PR / (P + R) with P = shared / predicted, R = shared / gold.
    return 2 * shared / (len(predicted) + len(gold)) if shared else 0.0


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Partial sums over rows and windows; ``a + b`` is the sums over both.

    Sums of F1 and loss are float64 and rounded in the order of addition: add parts in their order
    where the last bit must not depend on who computed them. Percentages run from 0 to 100; a mean
    over nothing is NaN.
    """

    num_has_answer: int = 0
    num_no_answer: int = 0
    has_answer_exact_match_sum: float = 0.0
    has_answer_f1_sum: float = 0.0
    no_answer_exact_match_sum: float = 0.0
    no_answer_f1_sum: float = 0.0
    loss_sum: float = 0.0
    num_windows: int = 0

    @classmethod
    def of(cls, rows: Iterable[RowScore], *, loss_sum: float = 0.0, num_windows: int = 0) -> Scores:
        """The sums of ``rows``, with the summed loss over their ``num_windows`` windows."""
        sums: dict[bool, list[RowScore]] = {True: [], False: []}
        for row in rows:
            sums[row.has_answer].append(row)
        return cls(
            num_has_answer=len(sums[True]),
            num_no_answer=len(sums[False]),
            has_answer_exact_match_sum=math.fsum(row.exact_match for row in sums[True]),
            has_answer_f1_sum=math.fsum(row.f1 for row in sums[True]),
            no_answer_exact_match_sum=math.fsum(row.exact_match for row in sums[False]),
            no_answer_f1_sum=math.fsum(row.f1 for row in sums[False]),
            loss_sum=loss_sum,
            num_windows=num_windows,
        )

    def __add__(self, other: Scores) -> Scores:
        names = [item.name for item in fields(self)]
        return Scores(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def num_rows(self) -> int:
        return self.num_has_answer + self.num_no_answer

    @property
    def exact_match_sum(self) -> float:
        return self.has_answer_exact_match_sum + self.no_answer_exact_match_sum

    @property
    def f1_sum(self) -> float:
        return self.has_answer_f1_sum + self.no_answer_f1_sum

    @property
    def loss(self) -> float:
        """Mean over all windows."""
        return _ratio(self.loss_sum, self.num_windows)

    @property
    def exact_match(self) -> float:
        return 100 * _ratio(self.exact_match_sum, self.num_rows)

    @property
    def f1(self) -> float:
        return 100 * _ratio(self.f1_sum, self.num_rows)

    @property
    def has_answer_exact_match(self) -> float:
        return 100 * _ratio(self.has_answer_exact_match_sum, self.num_has_answer)

    @property
    def has_answer_f1(self) -> float:
        return 100 * _ratio(self.has_answer_f1_sum, self.num_has_answer)

    @property
    def no_answer_exact_match(self) -> float:
        return 100 * _ratio(self.no_answer_exact_match_sum, self.num_no_answer)

    @property
    def no_answer_f1(self) -> float:
        return 100 * _ratio(self.no_answer_f1_sum, self.num_no_answer)


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


class BestThreshold(NamedTuple):
    """The best percentage, and the null probability above which "" is answered to reach it."""

    percentage: float
    threshold: float


#: Bins of the null probability, even in its log-odds between -40 and 40.
NUM_BINS = 1 << 16
_LOG_ODDS_LIMIT = 40.0
# Gains are whole multiples of 2**-30, so that they add up to the same whatever the order; an int64
# holds the sums of 8e9 rows.
_GAIN_UNIT = 1 << 30


def _no_bins() -> np.ndarray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class NullThresholds:
    """What is needed to find the best null threshold; ``a + b`` is the same over the rows of both.

    A row is answered "" where its null probability is above the threshold. Raising the threshold
    past a row swaps its "" for its best answer with text: that is the row's gain, its score where it
    has an answer, -1 where it has none. SQuAD 2.0 sorts all rows by null probability and keeps the
    threshold with the highest running sum of gains. Here the rows are kept as sums per bin (0.12 %
    of the odds wide), with the largest null probability seen in it, so the memory is bounded by 32
    bytes x min(rows, 65,536), 2 MiB, whatever the number of rows. The percentage is exactly what
    the threshold gives on these rows; it is below SQuAD's only by what a threshold between two rows
    of one bin could gain. Thresholds that would separate rows with the same null probability, which
    SQuAD's running sum counts and nobody can apply, are not considered. The sums are whole numbers:
    the outcome does not depend on the order of merging.

    ``bins`` ascending, int64[k]; ``exact_match_gains``, ``f1_gains`` int64[k] in units of 2**-30;
    ``largest`` float64[k].
    """

    num_rows: int = 0
    num_no_answer: int = 0
    bins: np.ndarray = field(default_factory=_no_bins)
    exact_match_gains: np.ndarray = field(default_factory=_no_bins)
    f1_gains: np.ndarray = field(default_factory=_no_bins)
    largest: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @classmethod
    def of(
        cls,
        null_probabilities: Sequence[float] | np.ndarray,
        answers: Sequence[str],
        rows: Sequence[RowScore],
    ) -> NullThresholds:
        """Rows, one entry each.

        Args:
            null_probabilities: n numbers from 0 to 1, the probability that there is no answer.
            answers: the best answer *with* text (before any threshold); "" where there is none.
            rows: score_row of those answers.

        Raises:
            OptionError: a null probability that is not a number from 0 to 1.
        """
        probabilities = np.asarray(null_probabilities, dtype=np.float64)
        outside = np.flatnonzero(~((probabilities >= 0) & (probabilities <= 1)))
        if outside.size:
            raise OptionError(
                f"null_probabilities[{outside[0]}] is {probabilities[outside[0]]}; allowed: 0 to 1"
            )
        with np.errstate(divide="ignore"):
            log_odds = np.log(probabilities) - np.log1p(-probabilities)
        share = (np.clip(log_odds, -_LOG_ODDS_LIMIT, _LOG_ODDS_LIMIT) / _LOG_ODDS_LIMIT + 1) / 2
        bins = np.minimum((share * NUM_BINS).astype(np.int64), NUM_BINS - 1)
        gains = np.zeros((2, len(rows)))
        for i, (answer, row) in enumerate(zip(answers, rows, strict=True)):
            gains[:, i] = (row.exact_match, row.f1) if row.has_answer else (-1.0 if answer else 0.0)
        exact_match_gains, f1_gains = np.rint(gains * _GAIN_UNIT).astype(np.int64)
        num_no_answer = sum(not row.has_answer for row in rows)
        return cls._summed(len(rows), num_no_answer, bins, exact_match_gains, f1_gains, probabilities)

    @classmethod
    def _summed(
        cls, num_rows: int, num_no_answer: int, bins: np.ndarray, exact_match_gains: np.ndarray,
        f1_gains: np.ndarray, largest: np.ndarray,
    ) -> NullThresholds:
        kept, place = np.unique(bins, return_inverse=True)
        sums = np.zeros((2, kept.size), dtype=np.int64)
        np.add.at(sums[0], place, exact_match_gains)
        np.add.at(sums[1], place, f1_gains)
        top = np.zeros(kept.size)
        np.maximum.at(top, place, largest)
        return cls(num_rows, num_no_answer, kept, sums[0], sums[1], top)

    def __add__(self, other: NullThresholds) -> NullThresholds:
        return self._summed(
            self.num_rows + other.num_rows,
            self.num_no_answer + other.num_no_answer,
            np.concatenate([self.bins, other.bins]),
            np.concatenate([self.exact_match_gains, other.exact_match_gains]),
            np.concatenate([self.f1_gains, other.f1_gains]),
            np.concatenate([self.largest, other.largest]),
        )

    @property
    def best_exact_match(self) -> BestThreshold:
        return self._best(self.exact_match_gains)

    @property
    def best_f1(self) -> BestThreshold:
        return self._best(self.f1_gains)

    def _best(self, gains: np.ndarray) -> BestThreshold:
        """The lowest of the best thresholds; 0.0, as SQuAD has it, where "" everywhere is best."""
        running = np.cumsum(gains)
        best = int(np.argmax(running)) if running.size else 0
        gained, threshold = 0, 0.0
        if running.size and running[best] > 0:
            gained, threshold = int(running[best]), float(self.largest[best])
        return BestThreshold(100 * _ratio(self.num_no_answer + gained / _GAIN_UNIT, self.num_rows), threshold)
