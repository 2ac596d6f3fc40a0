"""dynquant.nn.MultiheadAttention: every form of call, against torch's attention of the same values.

The oracle is torch's own function with identity projections, between the quantized projections.
"""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, assert_same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from round_trips import COPIES
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Linear, Linear16bit, MultiheadAttention

HEADS, WIDTH = 2, 8
CLOSE = {"rtol": 0.05, "atol": 0.05}  # of 16-bit weights to float ones


def expected(layer, query, key, value, **arguments):
    """torch's attention between the layer's own projections."""
    batched = query.dim() == 3
    q, k, v = layer.q_proj(query), layer.k_proj(key), layer.v_proj(value)
    if batched and layer.batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    identity = torch.eye(WIDTH)
    output, weights = F.multi_head_attention_forward(
        *(q, k, v, WIDTH, HEADS, None, None, layer.bias_k, layer.bias_v, layer.add_zero_attn),
        *(0.0, identity, None),
        training=False,
        use_separate_proj_weight=True,
        q_proj_weight=identity,
        k_proj_weight=identity,
        v_proj_weight=identity,
        **arguments,
    )
    if batched and layer.batch_first:
        output = output.transpose(0, 1)
    return output, weights


def assert_as_expected(layer, query, key, value, **arguments):
    # The projection of the result rounds it: compared is what goes in.
    seen = []
    handle = layer.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        output, weights = layer(query, key, value, **arguments)
        attended, expected_weights = expected(layer, query, key, value, **arguments)
    handle.remove()
    torch.testing.assert_close(seen[0], attended, rtol=1e-5, atol=1e-5)
    assert_same(output, layer.out_proj(seen[0]))
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-5)


def floats(seed=0, **arguments):
    torch.manual_seed(seed)
    attention = nn.MultiheadAttention(WIDTH, HEADS, **arguments)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
        nn.init.normal_(attention.out_proj.bias)
    return attention.eval()


def drawn_mask(kind, shape):
    mask = torch.rand(shape) < 0.4
    mask[..., 0] = False  # a row that sees nothing is NaN
    return {
        "none": None,
        "bool": mask,
        "float": torch.zeros(shape).masked_fill_(mask, -3.0),
    }[kind]


@settings(max_examples=60)
@given(
    batch_first=st.booleans(),
    batched=st.booleans(),
    bias=st.booleans(),
    add_bias_kv=st.booleans(),
    add_zero_attn=st.booleans(),
    widths=st.sampled_from([(None, None), (5, 5), (6, 3)]),
    lengths=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    batch=st.integers(1, 3),
    attention_mask=st.sampled_from(["none", "bool", "float"]),
    padding_mask=st.sampled_from(["none", "bool", "float"]),
    per_head=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
    seed=st.integers(0, 9),
)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_every_form_of_call(
    batch_first,
    batched,
    bias,
    add_bias_kv,
    add_zero_attn,
    widths,
    lengths,
    batch,
    attention_mask,
    padding_mask,
    per_head,
    need_weights,
    average,
    seed,
):
    layer = MultiheadAttention.from_float(
        floats(
            seed,
            bias=bias,
            add_bias_kv=add_bias_kv,
            add_zero_attn=add_zero_attn,
            kdim=widths[0],
            vdim=widths[1],
            batch_first=batch_first,
        )
    )
    n, (length, keys) = (batch if batched else 1), lengths

    def rows(count, width):
        if not batched:
            return torch.randn(count, width)
        return torch.randn(*((n, count) if batch_first else (count, n)), width)

    mask_shape = (n * HEADS, length, keys) if per_head else (length, keys)
    assert_as_expected(
        layer,
        rows(length, WIDTH),
        rows(keys, layer.kdim),
        rows(keys, layer.vdim),
        attn_mask=drawn_mask(attention_mask, mask_shape),
        key_padding_mask=drawn_mask(padding_mask, (n, keys) if batched else (keys,)),
        need_weights=need_weights,
        average_attn_weights=average,
    )


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("extra", [False, True])
def test_is_causal_is_a_hint(extra, padded, need_weights):
    layer = MultiheadAttention.from_float(floats(batch_first=True, add_zero_attn=extra))
    x, padding = torch.randn(2, 4, WIDTH), torch.zeros(2, 4, dtype=torch.bool)
    padding[1, 3] = True
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    arguments = {"attn_mask": mask, "need_weights": need_weights}
    arguments["key_padding_mask"] = padding.float() * -9 if padded else None
    with torch.no_grad():
        hinted = layer(x, x, x, is_causal=True, **arguments)
        plain = layer(x, x, x, is_causal=False, **arguments)
    torch.testing.assert_close(hinted, plain)
    with pytest.raises(RuntimeError, match="pass attn_mask as well"):
        layer(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda a, x: a(x[0, 0], x, x), ValueError, "must all have 2 or 3 dimensions"),
        (lambda a, x: a(x[..., :5], x, x), ValueError, "query must have 8 features"),
        (lambda a, x: a(x, x, x[..., :5]), ValueError, "value must have 8 features"),
        (lambda a, x: a(x, x, x[:, :2]), ValueError, "key and value differ"),
        (lambda a, x: a(x[:1], x, x), ValueError, "query and key differ in batch"),
        (lambda a, x: a(x, x, x.half()), ValueError, "same dtype, got .*float32, torch.float16"),
        (lambda a, x: a(x, x, x, torch.zeros(3, 2)), ValueError, r"mask must have the shape \[2, "),
        (
            lambda a, x: a(x, x, x, attn_mask=torch.zeros(2, 2)),
            ValueError,
            r"attn_mask must have the shape \[3, 3\] or \[4, 3, 3\], got \[2, 2\]",
        ),
        (
            lambda a, x: a(x, x, x, attn_mask=torch.zeros(3, 3, dtype=torch.int32)),
            TypeError,
            "attn_mask is torch.int32; allowed: torch.bool",
        ),
    ],
)
def test_wrong_arguments(call, error, message):
    layer = MultiheadAttention.from_float(floats(batch_first=True))
    with pytest.raises(error, match=message):
        call(layer, torch.randn(2, 3, WIDTH))


class TestSharedQuantization:
    @pytest.fixture(autouse=True)
    def from_the_first_value_on(self, monkeypatch):
        monkeypatch.setattr("dynquant.nn.linear._SHARED_FROM", 0)

    @pytest.fixture
    def layer(self):
        return MultiheadAttention.from_float(floats(batch_first=True))

    def count(self, monkeypatch):
        calls = []
        original = torch.ops.dynquant.quantize_activation
        monkeypatch.setattr(
            torch.ops.dynquant, "quantize_activation", lambda *a: calls.append(1) or original(*a)
        )
        return calls

    def test_self_attention_quantizes_once(self, layer, monkeypatch):
        x = torch.randn(2, 3, WIDTH)
        calls = self.count(monkeypatch)
        with torch.no_grad():
            shared = layer(x, x, x)
            assert len(calls) == 1
            memory = torch.randn(2, 5, WIDTH)
            layer(x, memory, memory)
            assert len(calls) == 2
            separate = layer(x, x.clone(), x.clone())
        assert len(calls) == 2
        for one, other in zip(shared, separate, strict=True):
            assert_same(one, other)

    def test_few_values_are_quantized_for_each(self, layer, monkeypatch):
        x = torch.randn(2, 3, WIDTH)
        with torch.no_grad():
            shared = layer(x, x, x)
            monkeypatch.setattr("dynquant.nn.linear._SHARED_FROM", x.numel() + 1)
            calls = self.count(monkeypatch)
            assert_same(layer(x, x, x)[0], shared[0])
        assert not calls

    def test_what_hangs_on_a_projection_is_called(self, layer):
        x, seen = torch.randn(2, 3, WIDTH), []
        layer.k_proj.register_forward_hook(lambda *args: seen.append(1))
        with torch.no_grad():
            layer(x, x, x)
        layer.v_proj = nn.Linear(WIDTH, WIDTH)
        layer(x, x, x)
        assert seen == [1, 1]

    def test_with_a_gradient_and_under_autocast(self, layer):
        x = torch.randn(2, 3, WIDTH, requires_grad=True)
        output = layer(x, x, x)[0]
        output.sum().backward()
        assert x.grad.abs().sum() > 0
        with torch.no_grad():
            assert_same(layer(x, x, x)[0], output)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert layer(x, x, x)[0].dtype == torch.bfloat16

    def test_takes_what_a_quantize_stub_gives(self, layer):
        x = dynquant.nn.Quantize()(torch.randn(2, 3, WIDTH))
        with torch.no_grad():
            assert_same(layer(x, x, x)[0], layer(x, x.clone(), x.clone())[0], "rounded once")

    def test_schemes(self):
        x = torch.randn(2, 3, WIDTH)
        for config in (QConfig(symmetric=True), QConfig("per_tensor", "per_tensor")):
            layer = MultiheadAttention.from_float(floats(batch_first=True), config)
            assert_as_expected(layer, x, x, x)
            assert layer.q_proj.symmetric == config.symmetric


class TestQuantizeDynamic:
    @pytest.mark.parametrize("spec", [None, {nn.Linear}, {nn.MultiheadAttention}, {"0"}, {"": {}}])
    @pytest.mark.parametrize("inplace", [False, True])
    def test_finds_it(self, spec, inplace):
        model = dynquant.quantize_dynamic(nn.Sequential(floats()), spec, inplace=inplace)
        assert type(model[0]) is MultiheadAttention

    def test_is_kept_in_float(self):
        model = nn.Sequential(floats(), nn.Linear(2, 2))
        for keep in (nn.MultiheadAttention, "0"):
            quantized = dynquant.quantize_dynamic(model, {nn.Linear: {}, keep: None})
            assert type(quantized[0]) is nn.MultiheadAttention
            assert isinstance(quantized[1], Linear)

    def test_is_close_to_float(self):
        torch.manual_seed(0)
        attention = nn.MultiheadAttention(64, 4, batch_first=True).eval()
        x = torch.randn(3, 9, 64)
        with torch.no_grad():
            wanted = attention(x, x, x)[0]
            error = dynquant.quantize_dynamic(attention)(x, x, x)[0] - wanted
        assert 10 * (wanted.square().sum() / error.square().sum()).log10() > 34

    def test_per_tensor_weights_have_a_scale_each(self):
        layer = dynquant.quantize_dynamic(floats(), {nn.MultiheadAttention: dynquant.per_tensor})
        assert layer.q_proj.weight_scale.shape == layer.out_proj.weight_scale.shape == (1,)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda a: a.in_proj_weight.data.fill_(torch.nan), "^a.in_proj_weight holds NaN"),
            (lambda a: a.out_proj.weight.data.fill_(torch.inf), "^a.out_proj.weight holds NaN"),
            (lambda a: a.double(), "^a.in_proj_weight is torch.float64"),
        ],
    )
    def test_refuses_before_anything_changes(self, change, message):
        model = nn.ModuleDict({"l": nn.Linear(2, 2), "a": floats()})
        change(model["a"])
        with pytest.raises(ValueError, match=message):
            dynquant.quantize_dynamic(model, inplace=True)
        assert type(model["l"]) is nn.Linear

    def test_separate_weights_are_named(self):
        attention = floats(kdim=5)
        attention.k_proj_weight.data.fill_(torch.nan)
        with pytest.raises(ValueError, match="^k_proj_weight holds NaN"):
            dynquant.quantize_dynamic(attention)

    def test_dynamic_false(self):
        with pytest.raises(ValueError, match=r"^0 \(nn.MultiheadAttention\): 'dynamic' is False"):
            dynquant.quantize_dynamic(nn.Sequential(floats()), {"0": {"dynamic": False}})

    def test_subclass_with_its_own_forward(self):
        class Own(nn.MultiheadAttention):
            def forward(self, x):
                return super().forward(x, x, x)

        with pytest.warns(UserWarning, match=r"0 \(Own\) has a forward other than Multihead"):
            model = dynquant.quantize_dynamic(nn.Sequential(Own(8, 2)), {nn.Linear})
        model[0](torch.randn(3, 8))

    def test_its_out_proj_alone(self):
        model = nn.Sequential(floats())
        quantized = dynquant.quantize_dynamic(model, {"0.out_proj"})[0]
        assert isinstance(quantized.out_proj, Linear) and type(quantized.q_proj) is nn.Linear
        quantized = dynquant.quantize_dynamic(model, {"0": {}, "0.out_proj": None})[0]
        assert type(quantized.out_proj) is nn.Linear and isinstance(quantized.q_proj, Linear)

    def test_hooks_are_kept(self):
        attention, seen = floats(), []
        attention.register_forward_hook(lambda *args: seen.append(1))
        x = torch.randn(3, WIDTH)
        dynquant.quantize_dynamic(attention)(x, x, x)
        assert seen == [1]

    def test_two_steps(self):
        prepared = dynquant.prepare(nn.Sequential(floats()))
        assert prepared[0].qconfig == QConfig()
        assert type(dynquant.convert(prepared)[0]) is MultiheadAttention


class TestState:
    def pair(self, **arguments):
        return (dynquant.quantize_dynamic(floats(seed, **arguments)) for seed in (1, 2))

    @pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 5, "add_bias_kv": True}])
    @pytest.mark.parametrize("assign", [False, True])
    def test_loads(self, arguments, assign):
        one, other = self.pair(**arguments)
        other.load_state_dict(one.state_dict(), assign=assign)
        self.assert_equal(other, one)

    @pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 5, "add_bias_kv": True}])
    @pytest.mark.parametrize("assign", [False, True])
    def test_loads_a_float_checkpoint(self, arguments, assign):
        float_one = floats(1, **arguments)
        one, other = self.pair(**arguments)
        model = nn.Sequential(other)
        keys = model.load_state_dict(nn.Sequential(float_one).state_dict(), assign=assign)
        assert not keys.missing_keys and not keys.unexpected_keys
        self.assert_equal(model[0], one)

    def test_wrong_float_checkpoint(self):
        _, other = self.pair()
        state = floats(1).state_dict()
        with pytest.raises(RuntimeError, match=r"q_proj.weight: expected the shape \[8, 8\]"):
            other.load_state_dict({**state, "in_proj_weight": torch.zeros(27, 8)})
        with pytest.raises(RuntimeError, match="Unexpected key.*in_proj_weight"):
            other.load_state_dict({**state, "in_proj_weight": torch.zeros(25, 8)})
        del state["in_proj_bias"]
        with pytest.raises(RuntimeError, match="Missing key.*q_proj.bias"):
            other.load_state_dict(state)

    @pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
    def test_copies(self, copied):
        one, _ = self.pair(add_bias_kv=True)
        self.assert_equal(copied(one), one)

    def test_casts(self):
        one, _ = self.pair(add_bias_kv=True)
        one.to(torch.bfloat16)
        x = torch.randn(3, WIDTH, dtype=torch.bfloat16)
        assert one(x, x, x)[0].dtype == torch.bfloat16
        assert one.bias_k.dtype == torch.bfloat16
        assert one.q_proj.weight_scale.dtype == torch.float32

    def test_reads_as_torch_attention_does(self):
        one, _ = self.pair()
        rows = [one.q_proj.weight, one.k_proj.weight, one.v_proj.weight]
        assert_same(one.in_proj_weight + 0, torch.cat([row + 0 for row in rows]))
        assert one.in_proj_weight.shape == (24, 8) and one.in_proj_bias.shape == (24,)
        assert next(self.pair(kdim=5)).in_proj_weight is None
        assert next(self.pair(bias=False)).in_proj_bias is None

    def assert_equal(self, one, other):
        assert_same_state(one, other)
        query, key = torch.randn(3, WIDTH), torch.randn(4, one.kdim)
        value = torch.randn(4, one.vdim)
        assert_same(one(query, key, value)[0], other(query, key, value)[0])


class TestTracing:
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_compiles_and_exports(self, need_weights):
        layer = dynquant.quantize_dynamic(floats(batch_first=True))
        x, mask = torch.randn(2, 3, WIDTH), torch.ones(3, 3, dtype=torch.bool).triu(1)
        arguments = {"attn_mask": mask, "need_weights": need_weights}
        wanted = layer(x, x, x, **arguments)
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, x, x, **arguments), wanted)
        program = torch.export.export(layer, (x, x, x), arguments)
        torch.testing.assert_close(program.module()(x, x, x, **arguments), wanted)

    def test_trace(self):
        layer = dynquant.quantize_dynamic(floats(batch_first=True))
        x = torch.randn(2, 3, WIDTH)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            traced = torch.jit.trace(layer, (x, x, x))
        torch.testing.assert_close(traced(x, x, x), layer(x, x, x))


def test_autocast_takes_several_dtypes():
    layer = MultiheadAttention.from_float(floats(batch_first=True))
    x = torch.randn(2, 3, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        result = layer(x, x.bfloat16(), x.bfloat16())[0]
        assert_same(result, layer(*[x.bfloat16()] * 3)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
class TestNested:
    def test_parts_are_separate(self):
        layer = dynquant.quantize_dynamic(floats(batch_first=True))
        parts = [torch.randn(length, WIDTH) for length in (3, 1, 5)]
        x = torch.nested.nested_tensor(parts)
        result, weights = layer(x, x, x, need_weights=False)
        assert weights is None
        for part, output in zip(parts, result.unbind(), strict=True):
            assert_same(output, layer(part, part, part, need_weights=False)[0])
        with pytest.raises(ValueError, match="need_weights must be False"):
            layer(x, x, x)
        two = torch.nested.nested_tensor(parts[:2])
        with pytest.raises(ValueError, match=r"differ in batch: \[3, 2, 2\]"):
            layer(x, two, two, need_weights=False)


class TestTransformers:
    """Every module of nn.Transformer; test_nn_linear.py has the encoder's fast path."""

    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("batch_first", [False, True])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_all_projections_run_in_int8(self, mode, batch_first, norm_first, monkeypatch):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Transformer(
                *(32, 4, 2, 2, 64), batch_first=batch_first, norm_first=norm_first
            ).eval()
        quantized = dynquant.quantize_dynamic(model)
        attentions = [m for m in quantized.modules() if isinstance(m, MultiheadAttention)]
        assert len(attentions) == 6
        assert not any(type(m) is nn.MultiheadAttention for m in quantized.modules())
        assert not any(isinstance(m, nn.Linear) for m in quantized.modules())
        source, target = torch.randn(3, 7, 32), torch.randn(3, 5, 32)
        padding = torch.zeros(3, 7, dtype=torch.bool)
        padding[1, 5:] = True
        arguments = {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5) < 0,
            "tgt_is_causal": True,
            "src_key_padding_mask": padding,
            "memory_key_padding_mask": padding,
        }
        if not batch_first:
            source, target = source.transpose(0, 1), target.transpose(0, 1)
        with mode():
            wanted = model(source, target, **arguments)
            result = quantized(source, target, **arguments)
        error = result - wanted
        assert 0 < error.square().sum() < 1e-3 * wanted.square().sum()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_attention_alone(self, mode):
        """The fast path reads in_proj_weight of the first layer, whose other layers are float."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        quantized = dynquant.quantize_dynamic(encoder, {"layers.*.self_attn"})
        assert isinstance(quantized.layers[0].linear1, nn.Linear)
        x, padding = torch.randn(2, 4, 32), torch.zeros(2, 4, dtype=torch.bool)
        padding[1, 2:] = True
        with mode():
            wanted = encoder(x, src_key_padding_mask=padding)[~padding]
            result = quantized(x, src_key_padding_mask=padding)[~padding]
        assert 0 < (result - wanted).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
class Test16Bits:
    @pytest.mark.parametrize("sizes", [{}, {"kdim": 5, "vdim": 6}, {"add_bias_kv": True}], ids=str)
    @pytest.mark.parametrize("need_weights", [False, True])
    def test_forms_of_call(self, dtype, sizes, need_weights):
        attention = floats(**sizes)
        layer = dynquant.quantize_dynamic(attention, dtype=dtype)
        assert type(layer) is MultiheadAttention
        assert all(type(one) is Linear16bit for one in layer.children())
        query = torch.randn(3, 4, WIDTH)
        key = torch.randn(5, 4, attention.kdim)
        value = torch.randn(5, 4, attention.vdim)
        mask = drawn_mask("bool", (3, 5))
        arguments = {"attn_mask": mask, "need_weights": need_weights}
        assert_as_expected(layer, query, key, value, **arguments)
        exact = attention(query, key, value, **arguments)[0]
        torch.testing.assert_close(layer(query, key, value, **arguments)[0], exact, **CLOSE)

    def test_weights_and_state(self, dtype):
        attention = floats()
        layer = MultiheadAttention.from_float(attention, QConfig(dtype=dtype))
        assert_same(layer.in_proj_weight + 0, attention.in_proj_weight.detach().to(dtype).float())
        assert_same(layer.in_proj_bias, attention.in_proj_bias.detach())
        other = MultiheadAttention.from_float(floats(seed=1), QConfig(dtype=dtype))
        other.load_state_dict(layer.state_dict())
        x = torch.randn(3, 2, WIDTH)
        for copied in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert_same(copied(x, x, x)[0], layer(x, x, x)[0])
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert_same(compiled(x, x, x)[0], layer(x, x, x)[0])
        with pytest.raises(ValueError, match="in_proj_weight holds NaN"):
            attention.in_proj_weight.data[0, 0] = torch.nan
            MultiheadAttention.from_float(attention, QConfig(dtype=dtype))

    def test_transformer(self, dtype):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 16, dropout=0, batch_first=True)
        encoder = nn.TransformerEncoder(layer, 2).eval()
        quantized = dynquant.quantize_dynamic(encoder, dtype=dtype)
        assert type(quantized.layers[0].self_attn) is MultiheadAttention
        x = torch.randn(2, 5, WIDTH)
        with torch.inference_mode():
            torch.testing.assert_close(quantized(x), encoder(x), **CLOSE)
