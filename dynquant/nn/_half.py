"""Weights in 16 bits, and how a float weight becomes one."""

import warnings

import torch

from dynquant.nn.weight import Int8Weight


class HalfWeight(torch.Tensor):
    """A weight in 16 bits that tells, as Int8Weight does, that no float kernel is to take it."""

    __torch_function__ = Int8Weight.__torch_function__


def in_16_bits(weight, dtype):
    """A copy of the finite float `weight` in the dtype, whose range it does not leave.

    Warns:
        UserWarning: where values are beyond the range, which become the nearest finite ones.
    """
    largest = torch.finfo(dtype).max
    half = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not weight.is_meta and not half.isfinite().all():
        warnings.warn(
            f"a weight reaches {weight.abs().max():.4g}; {dtype} ends at {largest:.4g}, which "
            "stands for what is beyond (torch.bfloat16 has the range of fp32)",
            stacklevel=2,
        )
        half = half.clamp(-largest, largest)
    return half
