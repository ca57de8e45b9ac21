"""Windows without padding give the logits of padded ones; here on a CPU, with its loop over windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_engine import LABELS, PAIRS, rows
from tiny_architectures import KINDS, build

from ray_qa.engine import Engine
from ray_qa.model import load_model, without_padding
from ray_qa.options import AnswerOptions
from ray_qa.padding_free import Packing, is_available

#: Encoders of transformers whose attention can be exchanged and whose positions can be given.
ABLE = {"bert", "distilbert", "roberta", "xlm-roberta", "albert", "electra"}


def test_packing() -> None:
    packing = Packing.of(np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]))
    assert packing.flat.tolist() == [0, 1, 2, 4, 8, 9]
    assert packing.position.tolist() == [0, 1, 2, 0, 0, 1]
    assert packing.bounds.tolist() == [0, 3, 4, 6]
    padded = packing.unpack(torch.arange(1.0, 7), torch.from_numpy(packing.flat))
    assert padded.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]]
    assert packing.options(torch.device("cpu"))["max_length_q"] == 3


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_or_stays_padded(name, tmp_path) -> None:
    qa = load_model(build(name, tmp_path), device="cpu", precision="fp32")
    options = AnswerOptions(max_seq_length=80, doc_stride=20)
    table = rows(*PAIRS, labels=LABELS)
    padded = Engine(qa, options).answer(table, with_loss=True)
    assert without_padding(qa) == qa.padding_free == (name in ABLE)
    packed = Engine(qa, options).answer(table, with_loss=True)
    assert packed.predictions["answer"] == padded.predictions["answer"]
    assert packed.predictions["score"].to_pylist() == pytest.approx(padded.predictions["score"].to_pylist(), abs=1e-5)
    assert packed.loss_sum == pytest.approx(padded.loss_sum, rel=1e-5)


def test_a_cpu_pads() -> None:
    assert not is_available(torch.device("cpu"))
