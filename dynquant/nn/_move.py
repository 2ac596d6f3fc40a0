"""What Module._apply may do to tensors whose dtype is part of their meaning: move them."""

import torch


def moved(fn, tensor):
    """`fn` of `tensor`, in the dtype that it has.

    `fn` is what Module.to(), half(), share_memory() and the like apply to each tensor. Floats are
    shown to it as integers, since those are not cast.
    """
    shown = tensor
    if tensor.is_floating_point():
        shown = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)
    result = fn(shown)
    if result.dtype != shown.dtype:  # Module.type() casts integers too
        result = shown.to(result.device)
    return tensor if result is shown else result.view(tensor.dtype)
