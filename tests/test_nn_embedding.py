"""dynquant.nn.Embedding and EmbeddingBag: their arithmetic, state, copies and moves."""

import copy
import pickle

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, assert_same_state, widened
from hypothesis import given
from hypothesis import strategies as st
from round_trips import FORMATS
from torch import nn

import dynquant
from dynquant import QConfig
from dynquant.nn import Embedding, EmbeddingBag

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
BITS = {8: torch.quint8, 4: torch.quint4x2}
INDICES = torch.tensor([[1, 2, 3], [0, 0, 9]])


def embedding(bits=8, dtype=torch.float32, dim=6, **arguments):
    float_module = nn.Embedding(10, dim, **arguments).to(dtype)
    return Embedding.from_float(float_module, QConfig(dtype=BITS[bits]))


def bag(bits=8, dtype=torch.float32, dim=6, **arguments):
    float_module = nn.EmbeddingBag(10, dim, **arguments).to(dtype)
    return EmbeddingBag.from_float(float_module, QConfig(dtype=BITS[bits]))


def assert_equal_modules(one, other):
    assert_same_state(one, other)
    assert_same(one(INDICES), other(INDICES))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [0, 1, 6, 7, 65])
def test_embedding_is_the_specification(dtype, bits, dim):
    float_module = nn.Embedding(10, dim, padding_idx=3).to(dtype)
    q, qparams = ref.quantize_embedding(widened(float_module.weight), bits)
    module = Embedding.from_float(float_module, QConfig(dtype=BITS[bits]))
    y = module(INDICES)
    assert y.dtype == dtype
    assert_same(y, ref.embedding(INDICES.numpy(), q, qparams, DTYPES[dtype]))
    assert_same(module(INDICES.int()), y)
    assert_same(module.weight_scale, qparams[:, 0])
    assert_same(module.weight_offset, qparams[:, 1])
    if dim and bits == 8:
        assert (module(torch.tensor(3)) == 0).all()  # the padding stays exactly zero


@given(
    sizes=st.lists(st.integers(0, 5), max_size=5),
    bits=st.sampled_from(list(BITS)),
    mode=st.sampled_from(["sum", "mean", "max"]),
    dtype=st.sampled_from(list(DTYPES)),
    padding=st.booleans(),
    include_last=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bag_is_the_specification(sizes, bits, mode, dtype, padding, include_last, weighted, seed):
    rng = np.random.default_rng(seed)
    float_module = nn.EmbeddingBag(
        10, 6, mode=mode, include_last_offset=include_last, padding_idx=4 if padding else None
    ).to(dtype)
    q, qparams = ref.quantize_embedding(widened(float_module.weight), bits)
    bags = [rng.integers(0, 10, size) for size in sizes]
    ends = np.cumsum([0, *sizes])
    indices = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *bags]))
    offsets = torch.from_numpy(ends if include_last else ends[:-1])
    weights = split = None
    if weighted and mode == "sum":
        weights = torch.randn(len(indices)).to(dtype)
        split = np.split(widened(weights), ends[1:-1]) if sizes else []
    module = EmbeddingBag.from_float(float_module, QConfig(dtype=BITS[bits]))
    padding_idx = 4 if padding else -1
    expected = ref.embedding_bag(bags, q, qparams, mode, split, padding_idx, DTYPES[dtype])
    y = module(indices, offsets, weights)
    assert y.dtype == dtype
    assert_same(y, expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bag_is_close_to_float(mode):
    torch.manual_seed(0)
    float_module = nn.EmbeddingBag(100, 32, mode=mode)
    indices, offsets = torch.randint(0, 100, (60,)), torch.tensor([0, 7, 7, 40])
    module = dynquant.quantize_dynamic(float_module, dtype=torch.quint8)
    torch.testing.assert_close(
        module(indices, offsets), float_module(indices, offsets).detach(), atol=0.1, rtol=0
    )
    assert_same(module(indices.view(6, 10)), module(indices, torch.arange(0, 60, 10)))


def test_bag_of_a_nested_input():
    module = bag(mode="sum")
    parts = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    expected = module(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2]))
    assert_same(module(nested), expected)
    weights = [torch.rand(2), torch.rand(3)]
    nested_weights = torch.nested.as_nested_tensor(weights, layout=torch.jagged)
    expected = module(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([0, 2]), torch.cat(weights))
    assert_same(module(nested, per_sample_weights=nested_weights), expected)


def test_max_norm_is_applied_once():
    float_module = nn.Embedding(10, 6, max_norm=0.5, norm_type=1.0)
    before = float_module.weight.detach().clone()
    module = Embedding.from_float(float_module)
    assert_same(float_module.weight.detach(), before)
    torch.testing.assert_close(module(INDICES), float_module(INDICES).detach(), atol=2e-3, rtol=0)
    assert module(torch.arange(10)).abs().sum(1).max() < 0.51


def test_settings_about_gradients_have_no_meaning():
    float_module = nn.Embedding(10, 6, scale_grad_by_freq=True, sparse=True)
    plain = nn.Embedding(10, 6)
    plain.weight = float_module.weight
    assert_equal_modules(Embedding.from_float(float_module), Embedding.from_float(plain))


def test_attributes_and_repr():
    module = embedding(4, padding_idx=-1)
    assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (10, 6, 9)
    assert repr(module) == "Embedding(10, 6, bits=4, padding_idx=9)"
    assert repr(bag(mode="max")) == "EmbeddingBag(10, 6, bits=8, mode=max)"
    assert not module.training


def test_bytes():
    def count_of_bytes(module):
        return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])

    float_module = nn.Embedding(1000, 64)
    for bits in BITS:
        module = Embedding.from_float(float_module, QConfig(dtype=BITS[bits]))
        assert count_of_bytes(module) == 1000 * (64 * bits // 8 + 8)


class TestErrors:
    @pytest.mark.parametrize(
        ("change", "config", "message"),
        [
            (torch.nan, torch.quint8, "words.weight holds NaN or Inf"),
            (-torch.inf, torch.quint8, "words.weight holds NaN or Inf"),
        ],
    )
    def test_weights(self, change, config, message):
        model = nn.ModuleDict({"words": nn.Embedding(10, 6)})
        model["words"].weight.data[2, 3] = change
        with pytest.raises(ValueError, match=message):
            dynquant.quantize_dynamic(model, dtype=config, inplace=True)
        assert type(model["words"]) is nn.Embedding

    def test_row_whose_range_overflows(self):
        model = nn.ModuleDict({"words": nn.Embedding(10, 6)})
        model["words"].weight.data[2, :2] = torch.tensor([3e38, -3e38])
        with pytest.raises(ValueError, match="words.weight.* row 2 spans more than fp32"):
            dynquant.quantize_dynamic(model, dtype=torch.quint8, inplace=True)
        assert type(model["words"]) is nn.Embedding

    def test_dtypes(self):
        with pytest.raises(ValueError, match="nn.Embedding: dtype is torch.qint8; allowed"):
            Embedding.from_float(nn.Embedding(2, 2), QConfig())
        with pytest.raises(ValueError, match="weight is torch.float64; allowed: torch.float32"):
            Embedding.from_float(nn.Embedding(2, 2).double())

    def test_calls(self):
        with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 10\), found 10 at"):
            embedding()(torch.tensor([3, 10]))
        with pytest.raises(RuntimeError, match="indices must have dtype int64, int32"):
            embedding()(torch.tensor([3.0]))
        with pytest.raises(RuntimeError, match="indices.* must come with offsets"):
            bag()(torch.tensor([3]))
        with pytest.raises(RuntimeError, match="per_sample_weights need mode 0"):
            bag(mode="mean")(torch.tensor([3]), torch.tensor([0]), torch.rand(1))
        weights = torch.rand(1, requires_grad=True)
        module = bag(mode="sum")
        with pytest.raises(RuntimeError, match="per_sample_weights ask for a gradient"):
            module(torch.tensor([3]), torch.tensor([0]), weights)
        with torch.no_grad():
            module(torch.tensor([3]), torch.tensor([0]), weights)


@pytest.mark.parametrize("make", [embedding, bag])
@pytest.mark.parametrize("bits", BITS)
class TestState:
    def test_dict_holds_plain_tensors(self, make, bits):
        state = make(bits, dim=7).state_dict()
        assert {key: (value.dtype, tuple(value.shape)) for key, value in state.items()} == {
            "weight_uint8": (torch.uint8, (10, 7 if bits == 8 else 4)),
            "weight_qparams": (torch.float32, (10, 2)),
            "version": (torch.int64, ()),
        }
        assert all(type(value) is torch.Tensor for value in state.values())

    @pytest.mark.parametrize("assign", [False, True])
    def test_loads(self, make, bits, assign):
        module, other = make(bits), make(bits)
        result = other.load_state_dict(module.state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert_equal_modules(module, other)

    @pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)
    def test_formats(self, make, bits, saved):
        module, other = make(bits), make(bits)
        other.load_state_dict(saved(module.state_dict()))
        assert_equal_modules(module, other)

    def test_errors_name_the_key(self, make, bits):
        module = nn.Sequential(make(bits))
        other = nn.Sequential(make(4 if bits == 8 else 8))
        with pytest.raises(RuntimeError, match=r"0.weight_uint8: expected the shape \[10, [36]\]"):
            module.load_state_dict(other.state_dict())
        state = module.state_dict()
        del state["0.weight_qparams"]
        with pytest.raises(RuntimeError, match="Missing key.*0.weight_qparams"):
            module.load_state_dict(state)

    def test_meta(self, make, bits):
        module = make(bits)
        with torch.device("meta"):
            other = make(bits)
        other.load_state_dict(module.state_dict(), assign=True)
        assert_equal_modules(module, other)
        assert not any(tensor.is_meta for tensor in [*other.parameters(), *other.buffers()])

    def test_copies(self, make, bits):
        module = make(bits)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert_equal_modules(module, other)
            assert other.weight.data_ptr() != module.weight.data_ptr()

    def test_casts_change_the_output_alone(self, make, bits):
        module = make(bits)
        before = copy.deepcopy(module)
        for dtype in DTYPES:
            y = module.to(dtype)(INDICES)
            assert y.dtype == dtype and next(module.parameters()).dtype == dtype
            assert_same(y, before(INDICES).to(dtype))
        assert_equal_modules(module.float(), before)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.bag = embedding(4, torch.bfloat16), bag(mode="mean", padding_idx=1)

        def forward(self, indices):
            return self.words(indices).sum(1) + self.bag(indices)

    model = Model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 4, 1):
        indices = torch.arange(rows * 2).view(rows, 2) % 10
        assert_same(compiled(indices), model(indices))


def test_export():
    model = nn.Sequential(embedding(), nn.ReLU()).eval()
    rows = torch.export.Dim("rows", min=2, max=64)
    program = torch.export.export(model, (INDICES,), dynamic_shapes=[{0: rows}])
    indices = torch.randint(0, 10, (9, 3))
    assert_same(program.module()(indices), model(indices))
