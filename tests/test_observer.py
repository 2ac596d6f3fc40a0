"""Observer: the range it records, its parameters, its life as a module."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same
from hypothesis import given
from hypothesis import strategies as st
from round_trips import torch_saved

import dynquant
from dynquant import Observer

BATCHES = st.lists(
    st.lists(st.floats(width=32, allow_nan=False), min_size=0, max_size=6), min_size=1, max_size=4
)


@given(batches=BATCHES)
def test_range_of_everything_seen(batches):
    observer = Observer()
    for batch in batches:
        x = torch.tensor(batch, dtype=torch.float32)
        assert observer(x) is x
    values = [value for batch in batches for value in batch]
    assert observer.has_data == bool(values)
    assert observer.qmin.item() == min(values, default=np.inf)
    assert observer.qmax.item() == max(values, default=-np.inf)


@given(batches=BATCHES.filter(lambda batches: any(batches)))
def test_once_keeps_the_first(batches):
    observer = Observer(once=True)
    for batch in batches:
        observer(torch.tensor(batch))
    first = next(batch for batch in batches if batch)
    assert observer.qmin.item() == min(first) and observer.qmax.item() == max(first)


@pytest.mark.parametrize("once", [False, True])
def test_per_channel(once):
    observer = Observer(quant_scheme=dynquant.per_channel, once=once)
    x = torch.randn(3, 4, 5)
    observer(x)
    observer(x * 2)
    seen = x if once else x * 2
    assert observer.qmin.tolist() == seen.amin((1, 2)).tolist()
    assert observer.qmax.tolist() == seen.amax((1, 2)).tolist()
    with pytest.raises(ValueError, match="has seen 3 channels .*has 4"):
        observer(torch.randn(4, 4, 5))
    observer.reset()
    observer(torch.randn(4))
    assert observer.qmin.shape == (4,)
    with pytest.raises(ValueError, match="one dimension or more"):
        observer(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_input_dtypes(dtype):
    observer = Observer()
    x = torch.randn(8, dtype=dtype)
    assert observer(x) is x
    assert observer.qmin.dtype == torch.float32
    assert observer.qmin == x.min().to(torch.float32)
    assert observer.qmax == x.max().to(torch.float32)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.bfloat16])
def test_dtypes(dtype):
    assert Observer(dtype).dtype is dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "dtype is torch.float16; allowed: torch.qint8, torch.quint8"),
        ({"dtype": "qint8"}, "dtype is 'qint8'"),
        ({"quant_scheme": dynquant.per_token}, "quant_scheme is 'per_token'; allowed: per_tensor"),
        ({"quant_scheme": None}, "quant_scheme is None"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Observer(**arguments)


def test_torch_qschemes_serve():
    assert Observer(quant_scheme=torch.per_tensor_affine).quant_scheme == dynquant.per_tensor
    assert Observer(quant_scheme=torch.per_channel_symmetric).quant_scheme == dynquant.per_channel


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scheme", [dynquant.per_tensor, dynquant.per_channel])
def test_qparams_follow_the_specification(scheme, symmetric):
    x = torch.randn(3, 40)
    observer = Observer(quant_scheme=scheme)
    observer(x)
    scale, zero_point = observer.calculate_qparams(symmetric)
    rows = (x if scheme == dynquant.per_channel else x.view(1, -1)).numpy()
    expected_scale, expected_zero_point = ref.choose_qparams(rows, True, symmetric)
    assert scale.shape == zero_point.shape == observer.qmin.shape
    assert_same(scale.view(-1), expected_scale)
    assert_same(zero_point.view(-1), expected_zero_point)


def test_bfloat16_needs_no_qparams():
    observer = Observer(torch.bfloat16)
    observer(torch.randn(3))
    scale, zero_point = observer.calculate_qparams()
    assert (scale.item(), zero_point.item(), zero_point.dtype) == (1, 0, torch.int32)


def test_qparams_without_data():
    observer = Observer()
    with pytest.raises(RuntimeError, match="seen no data"):
        observer.calculate_qparams()
    observer(torch.randn(3))
    observer.reset()
    observer(torch.empty(0, 7))
    with pytest.raises(RuntimeError, match="seen no data"):
        observer.calculate_qparams()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    observer = Observer()
    observer(torch.tensor([1.0, bad]))
    observer(torch.tensor([2.0]))
    assert observer.has_data
    with pytest.raises(ValueError, match="NaN or Inf"):
        observer.calculate_qparams()


@pytest.mark.parametrize("scheme", [dynquant.per_tensor, dynquant.per_channel])
def test_state_dict(scheme):
    observer = Observer(quant_scheme=scheme)
    observer(torch.randn(3, 4))
    loaded = Observer(quant_scheme=scheme)
    loaded.load_state_dict(torch_saved(observer.state_dict()))
    assert_same(loaded.qmin, observer.qmin)
    assert_same(loaded.qmax, observer.qmax)
    loaded(torch.full((3, 4), 100.0))
    assert (loaded.qmax == 100).all()


def test_stays_fp32():
    observer = Observer().half()
    observer(torch.tensor([1e30]))
    assert observer.bfloat16().qmax.item() == np.float32(1e30)


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("scheme", [dynquant.per_tensor, dynquant.per_channel])
def test_compiles_without_graph_break(scheme, once):
    observer, expected = (Observer(quant_scheme=scheme, once=once) for _ in range(2))
    compiled = torch.compile(observer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 5)
        assert_same(compiled(x), x)
        expected(x)
    assert_same(observer.qmin, expected.qmin)
    assert_same(observer.qmax, expected.qmax)


@pytest.mark.parametrize("scheme", [dynquant.per_tensor, dynquant.per_channel])
def test_inference_mode_and_normal_mode_mix(scheme):
    observer = Observer(quant_scheme=scheme)
    with torch.inference_mode():
        observer(torch.ones(2, 3))
    observer(-torch.ones(2, 3))
    with torch.inference_mode():
        observer(2 * torch.ones(2, 3))
    assert (observer.qmin == -1).all() and (observer.qmax == 2).all()


def test_keeps_the_gradient():
    x = torch.randn(3, requires_grad=True)
    Observer()(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
