"""Loading what others saved: float checkpoints, and those of torch.ao's dynamic quantization."""

import copy
import io
import pickle
import warnings

import pytest
import reference as ref
import torch
from compare import assert_same
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn._torch_ao import plain_cell, plain_linear, plain_weight

SCHEMES = [QConfig(), QConfig("per_tensor")]


def net(bias=True, dtype=torch.float32):
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def assert_same_models(one, other):
    assert_same_states(one, other)
    x = torch.randn(4, 6)
    assert_same(one(x), other(x))


def assert_same_states(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for key, value in other.state_dict().items():
        assert_same(one.state_dict()[key], value, key)


# What may be wrong with the state dict of a float net, as a change of it and the message.
WRONG_STATES = (
    (lambda s: s.pop("0.bias"), 'Missing key.*"0.bias"'),
    (lambda s: s.update({"0.extra": torch.zeros(1)}), 'Unexpected key.*"0.extra"'),
    (lambda s: s["0.weight"].fill_(torch.nan), "0.weight holds NaN or Inf"),
    (
        lambda s: s.update({"0.weight": torch.zeros(6, 5)}),
        r"0.weight: expected the shape \[5, 6\], found \[6, 5\]",
    ),
    (
        lambda s: s.update({"0.weight": torch.zeros(5, 6, dtype=torch.float64)}),
        "0.weight: expected torch.float32 or .* found torch.float64",
    ),
)


class TestFloat:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("config", SCHEMES)
    def test_is_quantized_on_the_way(self, config, bias, assign):
        spec = {nn.Linear: config}
        trained = net(bias)
        model = dynquant.quantize_dynamic(net(bias), spec)
        keys = model.load_state_dict(trained.state_dict(), assign=assign)
        assert not keys.missing_keys and not keys.unexpected_keys
        assert_same_models(model, dynquant.quantize_dynamic(trained, spec))
        assert not any(p.requires_grad for p in model[0].parameters())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_in_16_bits(self, dtype):
        trained = net(dtype=dtype)
        model = dynquant.quantize_dynamic(net())
        model.load_state_dict(trained.state_dict())
        expected = dynquant.quantize_dynamic(trained)
        assert_same(model[0].weight.int_repr(), expected[0].weight.int_repr())
        assert_same(model[0].weight_scale, expected[0].weight_scale)

    def test_into_a_meta_model(self):
        trained = net()
        with torch.device("meta"):
            model = dynquant.quantize_dynamic(net())
        model.load_state_dict(trained.state_dict(), assign=True)
        assert_same_models(model, dynquant.quantize_dynamic(trained))

    def test_from_a_file(self, tmp_path):
        trained = net()
        torch.save(trained.state_dict(), tmp_path / "float.pt")
        model = dynquant.quantize_dynamic(net())
        model.load_state_dict(torch.load(tmp_path / "float.pt", weights_only=True))
        assert_same_models(model, dynquant.quantize_dynamic(trained))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *WRONG_STATES,
            (
                lambda s: s.update({"0.weight_scale": torch.ones(5)}),
                "0.weight is torch.float32, but 0.weight_scale is there as well",
            ),
        ],
    )
    def test_errors_name_the_key_and_change_nothing(self, change, message):
        model, state = dynquant.quantize_dynamic(net()), net().state_dict()
        before = model[0].weight + 0
        change(state)
        strict = model.load_state_dict
        with pytest.raises(RuntimeError, match=message):
            strict(state)
        if "key" not in message:
            assert_same(model[0].weight + 0, before)


HALVES = (torch.float16, torch.bfloat16)


def every_float_module():
    """A new one of each type that has a form with 16-bit weights, with random parameters."""
    return {
        "Linear": nn.Linear(6, 5),
        "Linear without bias": nn.Linear(6, 5, bias=False),
        "LSTM": nn.LSTM(6, 5, 2, bidirectional=True),
        "LSTM with projections": nn.LSTM(6, 5, proj_size=3),
        "GRU": nn.GRU(6, 5, bias=False),
        "RNN": nn.RNN(6, 5),
        "LSTMCell": nn.LSTMCell(6, 5),
        "GRUCell": nn.GRUCell(6, 5),
        "RNNCell": nn.RNNCell(6, 5),
        "MultiheadAttention": nn.MultiheadAttention(6, 2),
        "MultiheadAttention of other widths": nn.MultiheadAttention(6, 2, kdim=5, vdim=4),
    }


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
class TestFloatInto16Bits:
    @pytest.fixture(params=every_float_module())
    def kind(self, request):
        return request.param

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("half", HALVES, ids=str)
    def test_is_rounded_on_the_way(self, kind, half, assign):
        trained = every_float_module()[kind]
        model = dynquant.quantize_dynamic(nn.Sequential(every_float_module()[kind]), dtype=half)
        keys = model.load_state_dict(nn.Sequential(trained).state_dict(), assign=assign)
        assert not keys.missing_keys and not keys.unexpected_keys
        assert_same_states(model[0], dynquant.quantize_dynamic(trained, dtype=half))
        assert not any(p.requires_grad for p in model.parameters())
        held = {value.data_ptr() for value in model[0].buffers()}
        assert not held & {value.data_ptr() for value in trained.parameters()}

    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_of_a_model_in_16_bits(self, kind, dtype):
        """Weights become what they are here; the other 16-bit dtype is rounded."""
        trained = every_float_module()[kind].to(dtype)
        model = dynquant.quantize_dynamic(every_float_module()[kind], dtype=torch.float16)
        model.load_state_dict(trained.state_dict())
        expected = dynquant.quantize_dynamic(trained, dtype=torch.float16)
        for one, other in zip(model.buffers(), expected.buffers(), strict=True):
            assert_same(one, other)

    def test_into_a_meta_model(self, kind):
        trained = every_float_module()[kind]
        model = dynquant.quantize_dynamic(every_float_module()[kind], dtype=torch.float16)
        model = model.to("meta")
        model.load_state_dict(trained.state_dict(), assign=True)
        assert_same_states(model, dynquant.quantize_dynamic(trained, dtype=torch.float16))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            *WRONG_STATES,
            (
                lambda s: s.update({"0.version": torch.tensor(1)}),
                "0.weight: expected torch.float16 or torch.bfloat16, found torch.float32",
            ),
        ],
    )
    def test_errors_name_the_key_and_change_nothing(self, change, message):
        model = dynquant.quantize_dynamic(net(), dtype=torch.float16)
        state, before = net().state_dict(), model[0].weight + 0
        change(state)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)
        if "key" not in message:
            assert_same(model[0].weight + 0, before)

    def test_errors_name_the_weights_of_recurrent_layers(self):
        model = dynquant.quantize_dynamic(nn.Sequential(nn.LSTM(6, 5)), dtype=torch.float16)
        state = nn.Sequential(nn.LSTM(6, 5)).state_dict()
        state["0.weight_hh_l0"][1, 2] = torch.inf
        before = model[0].weight_ih_l0 + 0
        with pytest.raises(RuntimeError, match="0.weight_hh_l0 holds NaN or Inf"):
            model.load_state_dict(state)
        assert_same(model[0].weight_ih_l0, before)

    def test_weights_beyond_float16(self):
        model = dynquant.quantize_dynamic(net(), dtype=torch.float16)
        state = net().state_dict()
        state["0.weight"][0, 0] = -1e6
        with pytest.warns(UserWarning, match=r"^0.weight reaches 1e\+06; torch.float16 ends at"):
            model.load_state_dict(state)
        assert model[0].weight[0, 0] == -65504


class TestFloatEmbeddings:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2], ids=str)
    @pytest.mark.parametrize("options", [{}, {"max_norm": 0.5}], ids=str)
    @pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
    def test_is_quantized_on_the_way(self, kind, options, dtype, assign):
        trained = kind(7, 5, **options)
        model = dynquant.quantize_dynamic(nn.Sequential(kind(7, 5, **options)), dtype=dtype)
        model.load_state_dict(nn.Sequential(trained).state_dict(), assign=assign)
        assert_same_states(model[0], dynquant.quantize_dynamic(trained, dtype=dtype))

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (torch.zeros(5, 7), r"0.weight: expected the shape \[7, 5\], found \[5, 7\]"),
            (torch.full((7, 5), torch.nan), "0.weight holds NaN or Inf"),
            (torch.tensor([[-3e38, 3e38, 0, 0, 0]] * 7), "0.weight: row 0 spans more than fp32"),
        ],
    )
    def test_errors(self, weight, message):
        model = dynquant.quantize_dynamic(nn.Sequential(nn.Embedding(7, 5)), dtype=torch.quint8)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({"0.weight": weight})


torch_ao = pytest.importorskip("torch.ao.quantization", reason="this torch has no torch.ao")


def of_torch(model, spec, dtype=torch.qint8):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch_ao.quantize_dynamic(model.eval(), spec, dtype=dtype)


def torch_specs():
    return {
        "per_tensor": {nn.Linear},
        "per_channel": {nn.Linear: torch_ao.per_channel_dynamic_qconfig},
    }


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.filterwarnings("ignore:TypedStorage")
class TestTorchAo:
    @pytest.mark.parametrize("scheme", ["per_tensor", "per_channel"])
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("config", SCHEMES)
    def test_linear(self, scheme, bias, assign, config):
        torch.manual_seed(0)
        saved = of_torch(net(bias), torch_specs()[scheme])
        model = dynquant.quantize_dynamic(net(bias), {nn.Linear: config})
        keys = model.load_state_dict(saved.state_dict(), assign=assign)
        assert not keys.missing_keys and not keys.unexpected_keys
        for place in (0, 2):
            weight = saved[place].weight()
            values, loaded = weight.int_repr(), model[place]
            assert_same(loaded.weight.int_repr(), values)
            assert_same(loaded.weight_scale, torch_scale(weight))
            error = (loaded.weight - weight.dequantize()).abs()
            # Halfway is a tie, up to rounding.
            assert (error <= loaded.weight_scale[:, None] * 0.5001).all()
            if saved[place].bias() is not None:
                assert_same(loaded.bias, saved[place].bias().detach())
        x = torch.randn(64, 6)
        assert torch.cosine_similarity(model(x), saved(x)).mean() > 0.99
        model.load_state_dict(model.state_dict())

    def test_minus_128_is_kept(self):
        values = torch.tensor([[-128, 5], [3, 127]], dtype=torch.int8)
        weight = torch._make_per_tensor_quantized_tensor(values, 0.5, 0)
        state = {"_packed_params._packed_params": (weight, None)}
        layer = dynquant.quantize_dynamic(nn.Linear(2, 2, bias=False))
        layer.load_state_dict(state)
        assert_same(layer.weight.int_repr(), values)
        assert (layer.weight_scale == 0.5).all()

    def test_offsets_are_requantized(self):
        values = torch.tensor([[-128, 5], [3, 127]], dtype=torch.int8)
        weight = torch._make_per_tensor_quantized_tensor(values, 0.5, 7)
        layer = dynquant.quantize_dynamic(nn.Linear(2, 2, bias=False))
        layer.load_state_dict({"_packed_params._packed_params": (weight, None)})
        expected, scale = ref.quantize_weight(weight.dequantize().numpy())
        assert_same(layer.weight.int_repr(), expected)
        assert_same(layer.weight_scale, scale)

    def test_float16(self):
        trained = net()
        saved = of_torch(trained, {nn.Linear}, torch.float16)
        model = dynquant.quantize_dynamic(net())
        model.load_state_dict(saved.state_dict())
        rounded = net()
        rounded.load_state_dict(trained.state_dict())
        for place in (0, 2):
            rounded[place].weight.data = saved[place].weight()
        assert_same_models(model, dynquant.quantize_dynamic(rounded))

    def test_from_a_file(self):
        saved = of_torch(net(), {nn.Linear})
        file = io.BytesIO()
        torch.save(saved.state_dict(), file)
        file.seek(0)
        model = dynquant.quantize_dynamic(net())
        model.load_state_dict(torch.load(file, weights_only=False))
        assert_same(model[0].bias, saved[0].bias().detach())

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ((torch.zeros(5, 7), None), r"0.weight: expected the shape \[5, 6\]"),
            (7, r"0._packed_params._packed_params: expected torch.ao's \(weight, bias\), found"),
            ((None, None), r"0._packed_params._packed_params: expected a weight \[N, K\]"),
        ],
    )
    def test_wrong_entries(self, value, message):
        model = dynquant.quantize_dynamic(net())
        state = of_torch(net(), {nn.Linear}).state_dict()
        state["0._packed_params._packed_params"] = value
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict(state)

    def test_strict_names_what_is_missing(self):
        model = dynquant.quantize_dynamic(net())
        state = of_torch(net(bias=False), {nn.Linear}).state_dict()
        with pytest.raises(RuntimeError, match='Missing key.*"0.bias"'):
            model.load_state_dict(state)

    def test_attention_that_torch_left_in_float(self):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        saved = of_torch(layer, {nn.Linear})  # which cannot run: its fast path reads .weight
        model = dynquant.quantize_dynamic(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
        model.load_state_dict(saved.state_dict())
        x = torch.randn(2, 3, 8)
        torch.testing.assert_close(model(x), layer(x), rtol=0, atol=0.2)

    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
    @pytest.mark.parametrize("cell", ["LSTM", "GRU"])
    def test_cells_of_recurrent_layers(self, cell, dtype):
        layer = getattr(nn, cell)(3, 4, num_layers=2, bidirectional=True)
        saved = of_torch(nn.Sequential(layer), {type(layer)}, dtype)
        state = saved.state_dict()
        if not any(key.endswith("param") for key in state):
            pytest.skip(f"torch does not quantize {cell} to {dtype}")
        for place in range(4):
            suffix = f"l{place // 2}" + ("_reverse" if place % 2 else "")
            found = plain_cell(state[f"0._all_weight_values.{place}.param"])
            for part in ("ih", "hh"):
                assert_same(found[f"bias_{part}"], getattr(layer, f"bias_{part}_{suffix}").detach())
                weight = getattr(layer, f"weight_{part}_{suffix}").detach()
                scale = found.get(f"weight_{part}_scale", torch.tensor([2**-12]))
                is_int8 = dtype == torch.qint8
                held = found[f"weight_{part}_int8"] * scale if is_int8 else found[f"weight_{part}"]
                error = (held - weight).abs()
                assert (error <= scale * 1.01).all()

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("half", HALVES, ids=str)
    @pytest.mark.parametrize(
        "kind", ["Linear", "Linear without bias", "LSTM", "LSTMCell", "GRUCell", "RNNCell"]
    )
    def test_float16_into_16_bits(self, kind, half, assign):
        trained = nn.Sequential(every_float_module()[kind])
        saved = of_torch(trained, {type(trained[0])}, torch.float16)
        model = dynquant.quantize_dynamic(nn.Sequential(every_float_module()[kind]), dtype=half)
        keys = model.load_state_dict(saved.state_dict(), assign=assign)
        assert not keys.missing_keys and not keys.unexpected_keys
        rounded = dynquant.quantize_dynamic(trained, dtype=torch.float16)
        floats = {key: value for key, value in rounded.state_dict().items() if "version" not in key}
        expected = dynquant.quantize_dynamic(trained, dtype=half)
        expected.load_state_dict(floats)
        assert_same_states(model, expected)

    def test_float16_gru_into_16_bits(self):
        trained = nn.Sequential(nn.GRU(6, 5, 2))
        saved = of_torch(trained, {nn.GRU}, torch.float16).state_dict()
        if not any(key.endswith("param") for key in saved):
            pytest.skip("torch does not quantize GRU to float16")
        model = dynquant.quantize_dynamic(nn.Sequential(nn.GRU(6, 5, 2)), dtype=torch.float16)
        model.load_state_dict(saved)
        assert_same_states(model, dynquant.quantize_dynamic(trained, dtype=torch.float16))

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
    def test_fused_linear_and_relu(self, dtype, inplace, bias):
        fused = pytest.importorskip("torch.ao.nn.intrinsic")

        def net():
            return nn.Sequential(fused.LinearReLU(nn.Linear(6, 5, bias=bias), nn.ReLU())).eval()

        trained = net()
        saved = of_torch(trained, {fused.LinearReLU}, dtype)
        assert "0._packed_params._packed_params" in saved.state_dict()
        model = dynquant.quantize_dynamic(net(), dtype=dtype, inplace=inplace)
        model = dynquant.quantize_dynamic(model, dtype=dtype)  # which changes nothing
        for loading in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            keys = loading.load_state_dict(saved.state_dict())
            assert not keys.missing_keys and not keys.unexpected_keys
            linear = dynquant.quantize_dynamic(nn.Linear(6, 5, bias=bias), dtype=dtype)
            entries = saved.state_dict().items()
            linear.load_state_dict({key.removeprefix("0."): value for key, value in entries})
            assert_same_states(loading[0][0], linear)
            x = torch.randn(64, 6)
            assert torch.cosine_similarity(loading(x), saved(x), 0).min() > 0.99
            assert (loading(x) >= 0).all()
            loading.load_state_dict(model.state_dict())
            loading.load_state_dict(trained.state_dict())
        state = saved.state_dict()
        state["0.other"] = torch.zeros(1)
        with pytest.raises(RuntimeError, match='Unexpected key.*"0.other"'):
            model.load_state_dict(state)

    def test_int8_into_16_bits_is_an_error(self):
        saved = of_torch(net(), {nn.Linear})
        model = dynquant.quantize_dynamic(net(), dtype=torch.float16)
        with pytest.raises(
            RuntimeError, match="0.weight_int8 is there, but 0.weight is held in an"
        ):
            model.load_state_dict(saved.state_dict())

    def test_what_is_no_cell(self):
        with pytest.raises(ValueError, match="expected torch.ao's parameters of a cell, found int"):
            plain_cell(3)
        cell = of_torch(nn.Sequential(nn.LSTMCell(3, 4)), {nn.LSTMCell}).state_dict()
        packed = cell["0._packed_weight_ih"]
        with pytest.raises(ValueError, match="expected torch.ao's parameters of a cell"):
            plain_cell(packed)
        assert plain_linear(packed)["weight_int8"].shape == (16, 3)

    def test_weights_of_other_dtypes_are_dequantized(self):
        weight = torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 120, torch.quint8)
        assert_same(plain_weight(weight, "w")["w"], weight.dequantize())


def torch_scale(weight):
    if weight.qscheme() == torch.per_tensor_affine:
        return torch.tensor([weight.q_scale()])
    return weight.q_per_channel_scales().float()


class TestVersion1:
    """Version 1 had the integers under the name of the float weight."""

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize(
        ("module", "dtype"),
        [
            (nn.Linear(6, 5), torch.qint8),
            (nn.MultiheadAttention(8, 2), torch.qint8),
            (nn.LSTM(5, 7, 2, bidirectional=True, proj_size=3), torch.qint8),
            (nn.GRUCell(5, 7), torch.qint8),
            (nn.Embedding(9, 5), torch.quint8),
            (nn.EmbeddingBag(9, 5), torch.quint4x2),
            (nn.Linear(6, 5), torch.float16),
        ],
        ids=str,
    )
    def test_is_read(self, module, dtype, assign):
        saved, model = (dynquant.quantize_dynamic(module, dtype=dtype) for _ in range(2))
        for parameter in model.parameters():
            parameter.data.zero_()
        old = {}
        for key, value in saved.state_dict().items():
            value = torch.tensor(1) if key.endswith("version") else value
            old[key.removesuffix("_uint8").removesuffix("_int8")] = value
        assert model.load_state_dict(old, assign=assign) == ([], [])
        assert_same_states(model, saved)

    def test_integers_without_their_scale(self):
        model = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(6, 5)))
        before = copy.deepcopy(model)
        with pytest.raises(RuntimeError, match="0.weight_int8 without 0.weight_scale: both are"):
            model.load_state_dict({"0.weight": torch.ones(5, 6).to(torch.int8)}, strict=False)
        assert_same_states(model, before)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.quint4x2], ids=str)
def test_integers_never_become_weights_of_a_float_model(dtype):
    model = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 4), nn.LSTM(4, 3), nn.GRUCell(3, 2))
    before = copy.deepcopy(model)
    state = dynquant.quantize_dynamic(model, dtype=dtype).state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    for key, value in model.state_dict().items():
        assert_same(value, before.state_dict()[key], key)


class TestEmbeddingsOfTorchAo:
    @pytest.fixture(params=["quint8", "quint4x2"])
    def both(self, request):
        """The same kinds of module: quantized by torch.ao and, of other weights, by dynquant."""
        dtype = getattr(torch, request.param)
        suffix = "" if dtype == torch.quint8 else "_4bit"
        qconfig = getattr(torch_ao, f"float_qparams_weight_only_qconfig{suffix}")

        def model():
            bag = nn.EmbeddingBag(9, 6, mode="sum")  # torch.ao's sums in every mode
            return nn.ModuleDict({"table": nn.Embedding(9, 7), "bag": bag}).eval()

        kinds = (nn.EmbeddingBag,) if suffix else (nn.Embedding, nn.EmbeddingBag)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao announces its own removal
            theirs = torch_ao.quantize_dynamic(model(), dict.fromkeys(kinds, qconfig), dtype=dtype)
        return theirs, dynquant.quantize_dynamic(model(), dict.fromkeys(kinds, dtype))

    def test_the_numbers_are_those_of_torch_ao(self, both):
        theirs, ours = both
        ours.load_state_dict(theirs.state_dict())
        ids, offsets = torch.arange(9), torch.tensor([0, 4])
        packed = theirs["bag"].state_dict()["_packed_params._packed_weight"]
        assert_same(ours["bag"].weight_uint8, packed.int_repr().reshape(9, -1))
        # torch.ao has scales of 4 bits in fp16.
        near = {"rtol": 0, "atol": 1e-6 if ours["bag"].bits == 8 else 2e-2}
        torch.testing.assert_close(ours["table"](ids), theirs["table"](ids), **near)
        torch.testing.assert_close(ours["bag"](ids, offsets), theirs["bag"](ids, offsets), **near)

    def test_what_does_not_fit_is_an_error(self, both):
        state = both[0]["bag"].state_dict()
        bits = both[1]["bag"].bits
        own, other = (torch.quint8, torch.quint4x2)[:: 1 if bits == 8 else -1]
        key = "_packed_params._packed_weight"
        for columns, dtype, given, message in (
            (4, own, state, r"_packed_weight: expected the shape \[V, 4\], found \[9, 6\]"),
            (6, other, state, "expected a table in [48] bits, found one in torch.quint"),
            (6, own, {**state, key: 7}, "expected torch.ao's table of an embedding, found int"),
        ):
            target = dynquant.quantize_dynamic(nn.EmbeddingBag(9, columns), dtype=dtype)
            before = target.state_dict()
            with pytest.raises(RuntimeError, match=message):
                target.load_state_dict(given)
            for name, value in target.state_dict().items():
                assert_same(value, before[name], name)
