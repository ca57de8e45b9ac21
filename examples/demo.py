"""The whole job on this machine: evaluate, fine-tune, evaluate again, predict. `make demo` runs it.

    python examples/demo.py [FOLDER]

The model starts from nothing (tiny_model.py) and learns from train.csv; eval.csv and test.csv hold
names and answers that it has never seen. FOLDER (./demo-output) gets the models and the answers.
"""

from __future__ import annotations

import csv
import shutil
import sys
import time
from pathlib import Path

from tiny_model import make_model
from transformers.utils import logging

from ray_qa import EvalResult, HappyQuestionAnswering, QATrainArgs

EXAMPLES = Path(__file__).resolve().parent

# A model without any pretraining needs far larger steps than the default 5e-5, and a gentle start.
TRAINING = QATrainArgs(num_train_epochs=3, batch_size=32, learning_rate=2e-3, warmup_steps=0.1)


def show(when: str, result: EvalResult) -> None:
    print(
        f"{when:<16} loss {result.loss:5.2f}   exact match {result.exact_match:5.1f}   F1 {result.f1:5.1f}"
        f"   on {result.num_rows} held-out rows",
        flush=True,
    )


def main(folder: Path) -> None:
    started = time.perf_counter()
    logging.disable_progress_bar()
    shutil.rmtree(folder / "answers", ignore_errors=True)  # results of another model do not mix
    untrained = folder / "untrained-model"
    num_parameters = make_model(untrained, EXAMPLES / "train.csv")
    print(f"A BERT of {num_parameters:,} parameters, made from nothing: {untrained}", flush=True)

    qa = HappyQuestionAnswering("BERT", str(untrained))
    show("before training", qa.eval(str(EXAMPLES / "eval.csv")))
    begun = time.perf_counter()
    qa.train(str(EXAMPLES / "train.csv"), args=TRAINING)
    print(f"{'trained':<16} in {time.perf_counter() - begun:.0f} s", flush=True)
    show("after training", qa.eval(str(EXAMPLES / "eval.csv")))
    qa.save(str(folder / "model"))
    answers = qa.test(str(EXAMPLES / "test.csv"), output_path=str(folder / "answers"))

    print()
    with (EXAMPLES / "test.csv").open(encoding="utf-8", newline="") as file:
        for row, answer in zip(csv.DictReader(file), answers, strict=True):
            print(f"{row['context']}\n    {row['question']}  ->  {answer.answer}  ({answer.score:.2f})")

    print(f"""
The answers as Parquet: {folder / "answers"}   (pyarrow.parquet.read_table reads them in CSV order)
The tuned model:        {folder / "model"}
All of it took {time.perf_counter() - started:.0f} s.

The same with a pretrained model from the hub:

    from ray_qa import HappyQuestionAnswering
    qa = HappyQuestionAnswering("DISTILBERT", "distilbert-base-cased-distilled-squad")
    qa.train("{EXAMPLES.name}/train.csv")
    answers = qa.test("{EXAMPLES.name}/test.csv", output_path="my-answers")""")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output").absolute())
