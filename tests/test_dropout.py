"""dropout.py: the share that is dropped, the scale, the gradient, and who decides the numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from ray_qa.dropout import FastDropout, dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_share_and_scale(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    given = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    result = dropout(given, p)
    kept = result != 0
    # Five standard deviations of a binomial share.
    assert kept.double().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / given.numel()) ** 0.5)
    rounding = 5e-3 if dtype == torch.bfloat16 else 1e-4
    assert result[kept].double().mean().item() == pytest.approx(1 / (1 - p), rel=rounding)
    result.sum().backward()
    assert given.grad is not None
    assert torch.equal(given.grad, result.detach())  # of ones: what scales forward scales backward
    assert result.dtype == dtype and result.shape == given.shape


def test_neighbours_are_independent() -> None:
    """Four elements share one draw of 64 bits; their fates must not."""
    torch.manual_seed(2)
    dropped = (dropout(torch.ones(4_000_000), 0.5) == 0).double().view(-1, 4) - 0.5
    assert (dropped.T @ dropped / len(dropped) / 0.25 - torch.eye(4)).abs().max() < 5e-3


def test_the_seed_decides() -> None:
    given = torch.rand(3, 5, 4099)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return dropout(given, 0.1)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize("p", [0.0, 1e-9, 1.0])
def test_extremes_are_torchs(p: float) -> None:
    given = torch.rand(5000)
    assert torch.equal(dropout(given, p), given if p < 1 else torch.zeros(5000))


def test_not_training_and_small_tensors_and_inplace() -> None:
    given = torch.rand(5000)
    assert dropout(given, 0.5, training=False) is given
    small = torch.rand(10)
    torch.manual_seed(5)
    expected = functional.dropout(small, 0.5)
    torch.manual_seed(5)
    assert torch.equal(dropout(small, 0.5), expected)
    assert dropout(given, 0.5, inplace=True) is given and (given == 0).any()


def test_the_mode_reaches_modules_and_ends() -> None:
    module, given = nn.Dropout(0.25), torch.ones(10_000)

    def draw() -> torch.Tensor:
        torch.manual_seed(6)
        return module(given)

    torch.manual_seed(6)
    expected = dropout(given, 0.25)
    with FastDropout():
        assert torch.equal(draw(), expected)
        module.eval()
        assert module(given) is given
        module.train()
    torch.manual_seed(6)
    torchs = functional.dropout(given, 0.25)
    assert torch.equal(draw(), torchs)
    assert not torch.equal(torchs, expected)
