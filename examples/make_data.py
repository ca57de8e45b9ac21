"""Write the CSV files of the demo: short facts, and questions about them.

    python examples/make_data.py [FOLDER]

Everything is drawn from one seed, so the files can be made again byte for byte. A context states
one to three facts; a question asks for one of them. There are twelve kinds of fact, each with a few
ways to state it and to ask for it. ``train.csv`` and ``eval.csv`` share these ways and nothing else:
no name and no answer of ``eval.csv`` or ``test.csv`` occurs in ``train.csv``, so a model cannot
answer from memory. Names are made up of syllables. Knows nothing of models.
"""

from __future__ import annotations

import csv
import itertools
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

SEED = 7
NUM_TRAIN, NUM_EVAL, NUM_TEST = 6000, 400, 10

#: The two rows of Happy Transformer's documentation. Both are held out: they open eval.csv and test.csv.
DOCUMENTED = [
    ("October 31st is the date", "what is the date?", "October 31st", 0),
    ("The date is November 23rd", "what is the date?", "November 23rd", 12),
]

MONTHS = {
    "January": 31, "February": 28, "March": 31, "April": 30, "May": 31, "June": 30, "July": 31,
    "August": 31, "September": 30, "October": 31, "November": 30, "December": 31,
}  # fmt: skip
THINGS = ["boat", "cart", "lamp", "drum", "kite", "clock", "mill", "barn", "tent", "bike", "harp", "ladder"]
ANIMALS = ["dog", "cat", "horse", "parrot", "goat", "rabbit", "turtle", "donkey"]
PLACES = ["harbour", "border", "old tower", "forest", "river", "quarry", "lighthouse", "salt lake"]
SHADES = ["pale", "dark", "bright", "dusty", "deep", "soft", "faded", "warm"]
COLOURS = ["green", "red", "blue", "yellow", "grey", "brown", "purple", "orange", "pink", "white"]
MATERIALS = ["glass", "stone", "paper", "copper", "leather", "silver", "timber", "cotton", "marble", "wool"]
TRADES = ["painter", "trader", "cutter", "carver", "mender", "inspector", "polisher", "seller"]
ADJECTIVES = ["Quiet", "Hidden", "Last", "Broken", "Golden", "Distant", "Sleeping", "Winding", "Silent", "First"]
NOUNS = ["Garden", "Island", "Letter", "Winter", "Mirror", "Bridge", "Window", "Journey", "Orchard", "Summer"]


class Row(NamedTuple):
    """One line of train.csv or eval.csv; ``context[answer_start:][:len(answer_text)] == answer_text``."""

    context: str
    question: str
    answer_text: str
    answer_start: int


@dataclass(frozen=True)
class Kind:
    """A kind of fact. ``{key}`` is what a question names, ``{answer}`` what it asks for."""

    keys: str
    answers: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


KINDS = (
    Kind(
        "nothing",
        "dates",
        ("{answer} is the date", "The date is {answer}", "Today's date is {answer}"),
        ("what is the date?", "what date is it?", "which date is it today?"),
    ),
    Kind(
        "people",
        "towns",
        ("{key} lives in {answer}", "{answer} is the home of {key}"),
        ("where does {key} live?", "in which town does {key} live?"),
    ),
    Kind(
        "people",
        "jobs",
        ("{key} works as a {answer}", "{key} earns a living as a {answer}"),
        ("what is the job of {key}?", "what does {key} work as?"),
    ),
    Kind(
        "people",
        "ages",
        ("{key} is {answer} old", "{key} has reached the age of {answer}"),
        ("how old is {key}?", "what is the age of {key}?"),
    ),
    Kind(
        "animals",
        "people",
        ("The {key} is called {answer}", "{answer} is the name of the {key}"),
        ("what is the {key} called?", "what is the name of the {key}?"),
    ),
    Kind(
        "things",
        "prices",
        ("The {key} costs {answer}", "Someone paid {answer} for the {key}"),
        ("how much does the {key} cost?", "what is the price of the {key}?"),
    ),
    Kind(
        "things",
        "colours",
        ("The {key} was painted {answer}", "The colour of the {key} is {answer}"),
        ("what colour is the {key}?", "which colour does the {key} have?"),
    ),
    Kind(
        "towns",
        "times",
        ("The train to {key} leaves at {answer}", "At {answer} the train departs for {key}"),
        ("when does the train to {key} leave?", "at what time is the train to {key}?"),
    ),
    Kind(
        "things",
        "people",
        ("The {key} belongs to {answer}", "{answer} owns the {key}"),
        ("who owns the {key}?", "whose is the {key}?"),
    ),
    Kind(
        "books",
        "years",
        ("{key} was written in {answer}", "In {answer} someone wrote {key}"),
        ("when was {key} written?", "in which year was {key} written?"),
    ),
    Kind(
        "countries",
        "towns",
        ("The capital of {key} is {answer}", "{answer} is the capital of {key}"),
        ("what is the capital of {key}?", "which town is the capital of {key}?"),
    ),
    Kind(
        "places",
        "distances",
        ("It is {answer} to the {key}", "The {key} is {answer} away"),
        ("how far is the {key}?", "how far is it to the {key}?"),
    ),
)


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, ..., 11th, ..., 31st."""
    ending = "th" if 10 <= number % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def make_words(rng: random.Random, count: int) -> list[str]:
    """Distinct made-up names of two syllables, in the order in which they were drawn."""
    starts = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    ends = [consonant + ending for consonant in "bdklmnrstv" for ending in ("a", "o", "i", "us", "en")]
    words = [(start + end).capitalize() for start in starts for end in ends]
    return rng.sample(words, count)


def make_pools(rng: random.Random) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What can stand for a key or an answer: (for training, held out), with nothing in common but
    the common nouns that questions name (things, animals, places)."""
    names = iter(make_words(rng, 3500))
    endings = itertools.cycle(["ford", "by", "holm", "stad", "mouth"])
    whole = {
        "people": list(itertools.islice(names, 2000)),
        "towns": [name + next(endings) for name in itertools.islice(names, 1000)],
        "countries": [name + "land" for name in itertools.islice(names, 500)],
        "books": [f"The {adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS],
        "dates": [f"{month} {ordinal(day)}" for month, days in MONTHS.items() for day in range(1, days + 1)],
        "jobs": [f"{material} {trade}" for material in MATERIALS for trade in TRADES],
        "ages": [f"{age} years" for age in range(4, 100)],
        "prices": [f"{amount} crowns" for amount in range(2, 400)],
        "colours": [f"{shade} {colour}" for shade in SHADES for colour in COLOURS],
        "times": [f"{minute} past {hour}" for hour in range(1, 13) for minute in range(5, 60, 5)],
        "years": [str(year) for year in range(1700, 2000)],
        "distances": [f"{length} miles" for length in range(2, 400)],
    }
    train: dict[str, list[str]] = {"nothing": [""], "things": THINGS, "animals": ANIMALS, "places": PLACES}
    held_out = dict(train)
    documented = {row[2] for row in DOCUMENTED}
    for pool, words in whole.items():
        free = [word for word in words if word not in documented]
        rng.shuffle(free)
        cut = len(free) // 5
        held_out[pool] = free[:cut] + [word for word in words if word in documented]
        train[pool] = free[cut:]
    return train, held_out


def make_row(rng: random.Random, pools: dict[str, list[str]], kind: Kind) -> Row:
    """A row that asks for a fact of this kind, among up to two others."""
    num_facts = rng.choice([1, 1, 2, 2, 3])
    others = [rng.choice([other for other in KINDS if other is not kind]) for _ in range(num_facts - 1)]
    if others and kind.keys != "nothing" and rng.random() < SAME_KIND:
        others[0] = kind  # the same thing said of two: only the key tells which one is meant
    used: set[str] = set()

    def draw(pool: str) -> str:
        word = rng.choice([word for word in pools[pool] if word not in used])
        if word:
            used.add(word)
        return word

    facts = [(fact, draw(fact.keys), draw(fact.answers)) for fact in [kind, *others]]
    question = rng.choice(kind.questions).format(key=facts[0][1])
    order = list(range(num_facts))
    rng.shuffle(order)
    end = "." if num_facts > 1 or rng.random() < 0.5 else ""
    context, answer_start = "", -1
    for position in order:
        fact, key, answer = facts[position]
        before, after = rng.choice(fact.statements).split("{answer}")
        before = before.format(key=key)
        if context:
            context += " "
        if position == 0:
            answer_start = len(context) + len(before)
        context += before + answer + after.format(key=key) + end
    return Row(context, question, facts[0][2], answer_start)


#: Share of the rows with several facts in which two are of the kind asked for.
SAME_KIND = 0.1


def make_rows(rng: random.Random, pools: dict[str, list[str]], count: int, seen: set[str]) -> list[Row]:
    """``count`` distinct rows, the kinds in turn, in shuffled order."""
    rows: list[Row] = []
    kinds = itertools.cycle(KINDS)
    while len(rows) < count:
        row = make_row(rng, pools, next(kinds))
        if row.context + row.question not in seen:
            seen.add(row.context + row.question)
            rows.append(row)
    rng.shuffle(rows)
    return rows


def write(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def make_files(folder: Path) -> None:
    """Write train.csv, eval.csv and test.csv into ``folder``."""
    rng = random.Random(SEED)
    train_pools, held_out_pools = make_pools(rng)
    documented = [Row(*row) for row in DOCUMENTED]
    seen = {row.context + row.question for row in documented}
    train = make_rows(rng, train_pools, NUM_TRAIN, seen)
    held_out = make_rows(rng, held_out_pools, NUM_EVAL - len(documented), seen)
    unlabelled = make_rows(rng, held_out_pools, NUM_TEST - len(documented), seen)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "train.csv", Row._fields, train)
    write(folder / "eval.csv", Row._fields, documented + held_out)
    write(folder / "test.csv", Row._fields[:2], [row[:2] for row in documented + unlabelled])


if __name__ == "__main__":
    make_files(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
