"""dequantize: float models of quantized ones."""

import copy
import io
import pickle

import pytest
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant.swap.registry import _FOREIGN_FORMS, _FORMS

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
SEQUENCE = torch.randn(6, 5, 12, generator=torch.Generator().manual_seed(1))


def made(build, dtype=torch.float32):
    torch.manual_seed(0)
    return build().eval().to(dtype)


def _experts():
    from test_nn_experts import experts

    return experts("gpt_oss")


def _routed():
    from test_nn_experts import routed

    return routed()


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    return nn.init.normal_(Conv1D(8, 12).bias) is not None and Conv1D(8, 12)


INDICES = torch.arange(20).reshape(4, 5)
# A float module, what it is called with, and the dtypes of its forms.
INT8_AND_16 = (torch.qint8, torch.float16, torch.bfloat16)
TABLES = (torch.quint8, torch.quint4x2)
MODULES = {
    "Linear": (lambda: nn.Linear(12, 7), (X,), INT8_AND_16),
    "Linear without bias": (lambda: nn.Linear(12, 7, bias=False), (X,), INT8_AND_16),
    "Conv1D": (_conv1d, (X,), INT8_AND_16),
    "Conv1d": (lambda: nn.Conv1d(5, 7, 3, padding="same"), (SEQUENCE,), (torch.qint8,)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(5, 7, 3, 2), (SEQUENCE,), (torch.qint8,)),
    "MultiheadAttention": (
        lambda: nn.MultiheadAttention(12, 3, batch_first=True),
        (SEQUENCE,) * 3,
        INT8_AND_16,
    ),
    "MultiheadAttention, other sizes": (
        lambda: nn.MultiheadAttention(12, 3, kdim=12, vdim=10, add_bias_kv=True),
        (SEQUENCE, SEQUENCE, SEQUENCE[..., :10]),
        INT8_AND_16,
    ),
    "MultiheadAttention without bias": (
        lambda: nn.MultiheadAttention(12, 3, bias=False, add_zero_attn=True),
        (SEQUENCE,) * 3,
        INT8_AND_16,
    ),
    "LSTM": (
        lambda: nn.LSTM(12, 8, num_layers=2, bidirectional=True, proj_size=4),
        (SEQUENCE,),
        INT8_AND_16,
    ),
    "GRU": (lambda: nn.GRU(12, 8, batch_first=True, bias=False), (SEQUENCE,), INT8_AND_16),
    "RNN": (lambda: nn.RNN(12, 8, nonlinearity="relu"), (SEQUENCE,), INT8_AND_16),
    "LSTMCell": (lambda: nn.LSTMCell(12, 8), (X,), INT8_AND_16),
    "GRUCell": (lambda: nn.GRUCell(12, 8), (X,), INT8_AND_16),
    "RNNCell": (lambda: nn.RNNCell(12, 8, nonlinearity="relu"), (X,), INT8_AND_16),
    "Embedding": (lambda: nn.Embedding(20, 9, padding_idx=2), (INDICES,), TABLES),
    "EmbeddingBag": (
        lambda: nn.EmbeddingBag(20, 9, mode="max", padding_idx=1),
        (INDICES,),
        TABLES,
    ),
    "FloatExperts": (_experts, _routed, INT8_AND_16),
    "QuantStub": (dynquant.QuantStub, (X,), (torch.qint8,)),
    "DeQuantStub": (dynquant.DeQuantStub, (X,), (torch.qint8,)),
}
CASES = [(name, dtype) for name, (_, _, dtypes) in MODULES.items() for dtype in dtypes]


def test_every_module_type_has_a_case():
    covered = {name.partition(" ")[0].rstrip(",") for name in MODULES}
    expected = {base.__name__ for base, form in _FORMS.items() if form}
    expected |= {name for _, name, _ in _FOREIGN_FORMS}
    # It becomes an nn.Linear, which computes the same: test_transformers.py.
    assert covered == expected - {"FalconLinear"}


def tensors(output):
    return [one for one in torch.utils._pytree.tree_leaves(output) if one is not None]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@torch.no_grad()
def test_every_module_type(name, dtype):
    if name in ("Conv1D", "FloatExperts"):
        pytest.importorskip("transformers", reason="transformers is not installed")
    build, arguments, _ = MODULES[name]
    arguments = arguments() if callable(arguments) else arguments
    mod = made(build)
    form = dynquant.quantize_dynamic(mod, {"": dynquant.QConfig(dtype=dtype)})
    again = dynquant.dequantize(form)
    assert type(again) is type(mod)
    assert repr(again) == repr(mod)
    assert not again.training
    state, wanted = again.state_dict(), mod.state_dict()
    assert {key: (v.shape, v.dtype) for key, v in state.items()} == {
        key: (v.shape, v.dtype) for key, v in wanted.items()
    }
    made(build).load_state_dict(state)
    for key, parameter in again.named_parameters():
        assert parameter.requires_grad and parameter.is_contiguous()
        most = mod.get_parameter(key).abs().max()
        coarse = 5 if dtype == torch.quint4x2 else 90
        assert (parameter - mod.get_parameter(key)).abs().max() <= most / coarse
    for one, other in zip(tensors(again(*arguments)), tensors(mod(*arguments)), strict=True):
        bound = 0.5 if dtype == torch.quint4x2 else 0.1
        assert (one - other).abs().max() <= bound * max(1, other.abs().max())
    # The values are those for which the quantized weights stand.
    requantized = dynquant.quantize_dynamic(again, {"": dynquant.QConfig(dtype=dtype)})
    again.train()
    assert type(requantized) is type(form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_model(dtype):
    mod = made(lambda: nn.Sequential(nn.Linear(12, 7), nn.GRU(7, 3)), dtype)
    again = dynquant.dequantize(dynquant.quantize_dynamic(mod))
    assert {one.dtype for one in again.parameters()} == {dtype}
    cast = dynquant.dequantize(dynquant.quantize_dynamic(mod).float())
    assert {one.dtype for one in cast.parameters()} == {torch.float32}


@torch.no_grad()
def test_products_with_configs_of_their_own():
    lstm = made(lambda: nn.LSTM(12, 8))
    form = dynquant.quantize_dynamic(
        nn.Sequential(lstm), {"0": dynquant.QConfig(), "0.weight_hh_l0": None}
    )
    again = dynquant.dequantize(form)
    assert_same(again[0].weight_hh_l0, lstm.weight_hh_l0)
    assert_same(again[0].weight_ih_l0, form[0].weight_ih_l0.dequantize())
    assert again[0].weight_hh_l0.data_ptr() != form[0].weight_hh_l0.data_ptr()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.second = (
            nn.Embedding(20, 12),
            nn.Linear(12, 20),
            nn.Linear(12, 20),
        )
        self.first.weight = self.second.weight = self.table.weight

    def forward(self, x):
        return self.first(self.table(x)) + self.second(self.table(x))


class TestTies:
    def test_to_what_stayed_in_float(self):
        mod = made(Tied)
        again = dynquant.dequantize(dynquant.quantize_dynamic(mod))
        assert again.first.weight is again.table.weight is again.second.weight
        assert_same(again.table.weight, mod.table.weight)
        assert again.table.weight is not mod.table.weight

    def test_of_quantized_weights_of_several_formats(self):
        spec = {nn.Linear: dynquant.QConfig(), nn.Embedding: dynquant.QConfig(dtype=torch.quint8)}
        again = dynquant.dequantize(dynquant.quantize_dynamic(made(Tied), spec))
        assert again.first.weight is again.table.weight is again.second.weight

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_of_copies_within_another_model(self, way):
        outer = nn.Sequential(way(dynquant.quantize_dynamic(made(Tied))))
        (again,) = dynquant.dequantize(outer, inplace=True)
        assert again.first.weight is again.table.weight is again.second.weight

    def test_not_where_one_was_changed(self):
        form = dynquant.quantize_dynamic(made(Tied))
        form.first.weight = torch.randn(20, 12)
        again = dynquant.dequantize(form)
        assert again.first.weight is not again.table.weight is again.second.weight
        assert_same(again.first.weight, form.first.weight.dequantize())

    def test_equal_weights_that_were_not_tied(self):
        linear = made(lambda: nn.Linear(12, 7))
        again = dynquant.dequantize(
            dynquant.quantize_dynamic(nn.Sequential(linear, copy.deepcopy(linear)))
        )
        assert again[0].weight is not again[1].weight

    def test_one_module_in_two_places(self):
        linear = made(lambda: nn.Linear(12, 12))
        again = dynquant.dequantize(dynquant.quantize_dynamic(nn.Sequential(linear, linear)))
        assert again[0] is again[1]


class TestCall:
    def test_the_quantized_model_is_untouched(self):
        form = dynquant.quantize_dynamic(made(lambda: nn.Sequential(nn.Linear(12, 7), nn.ReLU())))
        again = dynquant.dequantize(form)
        assert type(form[0]) is dynquant.nn.Linear
        with torch.no_grad():
            again[0].bias.zero_()
        assert form[0].bias.any()

    def test_in_place(self):
        model = made(lambda: nn.Sequential(nn.Linear(12, 7), nn.ReLU()))
        model.held = [model[0]]
        form = dynquant.quantize_dynamic(model, inplace=True)
        again = dynquant.dequantize(form, inplace=True)
        assert again is form and type(form[0]) is nn.Linear and form.held[0] is form[0]

    def test_hooks_are_kept(self):
        model = made(lambda: nn.Sequential(nn.Linear(12, 7)))
        model[0].register_forward_hook(lambda module, args, output: output * 0)
        again = dynquant.dequantize(dynquant.quantize_dynamic(model))
        assert not again(X).any()

    def test_trains(self):
        again = dynquant.dequantize(dynquant.quantize_dynamic(made(lambda: nn.Linear(12, 7))))
        again(X).sum().backward()
        assert again.weight.grad.any() and again.bias.grad.any()

    def test_inference_mode(self):
        with torch.inference_mode():
            again = dynquant.dequantize(dynquant.quantize_dynamic(made(lambda: nn.Linear(12, 7))))
        again(X).sum().backward()

    def test_nothing_quantized(self):
        with pytest.warns(UserWarning, match="nothing is quantized"):
            assert type(dynquant.dequantize(nn.Linear(3, 2))) is nn.Linear

    def test_arguments(self):
        with pytest.raises(TypeError, match="expected an nn.Module"):
            dynquant.dequantize("model")
        with pytest.raises(TypeError, match="inplace is 1"):
            dynquant.dequantize(nn.Linear(3, 2), inplace=1)

    def test_a_form_of_the_users_own(self):
        class Scaled(dynquant.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        class Restored(Scaled):
            def to_float(self):
                return nn.Identity()

        model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
        for form, kind in ((Scaled, Scaled), (Restored, nn.Identity)):
            quantized = dynquant.quantize_dynamic(model, {"0"}, mapping={nn.Linear: form})
            if kind is Scaled:
                with pytest.warns(UserWarning, match=r"left quantized.*0 \(Scaled\)"):
                    again = dynquant.dequantize(quantized)
            else:
                again = dynquant.dequantize(quantized)
            assert type(again[0]) is kind

    def test_calibrated_stub_observes_again(self):
        model = nn.Sequential(dynquant.QuantStub(qconfig=dynquant.QConfig()), nn.Linear(12, 7))
        model(X)
        again = dynquant.dequantize(dynquant.convert(dynquant.prepare(model)))
        assert again[0].observer is not None and not again[0].observer.has_data

    def test_fused(self):
        layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        model = made(lambda: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
        again = dynquant.dequantize(dynquant.quantize_dynamic(model, fuse=True))
        assert {type(one) for one in again.modules()} == {type(one) for one in model.modules()}
        with torch.no_grad():
            assert (again(SEQUENCE) - model(SEQUENCE)).abs().max() < 0.1
        model.load_state_dict(again.state_dict())
        torch.save(again, io.BytesIO())
