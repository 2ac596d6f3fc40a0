"""The CUDA ops give the bits of the CPU's."""

import numpy as np
import pytest
import torch
from compare import assert_all_same, assert_same
from drawn import DTYPES, LAYOUTS, ROWS, cases, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from op_arguments import CUDA_OPS, OPS, op_named, valid_arguments, valid_grouped_arguments
from test_ops_parts import drawn_integers, drawn_scale

import dynquant

DEVICE = "cuda"
ops = torch.ops.dynquant
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason=f"CUDA is {dynquant.info()['cuda']}"
)

ROW_EDGES = (*range(0, 6), 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)
COLUMN_EDGES = (1, 7, 8, 9, 31, 33, 63, 64, 65, 127, 128, 129, 191, 193)
DEPTHS = (1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 127, 129, 255, 257, 1023, 4097, 8191, 8192)
SCHEMES = [(per_token, symmetric) for per_token in (True, False) for symmetric in (False, True)]


def on_gpu(tensor):
    """The same values with the same strides, and an offset where it has one."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_cpu:
        return tensor
    if tensor.numel() == 0:
        return tensor.to(DEVICE)
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset()
    whole = tensor.as_strided((first + last + 1,), (1,), 0).to(DEVICE)
    return whole.as_strided(tensor.shape, tensor.stride(), first)


def same_on_both(op, *arguments):
    expected = op(*arguments)
    poison()
    actual = op(*map(on_gpu, arguments))
    if isinstance(expected, torch.Tensor):
        expected, actual = (expected,), (actual,)
    assert_all_same([tensor.cpu() for tensor in actual], expected, op)


def poison():
    """Leaves garbage in the memory that the next results are likely to get."""
    for size in (512, 4096, 1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), 0xA5, dtype=torch.uint8, device=DEVICE)


def drawn_weight(rng, n, k):
    weight = torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))
    return weight, torch.from_numpy(rng.uniform(1e-3, 1e-2, n).astype(np.float32))


def linear_on_both(rng, m, n, k, dtype=torch.float32, schemes=(True, False), kinds=("normal",)):
    weight, scale = drawn_weight(rng, n, k)
    x = rows_of(rng, m, k, kinds).to(dtype)
    bias = torch.randn(n).to(dtype) if rng.random() < 0.5 else None
    packed = ops.pack_weight(weight)
    same_on_both(ops.linear_dynamic, x, packed, scale, bias, *schemes)


@pytest.mark.parametrize("name", CUDA_OPS)
def test_opcheck(name):
    values = valid_arguments(m=(2, 3), n=65, k=64)
    torch.library.opcheck(op_named(name), tuple(on_gpu(values[argument]) for argument in OPS[name]))


@pytest.mark.parametrize("name", CUDA_OPS)
def test_wrong_arguments_are_named(name):
    values = {key: on_gpu(value) for key, value in valid_arguments().items()}
    for argument in OPS[name]:
        if isinstance(values[argument], torch.Tensor):
            for wrong in (values[argument].double(), values[argument][None, None]):
                arguments = [wrong if key == argument else values[key] for key in OPS[name]]
                if wrong.dtype != torch.float64 and argument in ("x", "q", "acc"):
                    continue  # any shape of rows will do
                with pytest.raises(RuntimeError, match=rf"\b{argument}\b"):
                    op_named(name)(*arguments)


@settings(max_examples=600)
@given(case=cases(bits=(8,)))
def test_activation(case):
    arguments = case.activation(), case.per_token, case.symmetric
    same_on_both(ops.quantize_activation, *arguments)
    same_on_both(ops.choose_qparams, *arguments)


@settings(max_examples=300)
@given(case=cases(bits=(8,)))
def test_given_parameters(case):
    x, scale = case.activation(), drawn_scale(case)
    zero_point = torch.from_numpy(case.rng.integers(0, 256, scale.shape, dtype=np.int32))
    if case.symmetric:
        zero_point.zero_()
    same_on_both(ops.quantize_with, x, scale, zero_point, case.symmetric)


@settings(max_examples=300)
@given(case=cases(bits=(8,)))
def test_weight(case):
    weight = case.float_weight()
    same_on_both(ops.quantize_weight, weight, case.per_channel)
    q, _ = ops.quantize_weight(weight, case.per_channel)
    same_on_both(ops.pack_weight, q)
    same_on_both(ops.unpack_weight, ops.pack_weight(q), case.n, case.k)


@settings(max_examples=600)
@given(case=cases(bits=(8,)), dtype=st.sampled_from(DTYPES))
def test_product(case, dtype):
    (q, zero_point), (weight, weight_scale) = drawn_integers(case), case.weight()
    scale, bias, packed = drawn_scale(case), case.bias(), ops.pack_weight(weight)
    same_on_both(ops.int_mm, q, zero_point, packed, weight.shape[0])
    acc = ops.int_mm(q, zero_point, packed, weight.shape[0])
    same_on_both(ops.rescale, acc, scale, weight_scale, bias, dtype)
    same_on_both(ops.scaled_mm, q, scale, zero_point, packed, weight_scale, bias, dtype)


@settings(max_examples=600)
@given(case=cases(bits=(8,)))
def test_linear(case):
    x, (weight, weight_scale), bias = case.activation(), case.weight(), case.bias()
    packed, schemes = ops.pack_weight(weight), (case.per_token, case.symmetric)
    same_on_both(ops.linear_dynamic, x, packed, weight_scale, bias, *schemes)
    same_on_both(ops.linear_dynamic.inference, x, packed, weight_scale, bias, *schemes)


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_of_rows(dtype, schemes):
    for m in (3, 40, 300):
        values = valid_grouped_arguments(m=(m,), n=130, k=70, dtype=dtype)
        values |= {"per_token": schemes[0], "symmetric": schemes[1]}
        same_on_both(ops.linear_grouped, *values.values())


@pytest.mark.parametrize("m", ROW_EDGES)
def test_every_edge_of_rows_and_columns(m):
    rng = np.random.default_rng(m)
    for n in COLUMN_EDGES:
        linear_on_both(rng, m, n, 200, kinds=tuple(ROWS))


@pytest.mark.parametrize("k", DEPTHS)
def test_every_edge_of_the_depth(k):
    rng = np.random.default_rng(k)
    for m in (1, 3, 4, 5, 16, 33, 64, 65, 129):
        for dtype in DTYPES:
            linear_on_both(rng, m, 131, k, dtype, SCHEMES[rng.integers(4)])


@pytest.mark.parametrize("schemes", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype, schemes):
    linear_on_both(np.random.default_rng(0), 4096, 773, 1029, dtype, schemes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_longer_than_what_is_held(dtype):
    rng = np.random.default_rng(0)
    for k in (16384, 16385, 40001, 65536):
        x = rows_of(rng, 3, k, ("normal", "any magnitude", "NaN")).to(dtype)
        for schemes in SCHEMES:
            same_on_both(ops.quantize_activation, x, *schemes)
    linear_on_both(rng, 2, 65, 65536, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    rng = np.random.default_rng(0)
    weight, scale = drawn_weight(rng, 70, 96)
    packed = ops.pack_weight(weight)
    for dtype in DTYPES:
        x = LAYOUTS[layout](rows_of(rng, 6, 96, ("normal",)).reshape(2, 3, 96).to(dtype))
        same_on_both(ops.linear_dynamic, x, packed, scale)
        q, parameters, zero_point = ops.quantize_activation(x.contiguous())
        arguments = LAYOUTS[layout](q), parameters, zero_point, packed, scale, None, dtype
        same_on_both(ops.scaled_mm, *arguments)


def test_a_packed_tensor_anywhere_in_memory():
    rng = np.random.default_rng(0)
    weight, scale = drawn_weight(rng, 70, 130)
    packed, x = ops.pack_weight(weight), torch.randn(9, 130)
    for offset in (1, 3, 4, 8, 33):
        buffer = torch.zeros(packed.numel() + offset, dtype=torch.int8)
        moved = buffer[offset:].copy_(packed)
        same_on_both(ops.linear_dynamic, x, moved, scale)
        same_on_both(ops.unpack_weight, moved, 70, 130)


@pytest.mark.parametrize("low, high", [(0, 255), (-128, 127)], ids=["uint8", "int8"])
def test_the_extreme_products(low, high):
    k = 65536
    packed = ops.pack_weight(torch.tensor([[127], [-127]], dtype=torch.int8).repeat(1, k))
    dtype = torch.uint8 if low == 0 else torch.int8
    for m in (2, 40, 200):
        for value, zero in ((low, high), (high, low), (low, low), (high, high)):
            q = torch.full((m, k), value, dtype=dtype)
            same_on_both(ops.int_mm, q, torch.tensor([zero], dtype=torch.int32), packed, 2)


def test_repeated_runs_and_two_streams():
    rng = np.random.default_rng(0)
    weight, scale = (tensor.to(DEVICE) for tensor in drawn_weight(rng, 777, 2048))
    packed = ops.pack_weight(weight)
    inputs = [torch.randn(m, 2048, device=DEVICE) for m in (1, 3, 40, 300)]
    for per_token in (True, False):
        expected = [ops.linear_dynamic(x, packed, scale, None, per_token) for x in inputs]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        results = []
        for turn in range(50):
            with torch.cuda.stream(streams[turn % 2]):
                for x, wanted in zip(inputs, expected, strict=True):
                    results.append((ops.linear_dynamic(x, packed, scale, None, per_token), wanted))
        torch.cuda.synchronize()
        for result, wanted in results:
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("m", [1, 4, 33, 200])
@pytest.mark.parametrize("per_token", [True, False])
def test_graph_replay_with_other_data(m, per_token):
    rng = np.random.default_rng(m)
    weight, scale = (tensor.to(DEVICE) for tensor in drawn_weight(rng, 130, 515))
    packed = ops.pack_weight(weight)
    x = torch.randn(m, 515, device=DEVICE)
    ops.linear_dynamic(x, packed, scale, None, per_token)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q, q_scale, zero_point = ops.quantize_activation(x, per_token)
        y = ops.linear_dynamic(x, packed, scale, None, per_token)
    for _ in range(3):
        x.copy_(torch.randn_like(x) * 10)
        graph.replay()
        assert_same(y.cpu(), ops.linear_dynamic(x, packed, scale, None, per_token).cpu())
        expected = ops.quantize_activation(x, per_token)
        for actual, wanted in zip((q, q_scale, zero_point), expected, strict=True):
            assert_same(actual.cpu(), wanted.cpu())


def test_weight_ops_refuse_what_the_cpu_refuses():
    weight = torch.randn(5, 7, device=DEVICE)
    for value in (float("nan"), float("inf"), -float("inf")):
        weight[4, 6] = value
        for per_channel in (True, False):
            with pytest.raises(RuntimeError, match="weight holds NaN or Inf"):
                ops.quantize_weight(weight, per_channel)
    q = torch.full((5, 7), -128, dtype=torch.int8, device=DEVICE)
    with pytest.raises(RuntimeError, match="-128"):
        ops.pack_weight(q)


def test_a_foreign_packed_tensor_gives_no_numbers():
    """The host cannot look at a header on the device without waiting for it."""
    x, scale = torch.randn(3, 19, device=DEVICE), torch.ones(70, device=DEVICE)
    packed = ops.pack_weight(torch.ones(70, 20, dtype=torch.int8, device=DEVICE))
    assert ops.linear_dynamic(x, packed, scale).isnan().all()
    with pytest.raises(RuntimeError, match="packed"):
        ops.linear_dynamic(torch.randn(3, 90, device=DEVICE), packed, scale)


def test_tensors_on_two_devices_are_refused():
    x, scale = torch.randn(3, 20, device=DEVICE), torch.ones(70)
    packed = ops.pack_weight(torch.ones(70, 20, dtype=torch.int8, device=DEVICE))
    with pytest.raises(RuntimeError, match="weight_scale must be on cuda:0"):
        ops.linear_dynamic(x, packed, scale)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_the_second_device():
    rng = np.random.default_rng(0)
    weight, scale = drawn_weight(rng, 130, 515)
    packed, x = ops.pack_weight(weight), torch.randn(9, 515)
    y = ops.linear_dynamic(*(tensor.to("cuda:1") for tensor in (x, packed, scale)))
    assert y.device == torch.device("cuda:1") and torch.cuda.current_device() == 0
    assert_same(y.cpu(), ops.linear_dynamic(x, packed, scale))
