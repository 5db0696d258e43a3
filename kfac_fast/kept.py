"""Which tensor autograd keeps for a layer's input: under autocast a cast of it, and holding the input would be more."""

from __future__ import annotations

import torch
from torch import Tensor

from .layers import Inputs
from .passes import saves_are_packed

# Where operations of torch.nn's layers keep their input.
_NAMES = {
    "AddmmBackward0": "_saved_mat1",
    "MmBackward0": "_saved_self",
    "ConvolutionBackward0": "_saved_input",
    "NativeLayerNormBackward0": "_saved_input",
    "NativeGroupNormBackward0": "_saved_input",
    "NativeBatchNormBackward0": "_saved_input",
    "CudnnBatchNormBackward0": "_saved_input",
}
_SHAPES = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward1", "UnsqueezeBackward0", "TransposeBackward0")


def as_kept(inputs: Inputs, output: Tensor) -> Inputs:
    """Inputs of a use, the first of them in the form in which autograd keeps it for the backward pass.

    Looked for under autocast only, right above the output; where it is not found, the inputs are returned as they are.

    Args:
        inputs: As `Layer.inputs` gives them.
        output: Of the same use, with a graph.
    """
    first, *others = inputs
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type) or saves_are_packed():
        return inputs
    node = output.grad_fn
    while node is not None and node.name() in _SHAPES:
        node = node.next_functions[0][0]
    saved = getattr(node, _NAMES.get(node.name(), ""), None) if node is not None else None
    if saved is None or saved.dtype == first.dtype or saved.numel() != first.numel():
        return inputs
    return (saved.detach().view(first.shape), *others)
