"""QuantStub, DeQuantStub, prepare and convert."""

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant import DeQuantStub, QConfig, QuantStub
from dynquant.nn import DeQuantize, Linear, Quantize


def model(**arguments):
    return nn.Sequential(QuantStub(**arguments), nn.Linear(8, 4), DeQuantStub())


def test_are_identities():
    x = torch.randn(3)
    assert QuantStub()(x) is x and DeQuantStub()(x) is x
    assert QuantStub(qconfig={"dtype": torch.qint8})(x) is x


def test_only_a_qconfig_makes_a_stub_observe():
    plain, observing = QuantStub(), QuantStub(qconfig={})
    assert plain.observer is None and not plain.state_dict()
    observing(torch.tensor([-1.0, 2.0]))
    assert (observing.observer.qmin.item(), observing.observer.qmax.item()) == (-1, 2)
    assert set(observing.state_dict()) == {"observer.qmin", "observer.qmax"}


@pytest.mark.parametrize("stub", [QuantStub, DeQuantStub])
def test_wrong_qconfig(stub):
    with pytest.raises(ValueError, match="qconfig has the key 'bits'"):
        stub(qconfig={"bits": 8})


def test_a_stub_has_8_bits():
    with pytest.raises(ValueError, match="a QuantStub's dtype is torch.float16"):
        QuantStub(qconfig=QConfig(dtype=torch.float16))
    assert QuantStub(qconfig={"dtype": torch.quint8}).observer.dtype is torch.quint8


@pytest.mark.parametrize("inplace", [False, True])
def test_quantize_dynamic_swaps_stubs(inplace):
    quantized = dynquant.quantize_dynamic(model(), {nn.Linear}, inplace=inplace)
    assert [type(module) for module in quantized] == [Quantize, Linear, DeQuantize]
    assert "dynamic" in repr(quantized[0])


@pytest.mark.parametrize("symmetric", [False, True])
def test_statistics_are_used(symmetric):
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    m = model(qconfig={"activation": {"qscheme": scheme}})
    m[0](torch.tensor([-1.0, 2.0]))
    stub = dynquant.quantize_dynamic(m)[0]
    ends = torch.tensor([[-1.0, 2.0]])
    scale, zero_point = torch.ops.dynquant.choose_qparams(ends, True, symmetric)
    assert_same(stub.scale, scale)
    assert_same(stub.zero_point, zero_point)
    assert "calibrated" in repr(stub)


def test_dynamic_ignores_statistics():
    m = model(qconfig={"dynamic": True})
    m(torch.randn(2, 8))
    assert dynquant.quantize_dynamic(m)[0].scale is None


def test_nan_in_the_statistics_is_refused():
    m = model(qconfig={})
    m(torch.full((1, 8), torch.nan))
    with pytest.raises(ValueError, match="^0: the Observer has seen NaN or Inf"):
        dynquant.quantize_dynamic(m)


def test_none_keeps_a_stub():
    quantized = dynquant.quantize_dynamic(model(), {"0": None, nn.Linear: {}})
    assert isinstance(quantized[0], QuantStub) and isinstance(quantized[1], Linear)


def test_spec_configures_a_stub_that_has_no_config():
    spec = {QuantStub: QConfig(symmetric=True)}
    assert dynquant.quantize_dynamic(model(), spec)[0].qconfig.symmetric
    assert not dynquant.quantize_dynamic(model(qconfig={}), spec)[0].qconfig.symmetric
    with pytest.raises(ValueError, match="0: a QuantStub's dtype is torch.float16"):
        dynquant.quantize_dynamic(model(), {QuantStub: QConfig(dtype=torch.float16)})


class TestTwoSteps:
    def test_prepare_calibrate_convert(self):
        m = model()
        prepared = dynquant.prepare(m, {nn.Linear: dynquant.per_tensor})
        assert m[0].observer is None and not hasattr(m[1], "qconfig") and m.training
        assert not prepared.training and type(prepared[1]) is nn.Linear
        x = torch.randn(5, 8)
        assert_same(prepared(x), m(x).detach())
        converted = dynquant.convert(prepared)
        assert [type(module) for module in converted] == [Quantize, Linear, DeQuantize]
        assert converted[1].weight_scale.shape == (1,) and converted[0].scale is not None
        assert type(prepared[1]) is nn.Linear
        assert_same(converted(x), dynquant.convert(converted)(x))

    def test_equals_one_step(self):
        m, x = model(), torch.randn(5, 8)
        two_steps = dynquant.convert(dynquant.prepare(m))
        assert_same(two_steps(x), dynquant.quantize_dynamic(m)(x))

    def test_in_place(self):
        m = model()
        assert dynquant.prepare(m, inplace=True) is m
        assert dynquant.convert(m, inplace=True) is m
        assert isinstance(m[1], Linear)

    def test_keeps_the_range_of_a_stub_that_observes(self):
        m = model(qconfig={})
        m(torch.ones(1, 8))
        assert dynquant.prepare(m)[0].observer.qmax == 1

    def test_qconfig_may_be_changed(self):
        prepared = dynquant.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        prepared[0].qconfig = None
        prepared[1].qconfig = {"qscheme": dynquant.per_tensor}
        converted = dynquant.convert(prepared)
        assert type(converted[0]) is nn.Linear and converted[1].weight_scale.shape == (1,)
        prepared[1].qconfig = {"bits": 4}
        with pytest.raises(ValueError, match="1.qconfig has the key 'bits'"):
            dynquant.convert(prepared)

    def test_nothing_to_convert(self):
        with pytest.raises(ValueError, match="call dynquant.prepare first"):
            dynquant.convert(nn.Sequential(nn.Linear(2, 2)))

    def test_bare_linear(self):
        assert isinstance(dynquant.convert(dynquant.prepare(nn.Linear(2, 2))), Linear)
