"""What a training has to multiply, and what its device could.

Counted are the matrix products of the tokens that are not padding, forward and backward (twice the forward): the
linear layers and the attention's two. The peak is the best rate of a large matrix product that the device shows here
and now, in whichever of bf16 and fp32 is faster.

Knows torch; knows nothing of steps or windows.
"""

from __future__ import annotations

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

_FORWARD_AND_BACKWARD = 3
_SECONDS = 0.15
_SIZE = {"cpu": 1024, "cuda": 8192}


class WindowFlops:
    """FLOPs of windows in one model, as a function of their lengths in tokens."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = sum(
            parameter.numel() for module in model.modules() if isinstance(module, nn.Linear) or _is_conv1d(module)
            for parameter in module.parameters(recurse=False) if parameter.ndim == 2
        )
        config = getattr(model, "config", None)
        hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
        self._attention = int(hidden) * int(layers)

    def __call__(self, lengths: npt.NDArray[np.integer]) -> float:
        """Forward and backward through windows of these lengths."""
        tokens = np.asarray(lengths, np.float64)
        linear = 2.0 * self._weights * tokens.sum()
        attention = 4.0 * self._attention * (tokens**2).sum()
        return float(_FORWARD_AND_BACKWARD * (linear + attention))


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's own linear layer."""
    return type(module).__name__ == "Conv1D"


def peak_flops(device: torch.device, seconds: float = _SECONDS) -> float:
    """FLOP/s of the best matrix product on ``device``, with the threads that torch uses now."""
    best = 0.0
    size = _SIZE.get(device.type, 1024)
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
        end = time.monotonic() + seconds
        while True:
            begin = time.monotonic()
            torch.mm(left, right)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.monotonic()
            best = max(best, 2.0 * size**3 / (now - begin))
            if now >= end:
                break
    return best
