"""What of a model is held in bf16 when it only answers, and what is not.

Matrix products run in bf16: they take nearly all of the time. What costs next to nothing stays fp32, because its
rounding is felt: the head (a logit of 8 bits would tie many spans), the embeddings with their sum and normalization,
and the weights of all layer normalizations.

Knows nothing of questions, windows or devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def cast_to_bf16(model: nn.Module, head: nn.Module, embeddings: nn.Module | None, works: Callable[[], bool]) -> bool:
    """Hold as much of ``model`` in bf16 as it takes; False, and fp32 again, where ``works`` refuses every way.

    ``works`` runs the model; where it raises a RuntimeError other than for memory, the way tried is refused too.
    Buffers stay as they are (rotary frequencies lose positions in bf16).
    """
    normalizations = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    parts = [] if embeddings is None else [embeddings]
    original = {name: parameter.data for name, parameter in model.named_parameters()}
    # GPUs do not mix types in a layer normalization; not all embeddings give one tensor.
    for kept in ([*parts, *normalizations], parts, []):
        stays = {id(parameter) for module in (head, *kept) for parameter in module.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in stays:
                parameter.data = parameter.data.to(torch.bfloat16)
        hooks = [head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(), *inputs[1:]))]
        if embeddings is not None and embeddings in kept:
            hooks.append(embeddings.register_forward_hook(lambda *given: given[2].to(torch.bfloat16)))
        try:
            if works():
                return True
        except (RuntimeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
        for hook in hooks:
            hook.remove()
        for name, parameter in model.named_parameters():
            parameter.data = original[name]
    return False
