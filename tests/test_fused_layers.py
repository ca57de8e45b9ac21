"""Fused layers give what the layers did that they replace, and can be taken out again."""

from __future__ import annotations

import pytest
import torch
from tiny_architectures import KINDS, build
from torch import nn
from transformers import AutoModelForQuestionAnswering
from transformers.activations import GELUActivation

from ray_qa.fused_layers import FusedLinear, can_fuse, fuse

pytestmark = pytest.mark.skipif(not can_fuse(torch.float32), reason="this build of PyTorch has no oneDNN")


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer(gelu, bias):
    torch.manual_seed(3)
    linear = nn.Linear(48, 64, bias=bias)
    inputs, residual = torch.randn(3, 5, 48), torch.randn(3, 5, 64)
    fused = FusedLinear(linear, gelu=gelu)
    with torch.inference_mode():
        expected = linear(inputs)
        assert torch.allclose(fused(inputs), nn.functional.gelu(expected) if gelu else expected, atol=1e-6)
        if not gelu:
            assert torch.allclose(fused.plus(inputs, residual), expected + residual, atol=1e-6)


def test_only_an_exact_gelu_is_fused():
    class Inner(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.dense, self.intermediate_act_fn = nn.Linear(32, 32), activation

        def forward(self, inputs):
            return self.intermediate_act_fn(self.dense(inputs))

    inputs = torch.randn(4, 32)
    for activation, is_exact in ((nn.GELU(), True), (GELUActivation(), True), (nn.GELU("tanh"), False),
                                 (nn.ReLU(), False), (GELUActivation(use_gelu_python=True), False)):
        inner = Inner(activation)
        with torch.inference_mode():
            expected = inner(inputs)
            fuse(inner)
            assert isinstance(inner.intermediate_act_fn, nn.Identity) == is_exact
            assert torch.allclose(inner(inputs), expected, atol=1e-6)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_stays_what_it_was(name, tmp_path):
    options = {"attention_type": "original_full"} if name == "big_bird" else {}
    model = AutoModelForQuestionAnswering.from_pretrained(build(name, tmp_path), **options).eval()
    children = [type(module) for module in model.modules()]
    ids = torch.randint(5, model.config.vocab_size, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if name == "longformer":
        inputs["global_attention_mask"] = (torch.arange(24) < 4).long().expand(2, -1)
    with torch.inference_mode():
        before = model(**inputs).start_logits[mask == 1]
        undo = fuse(model)
        fused = [module for module in model.modules() if isinstance(module, FusedLinear)]
        assert torch.allclose(model(**inputs).start_logits[mask == 1], before, atol=1e-4)
        undo()
        assert torch.equal(model(**inputs).start_logits[mask == 1], before)
    assert [type(module) for module in model.modules()] == children
    assert fused or name == "gpt2"  # whose layers are convolutions
