"""The documented calls, word for word except for the model's name, on a real Ray."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ray_qa import ARGS_QA_TRAIN, EvalResult, HappyQuestionAnswering, QATrainArgs
from ray_qa.errors import InputError, ModelError, OptionError
from tests.conftest import REPOSITORY

DOCUMENTED_TRAIN = """\
context,question,answer_text,answer_start
October 31st is the date,what is the date?,October 31st,0
The date is November 23rd,what is the date?,November 23rd,12
"""
DOCUMENTED_TEST = """\
context,question
October 31st is the date,what is the date?
The date is November 23rd,what is the date?
"""


@pytest.fixture()
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the documented examples, with their two files."""
    (tmp_path / "train-eval.csv").write_text(DOCUMENTED_TRAIN)
    (tmp_path / "test.csv").write_text(DOCUMENTED_TEST)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.shared
@pytest.mark.usefixtures("ray_session", "documented")
def test_documented_examples(shared: Path) -> None:
    qa = HappyQuestionAnswering(model_type="BERT", model_name=str(shared / "models" / "minilm-squad"))
    before = qa.eval("train-eval.csv")
    assert isinstance(before, EvalResult)
    before_loss = before.loss

    assert qa.train("train-eval.csv", args=ARGS_QA_TRAIN) is None
    after_loss = qa.eval("train-eval.csv").loss
    assert after_loss < before_loss

    answers = qa.test("test.csv")
    assert type(answers) is list and len(answers) == 2
    assert answers[0].answer == "October 31st" and answers[0][2:] == (0, 12)
    assert answers[1].answer == "November 23rd" and (answers[1].start, answers[1].end) == (12, 25)
    assert all(0.5 < answer.score <= 1 for answer in answers)

    asked = qa.answer_question("October 31st is the date", "what is the date?", top_k=2)
    assert asked[0] == pytest.approx(answers[0]) and len(asked) == 2 and asked[0].score > asked[1].score

    # `save` and `load_path` keep the tuned model; another `train` goes on from it.
    qa.save("tuned")
    loaded = HappyQuestionAnswering(load_path="tuned")
    assert loaded.answer_question("October 31st is the date", "what is the date?", top_k=2) == asked


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_train_again_trains_on_and_temporary_models_go_with_their_owner(tiny_model: Path, documented: Path) -> None:
    qa = HappyQuestionAnswering("BERT", str(tiny_model))
    qa.train("train-eval.csv", {"max_steps": 1})
    first = Path(qa._source.directory)
    qa.train("train-eval.csv", QATrainArgs(max_steps=1))
    second = Path(qa._source.directory)
    assert first != second and second.is_dir()
    del qa
    assert not first.exists() and not second.exists()
    assert tiny_model.is_dir()


def test_default_model_from_a_hub_cache(tiny_model: Path, documented: Path) -> None:
    """`HappyQuestionAnswering()` as documented, in a process of its own, with a hub cache on disk."""
    from transformers import AutoTokenizer, DistilBertConfig, DistilBertForQuestionAnswering

    cache = documented / "hub"
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--distilbert-base-cased-distilled-squad"
    snapshot = repository / "snapshots" / revision
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(snapshot)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    DistilBertForQuestionAnswering(config).save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    (documented / "program.py").write_text(
        "from ray_qa import HappyQuestionAnswering\n"
        "if __name__ == '__main__':\n"
        "    happy_qa = HappyQuestionAnswering()\n"
        "    answers = happy_qa.test('test.csv')\n"
        "    print(len(answers), answers[0]._fields)\n"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(cache), "PYTHONPATH": str(REPOSITORY)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [sys.executable, "program.py"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "2 ('answer', 'score', 'start', 'end')\n"


@pytest.mark.usefixtures("ray_session")
@pytest.mark.slow
def test_eval_writes_what_the_job_writes(tiny_model: Path, documented: Path) -> None:
    qa = HappyQuestionAnswering("BERT", str(tiny_model))
    found = qa.eval("train-eval.csv", output_path="figures")
    assert isinstance(found, EvalResult) and found.num_rows == 2
    assert json.loads((documented / "figures" / "eval.json").read_text())["loss"] == found.loss
    with pytest.raises(OptionError, match="calibrate is True without an output folder"):
        qa.eval("train-eval.csv", calibrate=True)
    with pytest.raises(OptionError, match=r"min_probability is 0\.5 without an output folder"):
        qa.test("test.csv", {"min_probability": 0.5})
    with pytest.raises(OptionError, match=r"target_precision is 0\.5 without an output folder"):
        qa.answer_question("Ann has 3 keys.", "who?", args={"target_precision": 0.5})


def test_a_single_question_needs_no_ray(tiny_model: Path) -> None:
    program = (
        "import ray\n"
        "from ray_qa import HappyQuestionAnswering\n"
        f"qa = HappyQuestionAnswering('BERT', {str(tiny_model)!r})\n"
        "(found,) = qa.answer_question('Ann has 3 keys.', 'who has 3 keys?')\n"
        "assert 'Ann has 3 keys.'[found.start:found.end] == found.answer\n"
        "assert len(qa.answer_question('Ann has 3 keys.', 'who has 3 keys?', top_k=4)) == 4\n"
        "assert not ray.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_questions_that_cannot_be_answered(tiny_model: Path) -> None:
    qa = HappyQuestionAnswering("BERT", str(tiny_model))
    with pytest.raises(InputError, match="blank"):
        qa.answer_question("Ann has 3 keys.", "  ")
    with pytest.raises(InputError, match="question"):
        qa.answer_question("Ann has 3 keys.", "who " * 600)


def test_models_that_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no-such/model-name.*local folder"):
        HappyQuestionAnswering(model_name="no-such/model-name")
    with pytest.raises(OptionError, match="two names of one option"):
        HappyQuestionAnswering(model_name=str(tiny_model), token="a", use_auth_token="b")
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin, which can run code"):
        HappyQuestionAnswering(load_path=str(pickled))


def test_a_headless_model_can_be_trained_but_not_asked(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    BertModel(BertConfig.from_pretrained(tiny_model)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    qa = HappyQuestionAnswering("BERT", str(tmp_path))
    with pytest.raises(ModelError, match="no question-answering head"):
        qa.answer_question("Ann has 3 keys.", "who?")
