"""What a float module must be for a quantized form to be made of it."""

import torch
from torch.nn.parameter import UninitializedParameter

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def titled(kind, name):
    """How messages call a module of that kind found as `name`, and the prefix of its parameters."""
    return (f"{name} ({kind})", f"{name}.") if name else (kind, "")


def check_float_parameters(prefix, **parameters):
    """Raises ValueError for a parameter that is uninitialized or has no supported float dtype."""
    for key, value in parameters.items():
        if isinstance(value, UninitializedParameter):
            raise ValueError(f"{prefix}{key} is not initialized; run the model once")
        if value is not None and value.dtype not in FLOAT_DTYPES:
            listed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
            raise ValueError(f"{prefix}{key} is {value.dtype}; allowed: {listed}")


def check_finite(prefix, weight):
    """Raises ValueError for a weight with NaN or Inf."""
    weight = weight.detach()
    if weight.numel() and not weight.is_meta:
        extremes = torch.stack(torch.aminmax(weight))  # NaN in the weight makes both NaN
        if not extremes.isfinite().all():
            raise ValueError(f"{prefix}weight holds NaN or Inf")
