"""Quantized modules on a GPU give the CPU's bits, wherever they were quantized."""

import copy
import io

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason=f"CUDA is {dynquant.info()['cuda']}"
)


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 130), nn.ReLU(), nn.Linear(130, 33, bias=False))


def both():
    quantized = dynquant.quantize_dynamic(model())
    return quantized, copy.deepcopy(quantized).to(DEVICE)


@pytest.mark.parametrize("rows", [(1,), (3, 5), (200,), (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_model_that_moves(rows, dtype):
    on_cpu, on_gpu = both()
    x = torch.randn(*rows, 70).to(dtype)
    with torch.no_grad():
        expected = on_cpu[0](x)
        assert_same(on_gpu[0](x.to(DEVICE)).cpu(), expected)
        back = on_gpu.cpu()
        assert_same(back[0](x), expected)


def test_quantized_on_the_gpu():
    on_cpu, _ = both()
    on_gpu = dynquant.quantize_dynamic(model().to(DEVICE))
    assert on_gpu[0].packed.device.type == DEVICE
    for (name, wanted), actual in zip(
        on_cpu.state_dict().items(), on_gpu.state_dict().values(), strict=True
    ):
        assert_same(actual.cpu(), wanted, name)


def test_state_dicts_pickles_and_copies():
    on_cpu, on_gpu = both()
    x = torch.randn(5, 70)
    expected = on_cpu(x)
    other = dynquant.quantize_dynamic(
        nn.Sequential(nn.Linear(70, 130), nn.ReLU(), nn.Linear(130, 33, bias=False))
    ).to(DEVICE)
    other.load_state_dict(on_cpu.state_dict())
    assert_same(other(x.to(DEVICE)).cpu(), expected)
    buffer = io.BytesIO()
    torch.save(on_gpu, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, map_location=DEVICE, weights_only=False)
    assert_same(loaded(x.to(DEVICE)).cpu(), expected)
    assert_same(on_gpu[0].weight.cpu() + 0, on_cpu[0].weight + 0)


def test_the_gradient():
    on_cpu, on_gpu = both()
    x = torch.randn(5, 70)
    for quantized in (on_cpu, on_gpu):
        own = x.to(quantized[0].packed.device, copy=True).requires_grad_()
        quantized[0](own).sum().backward()
        wanted = quantized[0].weight.float() * quantized[0].weight_scale[:, None]
        torch.testing.assert_close(own.grad, wanted.sum(0).expand(5, 70))


def test_compiled():
    _, on_gpu = both()
    x = torch.randn(5, 70, device=DEVICE)
    assert_same(torch.compile(on_gpu[0])(x).cpu(), on_gpu[0](x).cpu())


def test_autocast():
    on_cpu, on_gpu = both()
    x = torch.randn(5, 70)
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        y = on_gpu[0](x.to(DEVICE))
    assert_same(y.cpu(), on_cpu[0](x.bfloat16()))


def test_stubs_share_one_quantization():
    on_cpu, on_gpu = both()
    quantize = dynquant.nn.Quantize()
    x = torch.randn(5, 70)
    assert_same(on_gpu[0](quantize(x.to(DEVICE))).cpu(), on_cpu[0](quantize(x)))
