"""What other code reads, writes and computes with `.weight` of a quantized module."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn.weight import QuantizedWeight


def quantized(module, **config):
    return dynquant.quantize_dynamic(module, {type(module): QConfig(**config)})


@pytest.fixture(params=[torch.qint8, torch.float16, torch.bfloat16], ids=str)
def layer(request):
    torch.manual_seed(0)
    return quantized(nn.Linear(12, 9), dtype=request.param)


@pytest.fixture
def x():
    return torch.randn(4, 12)


class TestProducts:
    def test_linear_is_the_layer(self, layer, x):
        assert_same(F.linear(x, layer.weight, layer.bias), layer(x))
        bias = torch.randn(9)
        expected = copy.deepcopy(layer)
        expected.bias.data.copy_(bias)
        assert_same(F.linear(x, layer.weight, bias), expected(x))

    def test_with_the_transpose(self, layer, x):
        expected = F.linear(x, layer.weight)
        weight = layer.weight
        transposed = (weight.T, weight.t(), weight.mT, weight.transpose(0, 1), weight.permute(1, 0))
        for one in transposed:
            assert one.shape == (12, 9)
            for product in (x @ one, torch.matmul(x, one), torch.mm(x, one), x.matmul(one)):
                assert_same(product, expected)
        assert_same(torch.addmm(layer.bias, x, weight.t()), layer(x))

    def test_from_the_left(self, layer, x):
        expected = F.linear(x, layer.weight).T
        for product in (layer.weight @ x.T, torch.matmul(layer.weight, x.T), layer.weight.mm(x.T)):
            assert_same(product, expected)
            assert product.is_contiguous()
        batch = torch.randn(3, 12, 5)
        assert_same(layer.weight @ batch, F.linear(batch.mT, layer.weight).mT)
        assert (layer.weight @ x[0]).shape == (9,)
        torch.testing.assert_close(layer.weight @ x.T.to_sparse(), (layer.weight + 0) @ x.T)
        with pytest.raises(RuntimeError, match="must be a matrix"):
            torch.mm(layer.weight, batch)

    @pytest.mark.parametrize("scheme", ["per_channel", "per_tensor"])
    def test_of_rows(self, x, scheme):
        layer = quantized(nn.Linear(12, 9), weight=scheme)
        weight, expected = layer.weight, layer(x)
        for rows in (slice(2, 7), slice(None, 5), slice(8, None), slice(4, 4)):
            assert isinstance(weight[rows], QuantizedWeight)
            assert_same(F.linear(x, weight[rows], layer.bias[rows]), expected[:, rows])
            assert_same(weight[rows] + 0, (weight + 0)[rows])
        for parts in (weight.chunk(3), weight.split([3, 3, 3]), torch.split(weight, 3)):
            assert_same(torch.cat([F.linear(x, one) for one in parts], -1), F.linear(x, weight))
        assert_same(F.linear(x, torch.cat(weight.chunk(3)), layer.bias), expected)
        assert_same(weight.narrow(0, 2, 4).int_repr(), weight.int_repr()[2:6])

    def test_of_several(self, layer, x):
        other = quantized(nn.Linear(12, 5))
        both = torch.cat((layer.weight, other.weight))
        assert isinstance(both, QuantizedWeight) and both.shape == (14, 12)
        product = F.linear(x, both, torch.cat((layer.bias, other.bias)))
        assert_same(product, torch.cat((layer(x), other(x)), -1))

    def test_gradient(self, layer):
        x = torch.randn(4, 12, requires_grad=True)
        F.linear(x, layer.weight).sum().backward()
        torch.testing.assert_close(x.grad, layer.weight.float().sum(0).expand(4, -1))

    def test_vision_transformer_with_biases_of_its_own(self, x):
        qkv = quantized(nn.Linear(12, 36, bias=False))
        q, v = torch.randn(12), torch.randn(12)
        bias = torch.cat((q, torch.zeros(12), v))
        assert_same(F.linear(x, qkv.weight, bias), qkv(x) + bias)

    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
    def test_attention_of_functional(self, dtype):
        class Attention(nn.Module):
            def __init__(self):
                super().__init__()
                for one in "qkvo":
                    setattr(self, f"{one}_proj", nn.Linear(16, 16))

            def forward(self, x):
                biases = [one.bias for one in (self.q_proj, self.k_proj, self.v_proj)]
                return F.multi_head_attention_forward(
                    *(x, x, x, 16, 4, None, torch.cat(biases), None, None, False, 0.0),
                    *(self.o_proj.weight, self.o_proj.bias),
                    use_separate_proj_weight=True,
                    q_proj_weight=self.q_proj.weight,
                    k_proj_weight=self.k_proj.weight,
                    v_proj_weight=self.v_proj.weight,
                    need_weights=False,
                )[0]

        model, x = Attention().eval(), torch.randn(5, 2, 16)
        other = dynquant.quantize_dynamic(model, {nn.Linear: QConfig(dtype=dtype)})
        torch.testing.assert_close(other(x), model(x), rtol=0.05, atol=0.05)

    def test_in_proj_weight(self):
        attention = nn.MultiheadAttention(16, 4).eval()
        layer, x = dynquant.quantize_dynamic(attention), torch.randn(5, 2, 16)
        product = F.linear(x, layer.in_proj_weight, layer.in_proj_bias)
        parts = [one(x) for one in (layer.q_proj, layer.k_proj, layer.v_proj)]
        assert_same(product, torch.cat(parts, -1))
        assert layer.in_proj_weight.chunk(3)[1].data_ptr() == layer.k_proj.packed.data_ptr()

    @pytest.mark.parametrize("bits", [torch.quint8, torch.quint4x2], ids=str)
    def test_a_decoder_that_multiplies_by_its_embedding(self, bits):
        embedding = nn.Embedding(5000, 7)
        table, h = quantized(embedding, dtype=bits), torch.randn(3, 7)
        values = table(torch.arange(5000))
        assert_same(table.weight + 0, values)
        for product in (F.linear(h, table.weight), h @ table.weight.to(h.dtype).T):
            torch.testing.assert_close(product, F.linear(h, values))
        assert table.weight.int_repr().shape == (5000, 7)


class Attention(nn.Module):
    """As WavLM's and fairseq's: torch computes with the weights of four linear layers."""

    def __init__(self, key_features=12):
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(12, 12), nn.Linear(12, 12)
        self.k_proj, self.v_proj = nn.Linear(key_features, 12), nn.Linear(key_features, 12)

    def forward(self, query, key, need_weights=False, mask=None):
        biases = [one.bias for one in (self.q_proj, self.k_proj, self.v_proj)]
        return F.multi_head_attention_forward(
            *(query, key, key, 12, 3, torch.empty(0), torch.cat(biases), None, None, False, 0.0),
            *(self.out_proj.weight, self.out_proj.bias, self.training),
            need_weights=need_weights,
            attn_mask=mask,
            use_separate_proj_weight=True,
            q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight,
            v_proj_weight=self.v_proj.weight,
        )


class TestAttentionOfWeights:
    @pytest.fixture(params=[torch.qint8, torch.float16], ids=str)
    def both(self, request):
        """The attention, and the quantized module that computes the same."""
        torch.manual_seed(0)
        attention, module = Attention(10), nn.MultiheadAttention(12, 3, kdim=10, vdim=10)
        for name, one in (
            ("q", attention.q_proj),
            ("k", attention.k_proj),
            ("v", attention.v_proj),
        ):
            getattr(module, f"{name}_proj_weight").data = one.weight.data
        biases = [one.bias.data for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
        module.in_proj_bias.data = torch.cat(biases)
        module.out_proj.load_state_dict(attention.out_proj.state_dict())
        spec = {nn.Linear: QConfig(dtype=request.param)}
        return [
            dynquant.quantize_dynamic(nn.Sequential(one).eval(), spec)[0]
            for one in (attention, module)
        ]

    @pytest.mark.parametrize("need_weights", [False, True])
    def test_is_the_module(self, both, need_weights):
        attention, module = both
        query, key, mask = torch.randn(5, 2, 12), torch.randn(7, 2, 10), torch.randn(5, 7)
        for mask in (None, torch.randn(5, 7)):
            found = attention(query, key, need_weights, mask)
            expected = module(query, key, key, None, need_weights, mask)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)

    def test_computes_with_no_dequantized_weight(self, both, monkeypatch):
        def fail(weight):
            raise AssertionError("dequantized")

        monkeypatch.setattr(QuantizedWeight, "dequantize", fail)
        monkeypatch.setattr(type(both[0].q_proj.weight), "dequantize", fail)
        both[0](torch.randn(5, 2, 12), torch.randn(7, 2, 10))

    def test_takes_what_torch_has_now(self, both, monkeypatch):
        attention, inputs = both[0], (torch.randn(5, 2, 12), torch.randn(7, 2, 10))
        expected, called = attention(*inputs)[0], []
        plain = F.scaled_dot_product_attention

        def other(*args, **kwargs):
            called.append(args)
            return plain(*args, **kwargs)

        monkeypatch.setattr(F, "scaled_dot_product_attention", other)
        assert_same(attention(*inputs)[0], expected)
        assert len(called) == 1

    def test_one_weight_for_all_projections(self):
        torch.manual_seed(0)
        layers = quantized(nn.Linear(12, 36)), quantized(nn.Linear(12, 12))

        def call(x):
            weight = layers[0].weight
            return F.multi_head_attention_forward(
                *(x, x, x, 12, 3, weight, layers[0].bias, None, None, False, 0.0),
                *(layers[1].weight, layers[1].bias, False),
                need_weights=False,
            )[0]

        x = torch.randn(5, 2, 12)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), call(x))

    def test_compiled_and_exported(self, both):
        attention, inputs = both[0], (torch.randn(5, 2, 12), torch.randn(7, 2, 10))
        expected = attention(*inputs)[0]
        compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs)[0], expected)
        program = torch.export.export(attention, inputs)
        torch.testing.assert_close(program.module()(*inputs)[0], expected)
        for graph in (program.graph, _traced_by_dynamo(attention, inputs)):
            names = [str(node.target) for node in graph.nodes]
            assert sum("linear_dynamic" in name or "linear_half" in name for name in names) == 4
            assert not any("addmm" in name or "function linear" in name for name in names)


def _traced_by_dynamo(model, inputs):
    graphs = []

    def backend(module, inputs):
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(*inputs)
    return graphs[0]


class TestReads:
    def test_an_adapter_that_casts_to_its_dtype(self, layer, x):
        assert layer.weight.dtype == torch.float32 == x.to(layer.weight.dtype).dtype
        half = copy.deepcopy(layer).bfloat16()
        assert half.weight.dtype == torch.bfloat16
        assert half(x.to(half.weight.dtype)).dtype == torch.bfloat16

    def test_casts_take_no_memory(self, layer):
        for weight in (layer.weight.half(), layer.weight.to(torch.bfloat16), layer.weight.detach()):
            assert isinstance(weight, QuantizedWeight)
            with pytest.raises(RuntimeError):
                weight.as_subclass(QuantizedWeight).untyped_storage().share_memory_(0)

    def test_recurrent_weights(self):
        module = nn.LSTM(5, 7, proj_size=3)
        for dtype in (torch.qint8, torch.float16):
            form = dynquant.quantize_dynamic(module, dtype=dtype)
            for name, weight in module.named_parameters():
                assert getattr(form, name).shape == weight.shape
                assert getattr(form, name).dtype == weight.dtype
                torch.testing.assert_close(
                    getattr(form, name) + 0, weight.detach(), atol=0.01, rtol=0
                )

    @pytest.mark.parametrize(
        "product",
        [
            lambda x, layer: F.linear(x, layer.weight, layer.bias),
            lambda x, layer: F.linear(x, layer.weight.to(x.dtype).detach(), layer.bias),
            lambda x, layer: x @ layer.weight.T + layer.bias,
            lambda x, layer: x.matmul(layer.weight.transpose(0, 1)) + layer.bias,
            lambda x, layer: torch.addmm(layer.bias, x, layer.weight.t()),
            lambda x, layer: F.linear(x, torch.cat([layer.weight, layer.weight])),
            lambda x, layer: F.linear(x, torch.cat([layer.weight, layer.weight], dim=0)),
        ],
    )
    def test_compiled_products_are_the_modules(self, layer, x, product):
        compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
        assert_same(compiled(x, layer), product(x, layer))

    def test_compiled(self, layer, x):
        def values(x):
            return x @ (layer.weight * 2).T, layer.weight.t().sum(1), layer.weight[2:4].amax()

        compiled = torch.compile(values, backend="aot_eager", fullgraph=True)
        for one, other in zip(compiled(x), values(x), strict=True):
            torch.testing.assert_close(one, other)


WRITES = {
    "data.copy_": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "data.zero_": lambda weight: weight.data.zero_(),
    "data =": lambda weight: setattr(weight, "data", torch.zeros(weight.shape)),
    "detach": lambda weight: weight.detach().copy_(torch.zeros_like(weight)),
    "row": lambda weight: weight[0].zero_(),
    "rows": lambda weight: weight[:2].zero_(),
    "item": lambda weight: weight.__setitem__((0, 0), 1.0),
    "view": lambda weight: weight.view(-1).mul_(2),
    "view.data": lambda weight: weight.view(-1).data.mul_(2),
    "transpose": lambda weight: weight.T.add_(1),
    "+=": lambda weight: weight.__iadd__(1),
    "init": lambda weight: nn.init.normal_(weight),
    "out": lambda weight: torch.mul(weight, 2, out=weight),
}


class TestWrites:
    @pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
    @pytest.mark.parametrize(
        ("module", "name", "dtype"),
        [
            (nn.Linear(12, 9), "weight", torch.qint8),
            (nn.Linear(12, 9), "weight", torch.float16),
            (nn.LSTM(5, 7), "weight_ih_l0", torch.qint8),
            (nn.MultiheadAttention(8, 2), "in_proj_weight", torch.qint8),
            (nn.Embedding(9, 5), "weight", torch.quint8),
        ],
        ids=str,
    )
    def test_are_errors_that_say_how(self, module, name, dtype, write):
        form = dynquant.quantize_dynamic(module, dtype=dtype)
        before = copy.deepcopy(form.state_dict())
        with pytest.raises(RuntimeError, match=r"cannot be written to: assign a float tensor"):
            write(getattr(form, name))
        for key, value in form.state_dict().items():
            assert_same(value, before[key], key)

    @pytest.mark.parametrize(
        ("module", "name", "dtype"),
        [
            (nn.Linear(12, 9), "weight", torch.qint8),
            (nn.Linear(12, 9), "weight", torch.float16),
            (nn.LSTM(5, 7), "weight_ih_l0", torch.qint8),
            (nn.Embedding(9, 5), "weight", torch.quint8),
        ],
        ids=str,
    )
    def test_scaling_in_place_scales_the_module(self, module, name, dtype):
        form = dynquant.quantize_dynamic(module, dtype=dtype)
        before = getattr(form, name) + 0
        with torch.inference_mode():
            getattr(form, name).mul_(4)
        assert_same(getattr(form, name) + 0, before * 4)
        getattr(form, name).T.div_(2)
        assert_same(getattr(form, name) + 0, before * 2)
        setattr(form, name, getattr(form, name).__itruediv__(2))  # form.weight /= 2
        assert_same(getattr(form, name) + 0, before)
        getattr(form, name).mul_(3)
        tolerance = 1e-3 if dtype == torch.float16 else 1e-6
        torch.testing.assert_close(
            getattr(form, name) + 0, before * 3, rtol=tolerance, atol=tolerance
        )

    @pytest.mark.parametrize("by", [-1, 0, torch.inf, torch.nan, 1e-38, True, torch.ones(12)])
    def test_scaling_by_anything_else_is_an_error(self, by, x):
        layer = quantized(nn.Linear(12, 9))
        expected = layer(x)
        with pytest.raises(RuntimeError, match="cannot be written to"):
            layer.weight.mul_(by)
        assert_same(layer(x), expected)

    @pytest.mark.parametrize(
        "copied", [torch.Tensor.half, lambda w: torch.cat((w,)), lambda w: w[1:]]
    )
    def test_scaling_a_copy_is_an_error(self, layer, copied, x):
        expected = layer(x)
        with pytest.raises(RuntimeError, match="cannot be written to"):
            copied(layer.weight).mul_(2)
        assert_same(layer(x), expected)

    def test_compiled_writes_are_errors(self, x):
        layer = quantized(nn.Linear(12, 9))
        for write in (
            lambda: layer.weight.div_(2),
            lambda: layer.weight.__setitem__(0, 1.0),
            lambda: layer.weight.data.zero_(),
            lambda: layer.weight.detach().copy_(x[:1]),
        ):
            compiled = torch.compile(write, backend="eager")
            with pytest.raises(RuntimeError, match="cannot be written to"):
                compiled()

    def test_a_gradient_is_an_error(self, layer):
        with pytest.raises(RuntimeError, match="takes no gradient"):
            layer.weight.requires_grad_()
        with pytest.raises(RuntimeError, match="takes no gradient"):
            layer.weight.requires_grad = True
        layer.weight.requires_grad_(False)
        assert nn.Parameter(layer.weight.clone()).requires_grad
