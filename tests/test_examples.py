"""The demo's data and model: made again the same, labels right, nothing held out in train.csv."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from examples import make_data

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILES = ("train.csv", "eval.csv", "test.csv")


def read(name: str) -> list[dict[str, str]]:
    with (EXAMPLES / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {name: read(name) for name in FILES}


def test_committed_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    make_data.make_files(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), name


def test_files_are_small_and_of_the_documented_shape(rows) -> None:
    assert sum((EXAMPLES / name).stat().st_size for name in FILES) < 1_000_000
    assert {name: len(rows[name]) for name in FILES} == {
        "train.csv": make_data.NUM_TRAIN,
        "eval.csv": make_data.NUM_EVAL,
        "test.csv": make_data.NUM_TEST,
    }
    assert list(rows["train.csv"][0]) == ["context", "question", "answer_text", "answer_start"]
    assert list(rows["test.csv"][0]) == ["context", "question"]


def test_documented_rows_come_first(rows) -> None:
    first, second = (tuple(row.values()) for row in rows["eval.csv"][:2])
    assert first == ("October 31st is the date", "what is the date?", "October 31st", "0")
    assert second == ("The date is November 23rd", "what is the date?", "November 23rd", "12")
    assert [tuple(row.values()) for row in rows["test.csv"][:2]] == [first[:2], second[:2]]


@pytest.mark.parametrize("name", ["train.csv", "eval.csv"])
def test_every_label_lies_in_its_context(rows, name: str) -> None:
    for row in rows[name]:
        assert row["answer_text"]
        assert row["context"][int(row["answer_start"]) :].startswith(row["answer_text"]), row


def test_every_kind_is_asked_for(rows) -> None:
    assert len(make_data.KINDS) == 12
    for kind in make_data.KINDS:
        patterns = [re.escape(question).replace(r"\{key\}", ".+") for question in kind.questions]
        for name in ("train.csv", "eval.csv"):
            count = sum(bool(re.fullmatch("|".join(patterns), row["question"])) for row in rows[name])
            assert count > len(rows[name]) / 12 * 0.9, (name, kind.questions)


def made_up_words(text: str) -> set[str]:
    """Capitalized words: names, months, and what begins a sentence or a title."""
    return set(re.findall(r"\b[A-Z][a-z]+\b", text))


def test_held_out_answers_and_names_do_not_occur_in_training(rows) -> None:
    known_answers = {row["answer_text"] for row in rows["train.csv"]}
    assert known_answers.isdisjoint(row["answer_text"] for row in rows["eval.csv"])
    training = " ".join(row["context"] for row in rows["train.csv"])
    for row in rows["eval.csv"]:
        assert not re.search(rf"(?<!\w){re.escape(row['answer_text'])}(?!\w)", training), row
    real = {*make_data.MONTHS, *make_data.ADJECTIVES, *make_data.NOUNS}
    real |= {word for kind in make_data.KINDS for text in kind.statements for word in made_up_words(text)}
    known_names = made_up_words(training) - real
    assert len(known_names) > 1000
    for name in ("eval.csv", "test.csv"):
        names = {word for row in rows[name] for word in made_up_words(row["context"])} - real
        assert names and names.isdisjoint(known_names), name


@pytest.mark.parametrize(
    ("number", "text"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (12, "12th"), (13, "13th"), (20, "20th")]
    + [(21, "21st"), (22, "22nd"), (23, "23rd"), (30, "30th"), (31, "31st")],
)
def test_ordinal(number: int, text: str) -> None:
    assert make_data.ordinal(number) == text


def test_model_is_made_the_same_in_another_process(tiny_model: Path, tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, EXAMPLES / "tiny_model.py", tmp_path / "model"], check=True, capture_output=True
    )
    names = sorted(path.name for path in tiny_model.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / "model" / name).read_bytes() == (tiny_model / name).read_bytes(), name


def test_model_is_a_small_one_that_transformers_loads(tiny_model: Path) -> None:
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    model = AutoModelForQuestionAnswering.from_pretrained(tiny_model)
    assert type(model).__name__ == "BertForQuestionAnswering"
    assert 400_000 < model.num_parameters() < 500_000
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 128
    encoded = tokenizer("what is the date?", "October 31st is the date")
    assert tokenizer.unk_token_id not in encoded["input_ids"]
    assert encoded["token_type_ids"][0] == 0 and encoded["token_type_ids"][-1] == 1


def test_every_row_fits_into_one_window(tiny_model: Path, rows) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name in FILES:
        encoded = tokenizer([row["question"] for row in rows[name]], [row["context"] for row in rows[name]])
        assert max(map(len, encoded["input_ids"])) <= 128
        assert not any(tokenizer.unk_token_id in ids for ids in encoded["input_ids"])


@pytest.mark.slow
def test_demo_learns(tmp_path: Path) -> None:
    """What `make demo` prints, from a copy of the examples, in a process and a Ray of its own."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, tmp_path / "examples" / "demo.py", tmp_path / "output"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    out = done.stdout
    before, after = (
        re.search(rf"^{when} training .*exact match +([\d.]+)", out, re.M) for when in ("before", "after")
    )
    assert before and float(before[1]) < 15, out  # blind guesses at one of a few words
    assert after and float(after[1]) > 80, out
    assert re.search(r"October 31st is the date\n +what is the date\? +-> +October 31st ", out), out
    assert list((tmp_path / "output" / "answers").glob("part-*.parquet"))
