"""Build a tiny BERT-shaped question-answering model from nothing, so that no download is needed.

    python examples/tiny_model.py FOLDER [CSV]

Three layers of 128 and a WordPiece vocabulary trained on the example CSV: about half a million
parameters with random values, which know nothing until they are trained. Seeded. The folder is one
that `transformers` loads like any other. Knows nothing of ray_qa.
"""

from __future__ import annotations

import csv
import string
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForQuestionAnswering, BertTokenizer

SEED = 7
VOCABULARY_SIZE = 500
MAX_LENGTH = 128
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
#: Every letter can begin a word and go on with one, so that any English word can be spelled.
LETTERS = [prefix + letter for prefix in ("", "##") for letter in string.digits + string.ascii_lowercase]


def train_vocabulary(texts: list[str]) -> dict[str, int]:
    """WordPiece tokens of ``texts`` and their ids, the same ones on every run.

    Digits stay single: a number that was never seen is then spelled like any other. The trainer
    numbers single letters in the order of a hash map, which differs from run to run, unless their
    numbers are given; the only way to give them is to call them special.
    """
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.WordPieceTrainer(
        vocab_size=VOCABULARY_SIZE, special_tokens=SPECIAL_TOKENS + LETTERS, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.get_vocab()


def make_model(folder: Path, training_csv: Path) -> int:
    """Save a randomly initialized model and its tokenizer in ``folder``; returns the number of parameters."""
    with training_csv.open(encoding="utf-8", newline="") as file:
        texts = [text for row in csv.DictReader(file) for text in (row["context"], row["question"])]
    vocabulary = train_vocabulary(texts)
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=MAX_LENGTH)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.06,  # BERT's 0.02 is meant for 768 wide; this one starts too slowly with it
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = BertForQuestionAnswering(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


if __name__ == "__main__":
    target = Path(sys.argv[1])
    source = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("train.csv")
    print(f"{target}: a model of {make_model(target, source):,} parameters")
