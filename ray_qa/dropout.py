"""Dropout on a CPU at the speed of the memory.

Torch draws one Bernoulli number an element on a CPU, on one thread; that took a quarter of a training step
(docs/performance.md). Sixteen of torch's random bits an element do as well: the probability is rounded to a
multiple of 1/65536, and what is kept is scaled by the inverse of that rounded probability, so that the expected
value stays exact.

Knows torch; knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LEVELS = 1 << 16
_PER_DRAW = 4
# Below this many elements the call costs more than the numbers.
_SMALLEST = 4096


class FastDropout(TorchFunctionMode):
    """While it is entered, `torch.nn.functional.dropout` (and so `torch.nn.Dropout`) is `dropout` on a CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is functional.dropout:
            return dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """`torch.nn.functional.dropout`, from torch's own generator but not with its numbers."""
    kept = _LEVELS - round(p * _LEVELS)
    if (
        not training or inplace or input.device.type != "cpu" or input.numel() < _SMALLEST
        or not 0 < kept < _LEVELS
    ):
        return functional.dropout(input, p, training, inplace)
    draws = torch.empty(-(-input.numel() // _PER_DRAW), dtype=torch.int64).random_(-(1 << 63), None)
    levels = draws.view(torch.int16)[: input.numel()].view(input.shape)
    # int16 runs from -32768: ``kept`` of its values lie below this bound.
    mask = (levels < kept - _LEVELS // 2).to(input.dtype)
    return input * mask.mul_(_LEVELS / kept)
