"""Each product of a recurrent layer or an attention has a config of its own."""

import copy
import io
import warnings

import numpy as np
import pytest
import recurrent
import reference_rnn
import torch
from compare import assert_all_same, assert_same, assert_same_state
from torch import nn

import dynquant
from dynquant import QConfig

SIXTEEN = QConfig(activation_bits=16)


class Encoder(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.rnn = layer

    def forward(self, x):
        return self.rnn(x)[0]


def model_of(layer, seed=0):
    torch.manual_seed(seed)
    return Encoder(layer).eval()


LAYERS = {
    "lstm": lambda: nn.LSTM(6, 8, 2, bidirectional=True),
    "projected": lambda: nn.LSTM(6, 8, proj_size=3),
    "gru": lambda: nn.GRU(6, 8),
    "rnn": lambda: nn.RNN(6, 8, nonlinearity="relu"),
}
CONFIGS = {
    "float": None,
    "float16": QConfig(dtype=torch.float16),
    "bfloat16": torch.bfloat16,
    "16 bits": SIXTEEN,
    "dict": {"activation": {"bits": 16}},
    "symmetric": QConfig(symmetric=True, weight="per_tensor"),
}


def weights_of(layer):
    return [name for name, _ in layer.named_parameters() if name.startswith("weight")]


def quantized(model, products, rest=None):
    spec = {nn.RNNBase: rest or QConfig()} if rest is not False else {}
    spec |= {f"rnn.{name}": config for name, config in products.items()}
    return dynquant.quantize_dynamic(model, spec)


def as_config(config):
    return QConfig(dtype=config) if isinstance(config, torch.dtype) else config


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_product_alone_is_the_reference(kind, config):
    model = model_of(LAYERS[kind]())
    layer, x = model.rnn, torch.randn(5, 3, 6)
    wanted = as_config(CONFIGS[config])
    for name in weights_of(layer):
        result = quantized(model, {name: wanted})(x)
        parsed = wanted if wanted is None else dynquant.qconfig.parse_qconfig(wanted)
        assert_same(result, expected(layer, x, {name: parsed}))


def expected(layer, x, products):
    """What the reference gives: int8 but for `products`, by name."""
    cell = {"LSTM": "lstm", "GRU": "gru", "RNN": f"rnn_{getattr(layer, 'nonlinearity', '')}"}
    size = layer.proj_size or layer.hidden_size
    x = x.numpy()
    ends = ["", "_reverse"] if layer.bidirectional else [""]
    for depth in range(layer.num_layers):
        outputs = []
        for end in ends:
            weights, schemes = {}, {}
            for part in ("ih", "hh", "hr"):
                name = f"weight_{part}_l{depth}{end}"
                weight = getattr(layer, name, None)
                if weight is None:
                    continue
                config = products.get(name, QConfig())
                weights[f"weight_{part}"] = held(weight.detach(), config)
                if config is not None:
                    token = config.activation == "per_token"
                    schemes[part] = (token, config.symmetric, config.activation_bits)
            suffix = f"_l{depth}{end}"
            y, *_ = reference_rnn.recurrent(
                cell[type(layer).__name__],
                x,
                np.zeros((x.shape[1], size), np.float32),
                np.zeros((x.shape[1], layer.hidden_size), np.float32)
                if isinstance(layer, nn.LSTM)
                else None,
                bias_ih=getattr(layer, f"bias_ih{suffix}").detach().numpy(),
                bias_hh=getattr(layer, f"bias_hh{suffix}").detach().numpy(),
                **weights,
                reverse=bool(end),
                schemes=schemes,
            )
            outputs.append(y)
        x = np.concatenate(outputs, -1)
    return x


def held(weight, config):
    if config is None:
        return weight.numpy()
    if config.dtype != torch.qint8:
        return weight.to(config.dtype).float().numpy()
    per_channel = config.weight == "per_channel"
    q, scale = torch.ops.dynquant.quantize_weight(weight, per_channel)
    return q.numpy(), scale.numpy()


MIXED = {
    "weight_ih_l0": None,
    "weight_hh_l0": SIXTEEN,
    "weight_ih_l1": QConfig(dtype=torch.bfloat16),
}


def mixed():
    model = model_of(nn.LSTM(6, 8, 2))
    return model, quantized(model, MIXED)


def test_all_kinds_in_one_layer():
    model, result = mixed()
    x = torch.randn(5, 3, 6)
    assert_same(result(x), expected(model.rnn, x, MIXED))


def test_repr_names_each():
    text = repr(mixed()[1])
    assert "weight_ih_l0=(float)" in text
    assert "weight_hh_l0=(weight=per_channel" in text and "activation_bits=16)" in text
    assert "weight_ih_l1=(dtype=torch.bfloat16)" in text


def test_state_dicts_copies_and_pickles():
    model, result = mixed()
    state = result.state_dict()
    assert state["rnn.weight_ih_l0"].dtype == torch.float32
    assert state["rnn.weight_ih_l1"].dtype == torch.bfloat16
    assert state["rnn.weight_hh_l1_int8"].dtype == torch.int8
    _, other = model_of(nn.LSTM(6, 8, 2), 1), quantized(model_of(nn.LSTM(6, 8, 2), 1), MIXED)
    other.load_state_dict(state)
    assert_same_state(other, result)
    x = torch.randn(5, 3, 6)
    assert_same(other(x), result(x))
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for copied in (copy.deepcopy(result), torch.load(file, weights_only=False)):
        assert_same(copied(x), result(x))
    other = quantized(model_of(nn.LSTM(6, 8, 2), 2), MIXED)
    other.load_state_dict(model.state_dict())  # a float checkpoint
    assert_same(other(x), result(x))


def test_a_checkpoint_of_another_form_is_refused():
    model, result = mixed()
    plain = quantized(model, {})
    with pytest.raises(RuntimeError, match="weight_ih_l0"):
        result.load_state_dict(plain.state_dict())


def test_gradients_and_compile():
    _, result = mixed()
    x = torch.randn(5, 3, 6, requires_grad=True)
    result(x).sum().backward()
    assert x.grad.abs().sum() > 0
    compiled = torch.compile(result, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(x), result(x))


def test_one_product_where_nothing_else_is_asked_for():
    model = model_of(nn.GRU(6, 8))
    x = torch.randn(5, 3, 6)
    result = dynquant.quantize_dynamic(model, {"rnn.weight_hh_l0": QConfig()})
    assert_same(result(x), expected(model.rnn, x, {"weight_ih_l0": None}))
    result = dynquant.quantize_dynamic(model, {nn.GRU: QConfig(), "rnn.weight_ih_l0": None})
    assert_same(result(x), expected(model.rnn, x, {"weight_ih_l0": None}))
    nothing = {"rnn.weight_ih_l0": None, "rnn.weight_hh_l0": None}
    assert type(dynquant.quantize_dynamic(model, nothing).rnn) is nn.GRU


def test_patterns_reach_products():
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.LSTM(6, 8), "two": nn.GRU(6, 8), "cell": nn.LSTMCell(6, 8)})
    model = model.eval()

    def bits(spec):
        made = dynquant.quantize_dynamic(model, spec)
        return {
            f"{name}.{product}": getattr(layer.config_of(product), "activation_bits", None)
            for name, layer in made.items()
            if hasattr(layer, "config_of")
            for product in layer.products_of(layer)
        }

    rest = {kind: QConfig() for kind in (nn.LSTM, nn.GRU, nn.LSTMCell)}
    inner = {"one.weight_ih_l0", "two.weight_ih_l0", "cell.weight_ih"}
    every = inner | {name.replace("ih", "hh") for name in inner}
    for spec, of_pattern in (
        ({"*.weight_ih*": SIXTEEN}, inner),
        ({"*": QConfig(), "*.weight_ih*": SIXTEEN}, inner),  # that with most letters
        ({"one": QConfig(), "*.weight_ih*": SIXTEEN}, inner - {"one.weight_ih_l0"}),  # a name wins
        ({"one.weight_ih_l0": QConfig(), "*.weight_ih_*": SIXTEEN}, {"two.weight_ih_l0"}),
        ({"*n*": SIXTEEN, "*.weight_ih*": QConfig()}, {"one.weight_hh_l0"}),
    ):
        given = bits(rest | spec)
        assert given.keys() == every
        assert {name for name, value in given.items() if value == 16} == of_pattern, spec
    given = bits(rest | {"*.weight_hh*": None})
    assert {name for name, value in given.items() if value is None} == every - inner
    assert bits({"o*.weight_hh_l0"}).keys() == {"one.weight_ih_l0", "one.weight_hh_l0"}
    with pytest.raises(ValueError, match=r"no module whose name fits '\*.weight_ih_l7'"):
        bits({"*.weight_ih_l7"})
    alone = dynquant.quantize_dynamic(model["one"], {"": QConfig(), "weight_ih_l0": SIXTEEN})
    assert alone.config_of("weight_ih_l0").activation_bits == 16


def test_cells():
    torch.manual_seed(0)
    model = nn.ModuleDict({"cell": nn.LSTMCell(6, 8)})
    result = dynquant.quantize_dynamic(model, {"cell": QConfig(), "cell.weight_ih": None}).cell
    assert "weight_ih=(float)" in repr(result)
    x, whole = torch.randn(3, 6), recurrent.quantized(model.cell)
    assert not torch.equal(result(x)[0], whole(x)[0])
    torch.testing.assert_close(result(x), model.cell(x), atol=0.05, rtol=0.05)
    with pytest.raises(RuntimeError, match="several formats"):
        torch.jit.script(result)


def test_wrong_names():
    model = model_of(nn.LSTM(6, 8))
    with pytest.raises(ValueError, match="no module named 'rnn.weight_ih_l7'"):
        dynquant.quantize_dynamic(model, {"rnn.weight_ih_l7": None})
    with pytest.raises(ValueError, match="a product is 'weight'; allowed: weight_ih_l0"):
        dynquant.nn.LSTM.from_float(model.rnn, products={"weight": None})
    with pytest.raises(ValueError, match="a product is 'x'; allowed: q_proj"):
        dynquant.nn.MultiheadAttention.from_float(nn.MultiheadAttention(8, 2), products={"x": None})
    with pytest.raises(ValueError, match="weight_ih_l0.*dtype"):
        dynquant.quantize_dynamic(model, {"rnn.weight_ih_l0": QConfig(dtype=torch.quint8)})


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        return self.attn(x, x, x)[0]


def test_projections_of_an_attention():
    torch.manual_seed(0)
    model = Attention().eval()
    x = torch.randn(2, 5, 16)
    spec = {nn.MultiheadAttention: QConfig(), "attn.k_proj": None, "attn.v_proj": SIXTEEN}
    result = dynquant.quantize_dynamic(
        model, spec | {"attn.out_proj": QConfig(dtype=torch.float16)}
    )
    kinds = [type(getattr(result.attn, f"{one}_proj")) for one in ("q", "k", "v", "out")]
    assert kinds == [dynquant.nn.Linear, nn.Linear, dynquant.nn.Linear, dynquant.nn.Linear16bit]
    assert result.attn.v_proj.activation_bits == 16
    torch.testing.assert_close(result(x), model(x), atol=0.05, rtol=0.05)


def test_patterns_reach_projections():
    model = nn.ModuleList([Attention(), Attention()])
    spec = {nn.MultiheadAttention: QConfig(), "*.k_proj": None, "1.*.out_proj": SIXTEEN}
    first, second = (one.attn for one in dynquant.quantize_dynamic(model, spec))
    assert type(first.k_proj) is type(second.k_proj) is nn.Linear
    assert first.out_proj.activation_bits == 8 and second.out_proj.activation_bits == 16


def outlier_model():
    """The weights of the first product are small where its inputs are large."""
    model = model_of(nn.LSTM(16, 32, 2))
    with torch.no_grad():
        model.rnn.weight_ih_l0[:, 3] /= 3000
    x = torch.randn(20, 4, 16)
    x[..., 3] *= 3000
    return model, x


def warned(model, x, **limits):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = dynquant.quantize_dynamic(model, example_inputs=x, **limits)
    return result, [str(one.message) for one in caught]


def test_keep_float_below_takes_the_product_alone():
    model, x = outlier_model()
    result, messages = warned(model, x, keep_float_below=25)
    assert len(messages) == 1 and messages[0].startswith(
        "left in float, below 25 dB: rnn.weight_ih_l0"
    )
    assert_same(result(x), expected(model.rnn, x, {"weight_ih_l0": None}))
    row = dynquant.compare(model, result, x).rows[0]
    assert row["bits"] == "mixed" and row["snr_db"] > 25
    bits = {one["name"]: one["bits"] for one in row["products"]}
    assert bits == {
        **{f"rnn.weight_{part}_l{layer}": "8" for part in ("ih", "hh") for layer in (0, 1)},
        "rnn.weight_ih_l0": "float",
    }


def test_raise_bits_below():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(50, 32)
    x[:, 5] *= 2000
    with torch.no_grad():
        model[0].weight[:, 5] /= 2000
    result, messages = warned(model, x, raise_bits_below=30)
    assert len(messages) == 1
    assert messages[0].startswith("activations in 16 bits, below 30 dB in 8: 0 (Linear)")
    assert [result[i].activation_bits for i in (0, 2)] == [16, 8]
    text = str(dynquant.compare(model, result, x))
    assert [line.split()[2] for line in text.splitlines()[1:3]] == ["16", "8"]


def test_raised_before_it_is_kept():
    model, x = outlier_model()
    result, messages = warned(model, x, raise_bits_below=25, keep_float_below=25)
    assert messages[0].startswith("activations in 16 bits, below 25 dB in 8: rnn.weight_ih_l0")
    assert "weight_ih_l0" in repr(result)


def test_prepare_has_no_products():
    with pytest.raises(ValueError, match="prepare takes no config for a product"):
        dynquant.prepare(model_of(nn.LSTM(6, 8)), {"rnn.weight_ih_l0": None, nn.LSTM: QConfig()})


def test_packed_sequences_and_states():
    model, result = mixed()
    x = nn.utils.rnn.pack_sequence([torch.randn(n, 6) for n in (5, 3, 1)])
    states = torch.randn(2, 2, 3, 8)
    y, after = result.rnn(x, tuple(states))
    wanted, _ = model.rnn(x, tuple(states))
    torch.testing.assert_close(y.data, wanted.data, atol=0.1, rtol=0.1)
    assert_all_same(after, result.rnn(x, tuple(states))[1])


def test_sharded_rows_have_8_bits():
    parallel = pytest.importorskip("dynquant.parallel", reason="no torch.distributed")
    layer = dynquant.nn.Linear.from_float(nn.Linear(8, 4), SIXTEEN)
    with pytest.raises(ValueError, match="RowwiseParallel is there for activations in 8 bits"):
        parallel.RowwiseParallel()._apply(layer, None)
