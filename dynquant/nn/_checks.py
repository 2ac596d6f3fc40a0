"""What a float module and a config must be for a quantized form to be made of them."""

import torch
from torch.nn.parameter import UninitializedParameter

from dynquant.qconfig import one_of

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_config(name, float_type, qconfig, dtypes):
    """Raises ValueError for a config that a quantized form does not serve.

    Args:
        name: of the module; "" for a bare one.
        float_type: how messages call its type.
        dtypes: what the form serves.
    """
    module = f"{name} ({float_type})" if name else float_type
    one_of(f"{module}: dtype", qconfig.dtype, dtypes)
    if qconfig.dynamic is False:
        raise ValueError(f"{module}: 'dynamic' is False, but it is quantized at run time only")


def check_parameters(parameters):
    """Raises ValueError unless each is initialized and fp32, bf16 or fp16.

    Args:
        parameters: by name; None counts as absent.
    """
    for key, value in parameters.items():
        if isinstance(value, UninitializedParameter):
            raise ValueError(f"{key} is not initialized; run the model once")
        if value is not None and value.dtype not in FLOAT_DTYPES:
            listed = ", ".join(str(dtype) for dtype in FLOAT_DTYPES)
            raise ValueError(f"{key} is {value.dtype}; allowed: {listed}")


def check_finite(key, weight):
    """Raises ValueError for a weight with NaN or Inf."""
    weight = weight.detach()
    if weight.numel() and not weight.is_meta:
        extremes = torch.stack(torch.aminmax(weight))  # NaN in the weight makes both NaN
        if not extremes.isfinite().all():
            raise ValueError(f"{key} holds NaN or Inf")


def check_scale(key, scale):
    """Raises ValueError unless every value is positive and finite, as in any quantized weight."""
    if scale.is_meta:
        return
    wrong = scale[~((scale > 0) & scale.isfinite())]
    if wrong.numel():
        raise ValueError(f"{key} holds {wrong[0].item()}; scales are positive and finite")


def check_row_qparams(key, qparams):
    """The same for the scales of an embedding's qparams [V, 2]; its offsets are finite."""
    check_scale(key, qparams[:, 0])
    check_finite(key, qparams)
