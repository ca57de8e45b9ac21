"""Linear layers for inference on a CPU: weights laid out once, GELU and residual sums taken with the product at hand.

A linear layer of PyTorch lays its weights out anew in every call, and a GELU or a sum after it reads and writes all
of its output once more. `fuse` replaces the linear layers of a model that will only be used forward from now on, and
where it knows the block around them what comes after. The products are the same; intermediate results are rounded
less often.

Knows nothing of questions, windows or precision: weights keep their type.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

#: Linear layers and what their owners call the activation after them.
_ACTIVATED = (("dense", "intermediate_act_fn"), ("lin1", "activation"), ("ffn", "activation"))
#: Smaller layers (a head's two outputs) gain nothing.
_SMALLEST = 16
#: What the blocks of BERT and its kin hold that end in LayerNorm(dense(x) + residual).
_RESIDUAL = {"dense", "LayerNorm", "dropout"}
_DISTILBERT_BLOCK = {"attention", "sa_layer_norm", "ffn", "output_layer_norm"}


class FusedLinear(nn.Module):
    """``linear`` with weights in oneDNN's layout, and with ``gelu`` the exact GELU of its output."""

    def __init__(self, linear: nn.Linear, *, gelu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer(
            "weight", torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), persistent=False
        )
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach(), persistent=False)
        self.activation: tuple[str, list[Any], str | None] = ("gelu", [], "none") if gelu else ("none", [], None)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, *self.activation)

    def plus(self, inputs: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The layer's output and ``residual``, summed before they are rounded."""
        return torch.ops.mkldnn._linear_pointwise.binary(inputs, residual, self.weight, self.bias, "add")


def can_fuse(dtype: torch.dtype) -> bool:
    """Whether this machine and this build of PyTorch have such layers in ``dtype``."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def fuse(model: nn.Module) -> Callable[[], None]:
    """Replace the linear layers of a model in place; what it gives undoes that.

    Until then the model can be neither trained nor saved. Layers with hooks or of a class of their own are left alone.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []

    def replace(owner: nn.Module, name: str, child: nn.Module) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, child)

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if not isinstance(child, nn.Linear) or not _is_plain(child):
                continue
            activation = _activation_after(module, name)
            replace(module, name, FusedLinear(child, gelu=activation is not None))
            if activation is not None:
                replace(module, activation, nn.Identity())
    blocks = []
    block: Any
    for block in model.modules():
        forward = _forward_of(block)
        if forward is not None:
            blocks.append(block)
            block.forward = MethodType(forward, block)
            if forward is _distilbert_block:
                block._out = [block.attention.out_lin]  # in a list: not a child for the second time
                replace(block.attention, "out_lin", nn.Identity())

    def undo() -> None:
        for owner, name, child in reversed(replaced):
            setattr(owner, name, child)
        for module in blocks:
            del module.forward  # the class's own is behind it

    return undo


def _is_plain(module: nn.Linear) -> bool:
    return (
        type(module) is nn.Linear and min(module.in_features, module.out_features) >= _SMALLEST
        and not module._forward_pre_hooks and not module._forward_hooks
    )


def _activation_after(owner: nn.Module, name: str) -> str | None:
    """The attribute of ``owner`` that holds the GELU after its layer ``name``."""
    for layer, activation in _ACTIVATED:
        if name == layer and _is_exact_gelu(getattr(owner, activation, None)):
            return activation
    return None


def _is_exact_gelu(activation: Any) -> bool:
    if isinstance(activation, nn.GELU):
        return activation.approximate == "none"
    return isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu


def _forward_of(module: Any) -> Any:
    """The forward that takes the place of a block's own, where one is known."""
    children = dict(module.named_children())
    if set(children) == _RESIDUAL and isinstance(children["dense"], FusedLinear):
        if list(inspect.signature(module.forward).parameters) == ["hidden_states", "input_tensor"]:
            return _residual_block
    elif type(module).__name__ == "TransformerBlock" and set(children) == _DISTILBERT_BLOCK:
        if isinstance(module.attention.out_lin, FusedLinear) and isinstance(module.ffn.lin2, FusedLinear):
            return _distilbert_block
    return None


def _residual_block(self: Any, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
    return self.LayerNorm(self.dense.plus(hidden_states, input_tensor))


def _distilbert_block(
    self: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **options)
    hidden_states = self.sa_layer_norm(self._out[0].plus(attended, hidden_states))
    inner = self.ffn.activation(self.ffn.lin1(hidden_states))
    return self.output_layer_norm(self.ffn.lin2.plus(inner, hidden_states))
