"""Windows of a batch end to end, without padding: attention within each window, all else over all tokens at once.

`Packing` says where the tokens of a padded batch go; `switch_on` gives a model of transformers an attention that knows
where windows begin and end. On a GPU it is the variable-length flash attention that comes with PyTorch (bf16), on a
CPU a loop over windows, for tests: there it gains nothing.

Knows nothing of questions, tokenizers or batches' origin.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

NAME = "ray_qa_padding_free"


@dataclass(frozen=True)
class Packing:
    """The real tokens of a batch of padded windows, in one row.

    ``flat`` [tokens] are their places in the flattened batch, ``position`` [tokens] counts from 0 in each window,
    ``bounds`` [windows + 1] is where windows begin; ``shape`` is the batch's.
    """

    flat: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int32]
    shape: tuple[int, int]

    @classmethod
    def of(cls, attention_mask: npt.NDArray[np.int64]) -> Packing:
        """Every window has a token at least; its padding comes last."""
        lengths = attention_mask.sum(1)
        flat = np.flatnonzero(attention_mask)
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        return cls(
            flat, flat % attention_mask.shape[1], bounds.astype(np.int32), (len(lengths), attention_mask.shape[1])
        )

    def options(self, device: torch.device) -> dict[str, Any]:
        """What the attention has to be told, by the names that transformers passes on."""
        bounds = torch.from_numpy(self.bounds)
        if device.type == "cuda":
            bounds = bounds.pin_memory().to(device, non_blocking=True)
        longest = int(np.diff(self.bounds).max())
        return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}

    def unpack(self, values: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        """``values`` [tokens] in the batch's shape, 0 at padding; ``flat`` is on their device."""
        padded = values.new_zeros(self.shape[0] * self.shape[1])
        return padded.index_copy(0, flat, values).view(self.shape)


def is_available(device: torch.device) -> bool:
    """Whether this build of PyTorch has variable-length attention for ``device``."""
    if device.type != "cuda":
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


def switch_on(model: PreTrainedModel) -> str:
    """Let the model attend within windows only; gives the attention that it had.

    Raises:
        ValueError: its attention cannot be exchanged.
    """
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    return before


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, *,
    scaling: float | None = None, cu_seq_lens_q: torch.Tensor | None = None, max_length_q: int | None = None,
    sliding_window: int | None = None, is_causal: bool | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of tokens [1, heads, tokens, size] within windows: [1, tokens, heads, size]."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or causal or sliding_window:
        raise ValueError("attention without padding is for windows whose tokens all see each other")
    if query.device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        bounds = cu_seq_lens_q
        attended = varlen_attn(
            query, key, value, bounds, bounds, max_length_q, max_length_q, scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        assert isinstance(attended, torch.Tensor)
        return attended[None], None
    pieces = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        for start, stop in itertools.pairwise(cu_seq_lens_q.tolist())
    ]
    return torch.cat(pieces, 2).transpose(1, 2), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
