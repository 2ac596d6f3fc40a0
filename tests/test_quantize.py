"""quantize_dynamic: what is swapped for every form of the call, and what is left as it was."""

import copy
import gc
import sys
import time
import warnings
import weakref

import pytest
import reference as ref
import torch
from compare import assert_same
from hypothesis import given
from hypothesis import strategies as st
from round_trips import torch_saved
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations

import dynquant
from dynquant import QConfig, QuantStub
from dynquant.nn import Linear
from dynquant.swap.selection import Spec


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.act = nn.ReLU()
        self.second = nn.Linear(16, 8, bias=False)

    def forward(self, x):
        return x + self.second(self.act(self.first(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(Block(), Block())
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.layer(x)))


ALL = {
    "layer.0.first",
    "layer.0.second",
    "layer.1.first",
    "layer.1.second",
    "head",
}


def swapped(model):
    return {name for name, module in model.named_modules() if isinstance(module, Linear)}


def tensors(model):
    """Every tensor that the model holds, each storage once."""
    every = [*model.parameters(), *model.buffers()]
    return {tensor.untyped_storage().data_ptr(): tensor for tensor in every}.values()


def count_of_bytes(model):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors(model))


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


class TestSnippets:
    """What the documentation shows, as written."""

    def test_config_of_a_type(self):
        model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 1))
        qconfig = {
            nn.Linear: {"activation": {"dtype": torch.qint8}, "weight": {"dtype": torch.qint8}}
        }
        quantized = dynquant.quantize_dynamic(model, qconfig, dtype=torch.qint8)
        out = quantized(torch.randn(1, 10))
        assert out.shape == (1, 1) and swapped(quantized) == {"0", "2"}

    def test_stubs(self):
        S, D = dynquant.QuantStub, dynquant.DeQuantStub
        q = {"dtype": torch.qint8}
        model = nn.Sequential(
            S(qconfig=q),
            nn.Linear(10, 20),
            S(qconfig=q),
            nn.ReLU(),
            S(qconfig=q),
            nn.Linear(20, 1),
            D(qconfig=q),
        )
        with pytest.warns(UserWarning, match="no quantized form, left as it is: ReLU") as caught:
            quantized = dynquant.quantize_dynamic(
                model, {nn.Linear: S, nn.ReLU: S}, dtype=torch.qint8
            )
        assert len(caught) == 1 and caught[0].filename == __file__
        assert quantized(torch.randn(1, 10)).shape == (1, 1)

    def test_observers(self):
        O = dynquant.Observer  # noqa: E741
        model = nn.Sequential(
            O(dtype=torch.qint8, quant_scheme=dynquant.per_tensor),
            nn.Linear(10, 20),
            O(),
            nn.ReLU(),
            O(),
            nn.Linear(20, 1),
        )
        assert model(torch.randn(1, 10)).shape == (1, 1)


class TestResult:
    def test_is_the_specification(self, net):
        x = torch.randn(5, 8)
        layer = dynquant.quantize_dynamic(net).head
        weight, scale = ref.quantize_weight(net.head.weight.detach().numpy())
        bias = net.head.bias.detach().numpy()
        assert_same(layer(x), ref.linear_dynamic(x.numpy(), weight, scale, bias))

    def test_is_close_to_float(self, net):
        x = torch.randn(64, 8)
        quantized, expected = dynquant.quantize_dynamic(net)(x), net(x)
        assert torch.cosine_similarity(quantized, expected).min() > 0.99

    def test_is_a_new_model_in_eval_mode(self, net):
        before = copy.deepcopy(net.state_dict())
        quantized = dynquant.quantize_dynamic(net)
        assert quantized is not net and not any(m.training for m in quantized.modules())
        assert all(module.training for module in net.modules()) and not swapped(net)
        for key, value in net.state_dict().items():
            assert_same(value, before[key])
        storages = {tensor.untyped_storage().data_ptr() for tensor in tensors(net)}
        assert not storages & {tensor.untyped_storage().data_ptr() for tensor in tensors(quantized)}

    def test_in_place(self, net):
        norm = net.norm
        assert dynquant.quantize_dynamic(net, inplace=True) is net
        assert swapped(net) == ALL and net.norm is norm and not norm.training

    @pytest.mark.parametrize("inplace", [False, True])
    def test_bare_linear(self, inplace):
        linear = nn.Linear(4, 2)
        assert isinstance(dynquant.quantize_dynamic(linear, inplace=inplace), Linear)
        assert isinstance(dynquant.quantize_dynamic(linear, {nn.Linear}), Linear)
        assert isinstance(dynquant.quantize_dynamic(linear, {"": {}}), Linear)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_quantizing_the_quantized_changes_nothing(self, net, inplace):
        quantized = dynquant.quantize_dynamic(net)
        again = dynquant.quantize_dynamic(quantized, inplace=inplace)
        assert (again is quantized) == inplace
        for spec in (None, {nn.Linear}, {"head"}, {Linear}, ["layer.*"], {"head": QConfig()}):
            again = dynquant.quantize_dynamic(again, spec, inplace=True)
        assert swapped(again) == ALL
        x = torch.randn(3, 8)
        assert_same(again(x), quantized(x))

    def test_made_in_inference_mode_serves_outside(self, net):
        with torch.inference_mode():
            quantized = dynquant.quantize_dynamic(net)
        quantized.load_state_dict(quantized.state_dict())
        x = torch.randn(2, 8, requires_grad=True)
        quantized(x).sum().backward()
        assert x.grad.shape == (2, 8)

    def test_one_copy_of_the_weights(self):
        model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)])
        ratio = count_of_bytes(dynquant.quantize_dynamic(model)) / count_of_bytes(model)
        assert 0.25 <= ratio < 0.26

    def test_float_weights_are_not_copied(self, monkeypatch):
        copied = []
        original = nn.Parameter.__deepcopy__

        def counting(parameter, memo):
            copied.append(parameter.numel())
            return original(parameter, memo)

        monkeypatch.setattr(nn.Parameter, "__deepcopy__", counting)
        dynquant.quantize_dynamic(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)))
        assert copied == [64, 64]

    def test_in_place_frees_float_weights(self):
        model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
        weights = [weakref.ref(layer.weight) for layer in model]
        dynquant.quantize_dynamic(model, inplace=True)
        gc.collect()
        assert all(weight() is None for weight in weights)


class TestSpec:
    @pytest.mark.parametrize(
        ("spec", "expected"),
        [
            (None, ALL),
            ({nn.Linear}, ALL),
            ([nn.Linear], ALL),
            ((nn.Linear,), ALL),
            (frozenset({nn.Linear}), ALL),
            ({nn.Module: {}}, ALL),
            ({Block}, ALL - {"head"}),
            ({Block: {}, nn.Linear: None}, set()),
            ({Block: None, Net: {}}, {"head"}),
            (set(), set()),
            ({}, set()),
            ({"head"}, {"head"}),
            ({""}, ALL),
            ({"layer.0"}, {"layer.0.first", "layer.0.second"}),
            ({"layer.0.first", "head"}, {"layer.0.first", "head"}),
            ({"*.first"}, {"layer.0.first", "layer.1.first"}),
            ({"layer.*"}, ALL - {"head"}),
            ({"*.1"}, {"layer.1.first", "layer.1.second"}),
            ({nn.Linear: {}, "head": None}, ALL - {"head"}),
            ({nn.Linear: {}, "layer": None}, {"head"}),
            (
                {nn.Linear: {}, "layer": None, "layer.1": {}},
                ALL - {"layer.0.first", "layer.0.second"},
            ),
            ({"layer": {}, "layer.*.second": None}, ALL - {"head"}),
            ({"*": {}, "*.second": None}, {"layer.0.first", "layer.1.first", "head"}),
            ({nn.Linear: None, "head": {}}, {"head"}),
            ({nn.Linear: QuantStub}, ALL),
            ({nn.Linear: dynquant.per_tensor}, ALL),
        ],
    )
    def test_selects(self, net, spec, expected):
        assert swapped(dynquant.quantize_dynamic(net, spec)) == expected

    def test_qconfig_is_another_name(self, net):
        assert swapped(dynquant.quantize_dynamic(net, qconfig={"head": {}})) == {"head"}
        with pytest.raises(TypeError, match="pass one of them"):
            dynquant.quantize_dynamic(net, {"head"}, qconfig={"head": {}})

    def test_configs_reach_the_module(self, net):
        spec = {
            nn.Linear: QConfig(symmetric=True),
            "layer.0.*": QConfig(weight="per_tensor"),
            "layer.0.second": QConfig(activation="per_tensor"),
        }
        quantized = dynquant.quantize_dynamic(net, spec)
        first, second = quantized.layer[0].first, quantized.layer[0].second
        assert quantized.head.symmetric and quantized.layer[1].first.symmetric
        assert first.weight_scale.shape == (1,) and first.per_token and not first.symmetric
        assert second.weight_scale.shape == (8,) and not second.per_token

    def test_order_of_specificity(self):
        class Base(nn.Module):
            pass

        class Derived(Base):
            pass

        model = nn.Sequential()
        model.a = nn.ModuleDict({"b": Derived()})
        modules = dict(model.named_modules())
        keys = ["a.b", "a", "a.*", "*b", Derived, Base, nn.ModuleDict, nn.Sequential]
        configs = {key: QConfig(symmetric=bool(i % 2)) for i, key in enumerate(keys)}
        while configs:
            match = Spec(dict(reversed(configs.items())), torch.qint8).match("a.b", modules)
            best = next(iter(configs))
            is_asked = bool({"a.b", "*b", Derived, Base} & configs.keys())
            assert match == (configs.pop(best), best == "a.b", is_asked)
        assert Spec({"c": {}, nn.Linear: {}}, torch.qint8).match("a.b", modules) is None

    @given(
        spec=st.dictionaries(
            st.sampled_from(["", "layer", "layer.0", "layer.0.first", "head", "*.first", "l*0*"]),
            st.none() | st.just({}),
        )
    )
    def test_longest_covering_name_wins(self, spec):
        chosen = swapped(dynquant.quantize_dynamic(Net(), spec))
        for name in ALL:
            covering = [
                key
                for key in spec
                if "*" not in key and (key in ("", name) or name.startswith(f"{key}."))
            ]
            if covering:
                assert (name in chosen) == (spec[max(covering, key=len)] is not None)

    def test_torch_qconfig(self, net):
        torch_qconfig = pytest.importorskip("torch.ao.quantization.qconfig")
        spec = {nn.Linear: torch_qconfig.default_dynamic_qconfig}
        layer = dynquant.quantize_dynamic(net, spec).head
        assert layer.weight_scale.shape == (1,) and not layer.per_token


class TestErrors:
    """Each is raised before anything is changed."""

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"qconfig_spec": {"haed"}}, ValueError, "no module named 'haed'; did you mean 'head'"),
            ({"qconfig_spec": {"head.weight": {}}}, ValueError, "no module named 'head.weight'"),
            ({"qconfig_spec": {"*.third"}}, ValueError, r"no module whose name fits '\*.third'"),
            ({"qconfig_spec": nn.Linear}, TypeError, "qconfig_spec is .*expected None, a set"),
            ({"qconfig_spec": "head"}, TypeError, "qconfig_spec is 'head'; expected"),
            ({"qconfig_spec": {3}}, TypeError, "qconfig_spec has the key 3; expected a type"),
            ({"qconfig_spec": {int}}, TypeError, "expected a type of nn.Module"),
            ({"qconfig_spec": {nn.Linear: True}}, TypeError, r"qconfig_spec\[Linear\] is True"),
            ({"qconfig": {"head": {"x": 1}}}, ValueError, r"qconfig\['head'\] has the key 'x'"),
            ({"qconfig_spec": {nn.Linear: {"dynamic": False}}}, ValueError, "'dynamic' is False"),
            ({"dtype": torch.int8}, ValueError, "dtype is torch.int8; allowed: torch.qint8"),
            ({"dtype": "qint8"}, ValueError, "dtype is 'qint8'"),
            ({"mapping": [nn.Linear]}, TypeError, "mapping is .*expected a dict"),
            ({"mapping": {"head": Linear}}, TypeError, "mapping has the key 'head'"),
            ({"mapping": {nn.Linear: nn.ReLU}}, TypeError, r"mapping\[Linear\].*with from_float"),
            ({"inplace": 1}, TypeError, "inplace is 1; expected a bool"),
            (
                {"qconfig_spec": {nn.LSTM}, "dtype": torch.quint8},
                ValueError,
                r"qconfig_spec\[LSTM\]: dtype is torch.quint8; allowed: torch.qint8, torch.float16",
            ),
            (
                {"qconfig_spec": {nn.Embedding}},
                ValueError,
                r"qconfig_spec\[Embedding\]: dtype is torch.qint8; allowed: torch.quint8",
            ),
            (
                {"qconfig_spec": {nn.Linear}, "dtype": torch.quint8},
                ValueError,
                r"\[Linear\]: dtype is torch.quint8; allowed: torch.qint8, torch.float16, torch.bf",
            ),
            (
                {"qconfig_spec": {"head"}, "dtype": torch.quint4x2},
                ValueError,
                r"head \(Linear\): dtype is torch.quint4x2; allowed: torch.qint8",
            ),
        ],
    )
    def test_arguments(self, net, arguments, error, message):
        with pytest.raises(error, match=message):
            dynquant.quantize_dynamic(net, **{"inplace": True, **arguments})
        assert not swapped(net) and net.training

    def test_model(self):
        with pytest.raises(TypeError, match="model is of type dict; expected an nn.Module"):
            dynquant.quantize_dynamic({})

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_weight_that_is_not_finite(self, net, bad, dtype):
        net.to(dtype)
        net.layer[1].second.weight.data[3, 4] = bad
        with pytest.raises(ValueError, match="^layer.1.second.weight holds NaN or Inf"):
            dynquant.quantize_dynamic(net, inplace=True)
        assert not swapped(net) and net.training
        assert swapped(dynquant.quantize_dynamic(net, {nn.Linear: {}, "layer.1.second": None}))

    def test_float64(self, net):
        net.head.double()
        with pytest.raises(ValueError, match="^head.weight is torch.float64; allowed"):
            dynquant.quantize_dynamic(net, inplace=True)
        assert not swapped(net)

    def test_too_many_columns(self, net):
        net.head = nn.Linear(65537, 1)
        with pytest.raises(ValueError, match="^head.weight has 65537 columns; at most 65536"):
            dynquant.quantize_dynamic(net, inplace=True)
        assert not swapped(net)
        net.head = nn.Linear(65536, 1)
        assert swapped(dynquant.quantize_dynamic(net)) == ALL

    def test_uninitialized(self, net):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net.head = nn.LazyLinear(3)
        with pytest.raises(ValueError, match="^head.weight is not initialized"):
            dynquant.quantize_dynamic(net)

    def test_bare_linear(self):
        linear = nn.Linear(2, 2)
        linear.weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="^weight holds NaN"):
            dynquant.quantize_dynamic(linear)


class Overriding(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Keeping(nn.Linear):
    extra = 1


class TestTypes:
    def test_subclass_that_keeps_forward(self):
        assert swapped(dynquant.quantize_dynamic(nn.Sequential(Keeping(4, 4)))) == {"0"}

    def test_exact_type_before_base_type(self):
        model = nn.Sequential(Keeping(4, 4), nn.Linear(4, 4))
        assert swapped(dynquant.quantize_dynamic(model, {Keeping: {}})) == {"0"}
        spec = {nn.Linear: {}, Keeping: None}
        assert swapped(dynquant.quantize_dynamic(model, spec)) == {"1"}

    def test_subclass_that_overrides_forward(self):
        model = nn.Sequential(nn.Linear(4, 4), Overriding(4, 4), nn.Linear(4, 4))
        model[2].forward = lambda x: x
        message = (
            r"left in float: 1 \(Overriding\) has a forward other than Linear's; "
            r"2 \(Linear\) has a forward other than Linear's"
        )
        with pytest.warns(UserWarning, match=message) as caught:
            quantized = dynquant.quantize_dynamic(model)
        assert swapped(quantized) == {"0"} and len(caught) == 1
        assert isinstance(quantized[1], Overriding)

    def test_parametrized(self):
        linear = parametrizations.weight_norm(nn.Linear(6, 4))
        linear.parametrizations.weight.original0.data.mul_(3)
        quantized = dynquant.quantize_dynamic(nn.Sequential(linear))
        plain = nn.Linear(6, 4)
        plain.load_state_dict({"weight": linear.weight, "bias": linear.bias})
        x = torch.randn(2, 6)
        assert_same(quantized(x), dynquant.quantize_dynamic(plain)(x))

    def test_weight_computed_by_a_hook(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            linear = nn.utils.weight_norm(nn.Linear(6, 4))
        model = nn.Sequential(linear, nn.Linear(4, 4))
        with pytest.warns(UserWarning, match=r"0 \(Linear\) has a weight that a hook computes"):
            quantized = dynquant.quantize_dynamic(model, inplace=True)
        x = torch.randn(2, 6)
        assert swapped(quantized) == {"1"}
        assert_same(quantized[0](x), linear(x))

    @pytest.mark.parametrize(
        "float_type", ["LinearReLU", "LinearLeakyReLU", "LinearTanh", "LinearBn1d"]
    )
    @pytest.mark.parametrize("named", [False, True])
    def test_fused_types(self, float_type, named):
        fused_types = pytest.importorskip("torch.ao.nn.intrinsic")
        fused_type = getattr(fused_types, float_type)
        after = {
            "LinearReLU": nn.ReLU(),
            "LinearLeakyReLU": nn.LeakyReLU(),
            "LinearTanh": nn.Tanh(),
            "LinearBn1d": nn.BatchNorm1d(4),
        }[float_type].eval()
        model = nn.Sequential(fused_type(nn.Linear(4, 4), after)).eval()
        quantized = dynquant.quantize_dynamic(model, {fused_type} if named else None)
        assert type(quantized[0]) is fused_type and swapped(quantized) == {"0.0"}
        x = torch.randn(3, 4)
        assert_same(quantized(x), after(dynquant.quantize_dynamic(model[0][0])(x)))

    def test_bilinear_is_left_alone(self):
        model = nn.ModuleList([nn.Bilinear(3, 4, 5), nn.Linear(3, 3)])
        quantized = dynquant.quantize_dynamic(model, {nn.Linear})
        assert type(quantized[0]) is nn.Bilinear and swapped(quantized) == {"1"}
        x, y = torch.randn(2, 3), torch.randn(2, 4)
        assert_same(quantized[0](x, y), model[0](x, y))

    def test_linear_whose_weight_others_read(self):
        reader = nn.Module()
        reader.proj = NonDynamicallyQuantizableLinear(4, 4)
        model = nn.Sequential(reader, nn.Linear(4, 4))
        assert swapped(dynquant.quantize_dynamic(model)) == {"1"}
        assert swapped(dynquant.quantize_dynamic(model, {nn.Linear})) == {"1"}
        assert swapped(dynquant.quantize_dynamic(model, {"0.proj"})) == {"0.proj"}
        spec = {NonDynamicallyQuantizableLinear}
        assert swapped(dynquant.quantize_dynamic(model, spec)) == {"0.proj"}
        spec = {nn.Linear: {}, NonDynamicallyQuantizableLinear: {}}
        assert swapped(dynquant.quantize_dynamic(model, spec)) == {"0.proj", "1"}

    def test_types_without_quantized_form(self, net):
        with pytest.warns(UserWarning, match="left as it is: Conv2d; ReLU|ReLU; Conv2d") as caught:
            quantized = dynquant.quantize_dynamic(net, {nn.Linear, nn.ReLU, nn.Conv2d})
        assert len(caught) == 1 and swapped(quantized) == ALL
        with pytest.warns(UserWarning, match=r"left as it is: norm \(LayerNorm\)$"):
            dynquant.quantize_dynamic(net, {"norm", "head"})

    def test_recurrent_types(self):
        model = nn.ModuleDict({"rnn": nn.LSTM(4, 4), "cell": nn.GRUCell(4, 4)})
        model["fc"] = nn.Linear(4, 4)
        result = dynquant.quantize_dynamic(model)
        assert type(result["rnn"]) is dynquant.nn.LSTM
        assert type(result["cell"]) is dynquant.nn.GRUCell
        spec = {nn.Linear: {}, nn.LSTM: None, "cell": None}
        assert swapped(dynquant.quantize_dynamic(model, spec)) == {"fc"}


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(11, 8, padding_idx=0)
        self.bag = nn.EmbeddingBag(7, 8, mode="max")
        self.fc = nn.Linear(8, 11, bias=False)
        self.rnn = nn.LSTM(8, 8)

    def forward(self, indices):
        return self.fc(self.words(indices) + self.bag(indices % 7)[:, None])


class TestOtherDtypes:
    """Embeddings in 8 and 4 bits, linear layers in 16."""

    def types(self, model):
        return {name: type(module) for name, module in model.named_children()}

    def test_embeddings(self):
        for dtype, bits in ((torch.quint8, 8), (torch.quint4x2, 4)):
            quantized = dynquant.quantize_dynamic(Words(), dtype=dtype)
            assert self.types(quantized) == {
                "words": dynquant.nn.Embedding,
                "bag": dynquant.nn.EmbeddingBag,
                "fc": nn.Linear,
                "rnn": nn.LSTM,
            }
            assert quantized.words.bits == quantized.bag.bits == bits
            assert quantized(torch.arange(12).view(3, 4) % 11).shape == (3, 4, 11)

    def test_after_one_another(self):
        model = dynquant.quantize_dynamic(Words(), dtype=torch.quint8)
        model = dynquant.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert type(model.words) is dynquant.nn.Embedding and type(model.fc) is Linear
        again = dynquant.quantize_dynamic(model, dtype=torch.quint8)
        assert self.types(again) == self.types(model)

    def test_in_one_call(self):
        spec = {
            nn.Linear: {},
            nn.Embedding: {"weight": {"dtype": torch.quint8}},
            nn.EmbeddingBag: QConfig(dtype=torch.quint4x2),
        }
        quantized = dynquant.quantize_dynamic(Words(), spec)
        assert type(quantized.fc) is Linear and quantized.words.bits == 8
        assert quantized.bag.bits == 4

    def test_torch_qconfigs(self):
        of_torch = pytest.importorskip("torch.ao.quantization.qconfig")
        spec = {
            nn.Embedding: of_torch.float_qparams_weight_only_qconfig,
            nn.EmbeddingBag: of_torch.float_qparams_weight_only_qconfig_4bit,
            nn.Linear: of_torch.float16_dynamic_qconfig,
        }
        quantized = dynquant.quantize_dynamic(Words(), spec)
        assert quantized.words.bits == 8 and quantized.bag.bits == 4
        assert quantized.fc.weight_16bit.dtype == torch.float16
        model = Words()
        model.words.qconfig = of_torch.float_qparams_weight_only_qconfig
        assert dynquant.convert(model).words.bits == 8
        model.words.qconfig = of_torch.default_dynamic_qconfig
        with pytest.raises(ValueError, match="words.qconfig: dtype is torch.qint8; allowed"):
            dynquant.convert(model)

    def test_what_a_name_covers(self):
        """Layers that have no form of the dtype stay as they are unless they are named."""
        model = nn.ModuleDict({"text": Words(), "fc": nn.Linear(2, 2)})
        quantized = dynquant.quantize_dynamic(model, {"text"}, dtype=torch.quint8)
        assert type(quantized["text"].words) is dynquant.nn.Embedding
        assert type(quantized["text"].fc) is nn.Linear
        with pytest.warns(UserWarning, match=r"left as it is: 0 \(Sequential\)"):
            dynquant.quantize_dynamic(
                nn.Sequential(nn.Sequential(nn.Linear(2, 2))), {"0"}, dtype=torch.quint8
            )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bits(self, dtype):
        model = Words()
        quantized = dynquant.quantize_dynamic(model, dtype=dtype)
        assert type(quantized.rnn) is dynquant.nn.LSTM16bit
        assert type(quantized.fc) is dynquant.nn.Linear16bit
        assert type(quantized.words) is nn.Embedding
        assert_same(quantized.fc._buffers["weight_16bit"], model.fc.weight.detach().to(dtype))

    @pytest.mark.parametrize("dtype", [torch.quint8, torch.float16])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_ties(self, dtype, inplace):
        """Neither side of a tie breaks the other."""
        model = nn.ModuleDict({"words": nn.Embedding(5, 4), "fc": nn.Linear(4, 5, bias=False)})
        model["fc"].weight = model["words"].weight
        weight = model["words"].weight.detach().clone()
        quantized = dynquant.quantize_dynamic(model, dtype=dtype, inplace=inplace)
        other = quantized["fc" if dtype == torch.quint8 else "words"]
        assert_same(other.weight.detach(), weight)
        assert quantized["fc"](quantized["words"](torch.tensor([1, 2]))).shape == (2, 5)

    def test_16_bit_weights_are_shared(self):
        quantized = dynquant.quantize_dynamic(Tied(), dtype=torch.float16)
        assert quantized.a._buffers["weight_16bit"] is quantized.b._buffers["weight_16bit"]
        spec = {"a": QConfig(dtype=torch.float16), "b": QConfig(dtype=torch.bfloat16), "c": {}}
        spec["c"] = spec["a"]
        quantized = dynquant.quantize_dynamic(Tied(), spec)
        assert [quantized.a.weight_16bit.dtype, quantized.b.weight_16bit.dtype] == [
            torch.float16,
            torch.bfloat16,
        ]


class Conv1x1(nn.Module):
    """A type of the user's own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


class QuantizedConv(nn.Module):
    @classmethod
    def from_float(cls, mod, qconfig):
        made = cls()
        made.qconfig = qconfig
        return made


class PlainConv(QuantizedConv):
    @classmethod
    def from_float(cls, mod):
        return cls()


class TestMapping:
    def test_type_of_the_users_own(self):
        model = nn.Sequential(Conv1x1(), nn.Linear(4, 4))
        quantized = dynquant.quantize_dynamic(model, mapping={Conv1x1: QuantizedConv})
        assert [type(module) for module in quantized] == [QuantizedConv, Linear]
        assert quantized[0].qconfig == QConfig()
        spec = {Conv1x1: QConfig(symmetric=True)}
        quantized = dynquant.quantize_dynamic(model, spec, mapping={Conv1x1: QuantizedConv})
        assert quantized[0].qconfig.symmetric and type(quantized[1]) is nn.Linear
        again = dynquant.quantize_dynamic(quantized, spec, mapping={Conv1x1: QuantizedConv})
        assert type(again[0]) is QuantizedConv

    def test_from_float_without_qconfig(self):
        model = nn.Sequential(Conv1x1(), nn.LSTM(4, 4))
        mapping = {Conv1x1: PlainConv, nn.LSTM: PlainConv}
        quantized = dynquant.quantize_dynamic(model, mapping=mapping)
        assert [type(module) for module in quantized] == [PlainConv, PlainConv]
        quantized = dynquant.quantize_dynamic(model, {nn.LSTM}, mapping=mapping)
        assert [type(module) for module in quantized] == [Conv1x1, PlainConv]

    def test_replaces_the_form_of_linear(self):
        quantized = dynquant.quantize_dynamic(nn.Linear(2, 2), mapping={nn.Linear: PlainConv})
        assert type(quantized) is PlainConv


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.a = nn.Linear(4, 5)
        self.b = nn.Linear(4, 5, bias=False)
        self.c = self.a
        self.b.weight = self.a.weight
        self.list = [self.a]

    def forward(self, x):
        return self.a(x) + self.b(x) + self.c(x)


@pytest.mark.parametrize("inplace", [False, True])
class TestTies:
    def test_one_module_under_two_names(self, inplace):
        quantized = dynquant.quantize_dynamic(Tied(), inplace=inplace)
        assert isinstance(quantized.a, Linear) and quantized.a is quantized.c
        if not inplace:
            assert quantized.list == [quantized.a]

    def test_one_weight_in_two_modules(self, inplace, monkeypatch):
        calls = []
        original = torch.ops.dynquant.quantize_weight
        monkeypatch.setattr(
            torch.ops.dynquant, "quantize_weight", lambda *a: calls.append(1) or original(*a)
        )
        quantized = dynquant.quantize_dynamic(Tied(), inplace=inplace)
        assert quantized.a.packed is quantized.b.packed and len(calls) == 1
        assert quantized.a.weight_scale is quantized.b.weight_scale
        assert quantized.a.bias is not None and quantized.b.bias is None

    def test_other_weight_schemes_do_not_share(self, inplace):
        spec = {nn.Linear: {}, "b": dynquant.per_tensor}
        quantized = dynquant.quantize_dynamic(Tied(), spec, inplace=inplace)
        assert quantized.a.weight_scale.shape == (5,) and quantized.b.weight_scale.shape == (1,)

    def test_embedding_keeps_its_weight(self, inplace):
        model = Tied()
        model.a.weight = model.b.weight = model.embedding.weight
        expected = model.embedding.weight.detach().clone()
        quantized = dynquant.quantize_dynamic(model, inplace=inplace)
        assert isinstance(quantized.a, Linear)
        assert_same(quantized.embedding.weight, expected)

    def test_contradiction(self, inplace):
        with pytest.raises(ValueError, match="'a' and 'c' are one module, asked for differently"):
            dynquant.quantize_dynamic(Tied(), {nn.Linear: {}, "c": None}, inplace=inplace)


class Counter:
    def __init__(self):
        self.count = 0

    def __call__(self, *args):
        self.count += 1

    def double(self, module, args, output):
        self.count += 1
        return output * 2


@pytest.mark.parametrize("inplace", [False, True])
class TestHooks:
    def test_are_kept(self, inplace, net):
        pre, after, always = Counter(), Counter(), Counter()
        net.head.register_forward_pre_hook(lambda module, args: pre())
        net.head.register_forward_hook(lambda module, args, kwargs, out: after(), with_kwargs=True)
        net.head.register_forward_hook(lambda *a: always(), always_call=True)
        handle = net.head.register_forward_hook(lambda module, args, output: output * 0)
        quantized = dynquant.quantize_dynamic(net, inplace=inplace)
        assert (quantized(torch.randn(2, 8)) == 0).all()
        assert (pre.count, after.count, always.count) == (1, 1, 1)
        handle.remove()
        assert (quantized(torch.randn(2, 8)) == 0).all() != inplace

    def test_with_state(self, inplace, net):
        counter = Counter()
        net.head.register_forward_hook(counter.double)
        x = torch.randn(2, 8)
        quantized = dynquant.quantize_dynamic(net, inplace=inplace)
        quantized(x)
        assert counter.count == inplace  # a copied model has copied hooks

    def test_gradient_hooks(self, inplace, net):
        seen = []
        net.head.register_full_backward_hook(lambda module, inputs, outputs: seen.append(inputs))
        x = torch.randn(2, 8, requires_grad=True)
        dynquant.quantize_dynamic(net, inplace=inplace)(x).sum().backward()
        assert len(seen) == 1 and x.grad.shape == (2, 8)


class TestQuestionsOfHuggingFace:
    """How transformers asks a model for its device and dtype."""

    @staticmethod
    def dtype(model):
        return next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_device_and_dtype(self, bias, dtype):
        layers = [nn.Linear(4, 4, bias=bias) for _ in range(2)]
        model = dynquant.quantize_dynamic(nn.Sequential(*layers).to(dtype))
        for quantized in (model, copy.deepcopy(model)):
            assert next(quantized.parameters()).dtype == self.dtype(quantized) == dtype
            assert next(quantized.parameters()).device == torch.device("cpu")
            assert not any(p.requires_grad for p in quantized.parameters())
        assert self.dtype(model.half()) == torch.float16
        assert next(model.to("meta").parameters()).device.type == "meta"

    def test_placeholder_is_empty_and_not_saved(self):
        layer = dynquant.quantize_dynamic(nn.Linear(4, 4, bias=False))
        assert sum(p.numel() for p in layer.parameters()) == 0
        assert set(layer.state_dict()) == {"weight_int8", "weight_scale", "version"}


class TestProgress:
    @pytest.mark.parametrize("slow", [False, True])
    def test_bar_after_a_second(self, slow, capsys):
        pytest.importorskip("tqdm")

        class Slow(nn.Module):
            @classmethod
            def from_float(cls, mod):
                time.sleep(0.6 * slow)
                return cls()

        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
        dynquant.quantize_dynamic(model, mapping={nn.Linear: Slow})
        assert ("quantizing" in capsys.readouterr().err) == slow

    def test_without_tqdm(self, net, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        assert swapped(dynquant.quantize_dynamic(net)) == ALL


def test_meta_model_takes_a_state_dict(net):
    expected = dynquant.quantize_dynamic(net)
    with torch.device("meta"):
        empty = dynquant.quantize_dynamic(Net())
    empty.load_state_dict(expected.state_dict(), assign=True)
    x = torch.randn(2, 8)
    assert_same(empty(x), expected(x))
    assert not any(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])


def test_saved_and_loaded_into_a_new_model(net):
    quantized = dynquant.quantize_dynamic(net)
    other = dynquant.quantize_dynamic(Net())
    other.load_state_dict(torch_saved(quantized.state_dict()))
    x = torch.randn(2, 8)
    assert_same(other(x), quantized(x))


class TestWhatStaysInFloat:
    """Much of a model in types without a quantized form is told, in percent."""

    def test_convolutions(self):
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
        total = 8 * 8 * 9 + 8 + 8 * 8 + 8
        share = f"{8 * 8 * 9 / total:.1%}"
        with pytest.warns(UserWarning, match=rf"^{share} \(Conv2d {share}\) of the parameters"):
            dynquant.quantize_dynamic(model)

    def test_experts(self):
        class Experts(nn.Module):
            def __init__(self):
                super().__init__()
                self.up = nn.Parameter(torch.randn(4, 8, 8))

        model = nn.Sequential(Experts(), nn.Linear(8, 8, bias=False))
        with pytest.warns(UserWarning, match=r"^80.0% \(Experts 80.0%\) of the parameters stay"):
            dynquant.quantize_dynamic(model)

    def test_scripted(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            model = nn.Sequential(torch.jit.script(nn.Linear(8, 8)), nn.Linear(8, 8))
        with (
            pytest.warns(UserWarning, match=r"\(ScriptModule 44.4%\) of the parameters stay"),
            pytest.warns(UserWarning, match="nothing within a ScriptModule can be swapped"),
        ):
            dynquant.quantize_dynamic(model)

    def test_embeddings_and_small_parts_are_no_news(self):
        model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64), nn.Conv1d(2, 2, 3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            dynquant.quantize_dynamic(model)


class Listing(nn.Module):
    """Calls its layers in a plain list, as MaskFormer's heads do, a tuple and a dict."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(8, 8), nn.ReLU()]
        for place, layer in enumerate(self.layers):
            self.add_module(str(place), layer)
        self.last = nn.Linear(8, 8)
        self.held = {"pair": (self.last, 3)}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.held["pair"][0](x)


@pytest.mark.parametrize("inplace", [False, True])
def test_modules_in_plain_containers(inplace):
    model, x = Listing(), torch.randn(2, 8)
    layers = model.layers
    expected = nn.Sequential(*map(dynquant.quantize_dynamic, (model.layers[0], layers[1])))(x)
    expected = dynquant.quantize_dynamic(model.last)(expected)
    quantized = dynquant.quantize_dynamic(model, inplace=inplace)
    assert_same(quantized(x), expected)
    assert quantized.layers[0] is getattr(quantized, "0")
    assert quantized.held["pair"] == (quantized.last, 3)
    assert (layers[0] is getattr(model, "0")) and type(model.last) is (
        dynquant.nn.Linear if inplace else nn.Linear
    )
