"""Copies of models, and parameters as eval mode gives them."""

import copy
from contextlib import contextmanager

import torch
from torch.utils._pytree import tree_leaves


def copied(model, memo=None):
    """A deep copy. memo: by id, what takes the place of an object.

    Raises:
        RuntimeError: where an attribute of a module is, or holds, a tensor that torch does not copy
            because it was computed with gradients; the message names it.
    """
    try:
        return copy.deepcopy(model, memo)
    except RuntimeError as error:
        computed = [
            f"{name}.{key}".lstrip(".")
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key not in ("_parameters", "_buffers", "_modules")
            if any(isinstance(one, torch.Tensor) and not one.is_leaf for one in tree_leaves(value))
        ]
        if not computed:
            raise
        raise RuntimeError(
            f"{', '.join(computed)}: a tensor with a gradient history, which torch cannot copy; "
            "detach it, or pass inplace=True"
        ) from error


@contextmanager
def in_eval_mode(module):
    """Within the block, computed parameters give what they give in eval mode, and change nothing.

    In train mode a parametrization may drop values out, or, as spectral_norm does, update buffers.
    """
    training = [one for one in module.modules() if one.training]
    try:
        for one in training:
            one.training = False
        yield
    finally:
        for one in training:
            one.training = True
