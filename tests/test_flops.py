"""FLOPs of windows against torch's own counter, and a peak that the device can have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ray_qa.flops import WindowFlops, peak_flops
from tests.tiny_architectures import build


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "qwen2", "gpt2"])
def test_flops_are_those_that_torch_counts(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    from transformers import AutoModelForQuestionAnswering

    folder = build(name, tmp_path_factory.mktemp(name))
    model = AutoModelForQuestionAnswering.from_pretrained(folder, attn_implementation="eager").train()
    ids = torch.full((3, 50), 7)
    counter = FlopCounterMode(display=False)
    with counter:
        output = model(input_ids=ids)
        (output.start_logits.sum() + output.end_logits.sum()).backward()
    assert WindowFlops(model)(np.full(3, 50)) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_the_peak_is_a_rate() -> None:
    peak = peak_flops(torch.device("cpu"), seconds=0.05)
    assert 1e8 < peak < 1e15
