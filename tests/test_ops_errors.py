"""A wrong argument is a Python exception whose text names that argument."""

import pytest
import torch
from op_arguments import BLOCKS, MIXERS, OPS, K, M, N, call, valid_arguments, valid_call

from dynquant.ops.blocks import ACTIVATIONS

VALID = valid_arguments()
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
GOOD_DTYPES = {
    "weight": FLOATS,
    "x": FLOATS,
    "bias": FLOATS,
    "indices": {torch.int64, torch.int32},
    "offsets": {torch.int64, torch.int32},
    "rows": {torch.uint8},
    "qparams": {torch.float32},
    "half_weight": {torch.bfloat16, torch.float16},
    "qweight": {torch.int8},
    "packed": {torch.int8},
    "q": {torch.int8, torch.uint8},
    "acc": {torch.int32},
    "scale": {torch.float32},
    "weight_scale": {torch.float32},
    "zero_point": {torch.int32},
}
ALL_DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    torch.complex64,
)
BAD_SHAPES = {
    "weight": [(), (N * K,), (1, N, K), (1, 65537)],
    "qweight": [(), (N * K,), (1, N, K), (1, 65537)],
    "rows": [(), (N * K,), (N, K + 1), (N, K - 1)],
    "qparams": [(), (N,), (N, 1), (N, 3), (N - 1, 2), (2, N)],
    "half_weight": [(), (N * K,), (1, N, K), (N, K + 1)],
    "packed": [(), (0,), (10,), (64,), (1 << 12,), (2, 64)],
    "x": [()],
    "q": [(), (M, K - 1), (M, K + 1), (M, 0)],
    "acc": [()],
    "scale": [(0,), (M - 1,), (M + 1,), (M, 1), (1, M), (1, 1)],
    "zero_point": [(0,), (M - 1,), (M + 1,), (M, 1), (1, M), (1, 1)],
    "weight_scale": [(0,), (N - 1,), (N + 1,), (N, 1), (1, N)],
    "bias": [(0,), (1,), (N - 1,), (N + 1,), (N, 1), (1, N)],
}
EXCEPTIONS = (RuntimeError, TypeError, ValueError, NotImplementedError)


def uses(argument):
    return [name for name, arguments in OPS.items() if argument in arguments]


def refused(name, argument, value, text=None):
    with pytest.raises(EXCEPTIONS, match=rf"\b{argument}\b" if text is None else text) as error:
        call(name, VALID | {argument: value})
    assert len(str(error.value)) > len(argument) + 10, "the text says nothing"


def test_the_valid_calls_pass():
    for name in OPS:
        call(name, VALID)


@pytest.mark.parametrize("argument", GOOD_DTYPES)
def test_dtypes(argument):
    for dtype in ALL_DTYPES:
        for name in uses(argument):
            if dtype not in GOOD_DTYPES[argument]:
                refused(name, argument, VALID[argument].to(dtype))


@pytest.mark.parametrize("argument", BAD_SHAPES)
def test_shapes(argument):
    for shape in BAD_SHAPES[argument]:
        for name in uses(argument):
            if (name, shape) == ("quantize_embedding", (1, 65537)):
                continue  # the rows of a table may have any width
            refused(name, argument, torch.zeros(shape, dtype=VALID[argument].dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.int32, torch.complex64])
def test_output_dtypes(dtype):
    for name in uses("dtype"):
        refused(name, "dtype", dtype)


@pytest.mark.parametrize(
    "value", [-1, 0, N - 1, N + 1, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)]
)
def test_sizes(value):
    for name in uses("n"):
        refused(name, "n", value)
    refused("unpack_weight", "k", value)


@pytest.mark.parametrize("k", [0, K - 1, K + 1, 65537])
def test_depth_of_the_activation(k):
    for name in ("linear_dynamic", "linear_half"):
        refused(name, "x", torch.zeros(M, k))


def test_columns_of_the_sum():
    refused("rescale", "acc", torch.zeros(M, N + 1, dtype=torch.int32), "acc|weight_scale|bias")


def test_packed_with_strides():
    for name in uses("packed"):
        refused(name, "packed", VALID["packed"].repeat_interleave(2)[::2])
        refused(name, "packed", VALID["packed"][:1].expand(VALID["packed"].shape))


@pytest.mark.parametrize("argument", GOOD_DTYPES)
def test_other_devices_and_layouts(argument):
    for name in uses(argument):
        if sum(isinstance(VALID[other], torch.Tensor) for other in OPS[name]) > 1:
            refused(name, argument, VALID[argument].to("meta"), "device|meta|Meta|packed|cpu|CPU")
        refused(name, argument, VALID[argument].to_sparse(), "(?i)sparse")
        refused(name, argument, "text", argument)
        if argument != "bias":  # torch passes None on as an undefined tensor
            refused(name, argument, None, f"{argument}|no tensor arguments")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weight_that_is_not_finite(value, per_channel):
    for position in (0, N * K // 2, N * K - 1):
        weight = VALID["weight"].clone()
        weight.view(-1)[position] = value
        with pytest.raises(EXCEPTIONS, match="weight"):
            torch.ops.dynquant.quantize_weight(weight, per_channel)


@pytest.mark.parametrize("dtype, values", [(torch.uint8, (-1, 256)), (torch.int8, (-129, 128))])
def test_zero_point_out_of_its_range(dtype, values):
    for value in (*values, -(1 << 31), (1 << 31) - 1):
        zero_point = VALID["zero_point"].clamp(0, 127)
        zero_point[1] = value
        arguments = VALID | {"q": VALID["q"].to(dtype), "zero_point": zero_point}
        for name in ("int_mm", "scaled_mm"):
            with pytest.raises(EXCEPTIONS, match="zero_point"):
                call(name, arguments)


@pytest.mark.parametrize("name", BLOCKS | MIXERS)
def test_tensors_of_blocks(name):
    """Each wrong in its dtype, its shape, its device or its layout."""
    valid = valid_call(name)
    arguments = (BLOCKS | MIXERS)[name]
    for argument in arguments:
        value = valid[argument]
        if not isinstance(value, torch.Tensor):
            continue
        wrong = [value.to(torch.float64), value.to(torch.int64), value[None, None, None, None]]
        # One tap, or one position, more is as right.
        has_sizes = len(arguments) > 1 and name != "causal_conv1d"
        if has_sizes and value.shape[-1] > 1 and argument != "x":
            wrong.append(torch.cat([value, value[..., :1]], -1))
        if argument == "x" and name in BLOCKS and name not in ("rotary", "attention", "encoder"):
            wrong.pop(2)  # rows of any shape
        for given in wrong:
            with pytest.raises(EXCEPTIONS, match=rf"\b{argument}\b"):
                call(name, valid | {argument: given})
        if argument != "x":
            with pytest.raises(EXCEPTIONS, match="device|meta|Meta|cpu|CPU"):
                call(name, valid | {argument: value.to("meta")})
        with pytest.raises(EXCEPTIONS, match="(?i)sparse"):
            call(name, valid | {argument: value.to_sparse()})


@pytest.mark.parametrize("name", BLOCKS)
def test_numbers_of_blocks(name):
    valid = valid_call(name)
    wrong = {
        "function": (-1, len(ACTIVATIONS), 1 << 40),
        "activation": (-1, len(ACTIVATIONS), 1 << 40),
        "split": (-1, 1, 3),
        "norm_before": (-1, 0, 2, 3, 4),
        "norm_after": (-1, 0, 2, 3, 4),
        "eps": (-1.0, float("nan")),
        "norm_before_eps": (-1.0, float("nan")),
        "norm_after_eps": (-1.0, float("nan")),
        "heads": (0, -2, 1, 5, 1 << 40),
        "kv_heads": (0, -2, 1, 3, 1 << 40),
        "scale": (float("nan"), float("inf")),
    }
    for argument in set(BLOCKS[name]) & set(wrong):
        for value in wrong[argument]:
            with pytest.raises(
                EXCEPTIONS, match="packed_|heads" if "heads" in argument else argument
            ):
                call(name, valid | {argument: value})


@pytest.mark.parametrize(
    "name, changes",
    [
        *((name, {"x": 3}) for name in ("linear_block", "feed_forward", "attention")),
        *((name, {"activation": 99}) for name in ("linear_block", "feed_forward")),
        ("feed_forward", {"split": 9}),
        ("attention", {"kv_heads": 0}),
        ("attention", {"sin": None}),
    ],
)
def test_blocks_check_everything_before_they_allocate(name, changes):
    """An output of so many rows cannot be had."""
    values = valid_call(name) | {"residual": None} | changes
    rows = (1 << 40, 4) if name == "attention" else (1 << 40,)
    values["x"] = torch.zeros(changes.get("x", K)).expand(*rows, -1)
    wrong = "x must have K = 7" if "x" in changes else next(iter(changes))
    with pytest.raises(RuntimeError, match=wrong):
        call(name, values)
