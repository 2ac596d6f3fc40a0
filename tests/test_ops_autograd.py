"""The gradient of linear_dynamic for its input, and autocast."""

import pytest
import torch
from compare import assert_same
from drawn import DTYPES

linear = torch.ops.dynquant.linear_dynamic


def drawn(m, n, k, dtype=torch.float32, per_channel=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*m, k, generator=generator).to(dtype)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n if per_channel else 1, generator=generator) / 100
    bias = torch.randn(n, generator=generator)
    return x.requires_grad_(), weight, torch.ops.dynquant.pack_weight(weight), scale, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    "m, n, k", [((5,), 33, 70), ((), 8, 16), ((2, 3), 65, 17), ((0,), 4, 4), ((3,), 0, 4)]
)
def test_gradient_of_the_input(m, n, k, per_channel, dtype):
    x, weight, packed, scale, bias = drawn(m, n, k, dtype, per_channel)
    y = linear(x, packed, scale, bias)
    assert y.requires_grad and y.dtype == dtype
    grad_y = torch.randn(y.shape).to(dtype)
    (grad,) = torch.autograd.grad(y, x, grad_y)
    assert grad.dtype == dtype and grad.shape == x.shape
    dequantized = weight.double() * scale.double()[:, None]
    exact = grad_y.double() @ dequantized
    # A few roundings of each product and sum in fp32, then those to the dtype.
    magnitude = grad_y.double().abs() @ dequantized.abs()
    tolerance = 4 * torch.finfo(dtype).eps * magnitude + n * 2e-7 * magnitude
    assert (grad.double() - exact).abs().le(tolerance).all()


@pytest.mark.parametrize("schemes", [(True, False), (True, True), (False, False), (False, True)])
def test_schemes_share_one_gradient(schemes):
    x, _, packed, scale, bias = drawn((5,), 33, 70)
    grads = [
        torch.autograd.grad(linear(x, packed, scale, bias, *flags).sum(), x)[0]
        for flags in (schemes, (True, False))
    ]
    assert_same(*grads)


def test_the_result_does_not_depend_on_the_graph():
    x, _, packed, scale, bias = drawn((5,), 33, 70)
    recorded = linear(x, packed, scale, bias)
    assert_same(linear(x.detach(), packed, scale, bias), recorded.detach())


def test_no_graph_where_none_is_asked_for():
    x, _, packed, scale, bias = drawn((5,), 33, 70)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            y = linear(x, packed, scale, bias)
        assert not y.requires_grad and y.grad_fn is None
    assert not linear(x.detach(), packed, scale, bias).requires_grad


def test_the_other_arguments_get_no_gradient():
    x, _, packed, scale, bias = drawn((5,), 33, 70)
    scale.requires_grad_()
    bias.requires_grad_()
    linear(x, packed, scale, bias).sum().backward()
    assert x.grad is not None and scale.grad is None and bias.grad is None


def test_an_adapter_trains_on_a_frozen_layer():
    x, _, packed, scale, bias = drawn((64,), 20, 30)
    adapter = torch.nn.Linear(30, 30)
    target = linear(x.detach().flip(1), packed, scale, bias)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = (linear(adapter(x.detach()), packed, scale, bias) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


def test_gradient_under_compile():
    x, _, packed, scale, bias = drawn((5,), 33, 70)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    grads = [
        torch.autograd.grad(function(x, packed, scale, bias).square().sum(), x)[0]
        for function in (linear, compiled)
    ]
    assert_same(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_casts_the_input_alone(dtype, enabled):
    x, _, packed, scale, bias = drawn((5,), 33, 70)
    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
        y = linear(x, packed, scale, bias)
    assert y.dtype == (dtype if enabled else torch.float32)
    assert_same(y, linear(x.to(y.dtype), packed, scale, bias))
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32


def test_autocast_of_an_input_that_has_the_dtype():
    x, _, packed, scale, bias = drawn((5,), 33, 70, torch.bfloat16)
    expected = linear(x, packed, scale, bias)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_same(linear(x, packed, scale, bias), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError, match="x"):
        linear(x.double(), packed, scale, bias)
