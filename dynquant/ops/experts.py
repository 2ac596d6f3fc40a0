"""The op of a mixture's experts: what tracing and users read.

The schema and the implementation are in csrc/ops.
"""

import torch

from dynquant.ops.blocks import check_activation, tensors_of
from dynquant.ops.grouped import check_packed_groups, check_shapes
from dynquant.ops.library import FLOAT_DTYPES, check_bits, check_device, check_dtype, fake


@fake("experts")
def _(
    x,
    chosen,
    chosen_weights,
    weight_up,
    weight_scale_up,
    bias_up,
    n_up,
    weight_down,
    weight_scale_down,
    bias_down,
    n_down,
    activation,
    split=0,
    per_token=True,
    symmetric=False,
    activation_bits=8,
):
    """The experts of a mixture: for each token the sum of w * down_e(activation(up_e(x))).

    It goes over the experts e that are chosen for the token, in their order, each with its weight
    w. Equal in bits to linear_dynamic on the rows of each expert, activation, its product with the
    other half where there is a gate, linear_dynamic, the product with w, rounded to the wider dtype
    of x and chosen_weights, and a sum in fp32 of one after the other from zero. There is no
    gradient.

    Args:
        x: fp32, bf16 or fp16 [T, K].
        chosen: int64 [T, C], the experts of each token; E and beyond stand for none.
        chosen_weights: fp32, bf16 or fp16 [T, C].
        weight_up, weight_scale_up, bias_up, n_up: of E experts, as in linear_grouped.
        weight_down, weight_scale_down, bias_down, n_down: the same from n_up columns, or half of
            them where there is a gate.
        activation: the number of a function of activation.
        split: 0 no gate; 1 the first half of up's columns is what the activation takes, and it is
            multiplied by the second; 2 the other way round.
        per_token, symmetric, activation_bits: as in linear_dynamic, for both products.

    Returns:
        [T, n_down] in x's dtype.

    Raises:
        RuntimeError: another dtype, device or shape, a negative expert, or a number that is not one
            of those named.
    """
    check_bits("activation_bits", activation_bits, symmetric)
    check_device(**tensors_of(locals()))
    check_dtype("x", x, *FLOAT_DTYPES)
    check_dtype("chosen", chosen, torch.int64)
    check_dtype("chosen_weights", chosen_weights, *FLOAT_DTYPES)
    torch._check(x.dim() == 2, lambda: "x must have two dimensions [T, K]")
    torch._check(
        chosen.dim() == 2 and chosen.shape[0] == x.shape[0],
        lambda: f"chosen must have the shape [{x.shape[0]}, C], got {list(chosen.shape)}",
    )
    check_shapes("chosen_weights", chosen_weights, tuple(chosen.shape))
    check_activation("activation", activation)
    torch._check(split in (0, 1, 2), lambda: f"split must be 0, 1 or 2, got {split}")
    torch._check(split == 0 or n_up % 2 == 0, lambda: f"n_up must be even, got {n_up}")
    inner = n_up if split == 0 else n_up // 2
    count = weight_up.shape[0] if weight_up.dim() == 2 else 0
    up, down = (weight_up, weight_scale_up, bias_up), (weight_down, weight_scale_down, bias_down)
    check_packed_groups("up", *up, count, n_up, int(x.shape[1]))
    check_packed_groups("down", *down, count, n_down, int(inner))
    return x.new_empty(x.shape[0], n_down)
