"""The float functions, linear_block and feed_forward: equal to the reference and to their parts."""

import numpy as np
import pytest
import reference as ref
import reference_float
import torch
from compare import assert_same, widened
from drawn import DTYPES, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from dynquant.ops.blocks import ACTIVATIONS, NORMS

ops = torch.ops.dynquant


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def parameters(case, count):
    """What a norm takes: two vectors of any float dtype, or None."""
    rng = case.rng
    for _ in range(2):
        values = torch.from_numpy(rng.standard_normal(count).astype(np.float32))
        yield None if rng.random() < 0.3 else values.to(DTYPES[rng.integers(3)])


@settings(max_examples=80)
@given(case=cases(), function=st.sampled_from(list(ACTIVATIONS)))
def test_activation(isa, case, function):
    x = case.activation()
    y = ops.activation(x, ACTIVATIONS[function])
    assert y.dtype == x.dtype
    assert_same(y, reference_float.activation(widened(x), function, name_of(x.dtype)))


@settings(max_examples=80)
@given(
    case=cases(),
    eps=st.sampled_from([0.0, 1e-12, 1e-5, 0.1]),
    plus_one=st.sampled_from([False, True]),
)
def test_norms(isa, case, eps, plus_one):
    x = case.activation()
    weight, bias = parameters(case, case.k)
    arguments = [None if v is None else widened(v) for v in (weight, bias)]
    dtype = name_of(x.dtype)
    with np.errstate(all="ignore"):
        expected = reference_float.layer_norm(widened(x), *arguments, eps, dtype)
        assert_same(ops.layer_norm(x, weight, bias, eps), expected)
        expected = reference_float.rms_norm(widened(x), arguments[0], eps, dtype, plus_one)
        assert_same(ops.rms_norm(x, weight, eps, plus_one), expected)


def drawn_indices(rng, rows, shape):
    drawn = torch.from_numpy(rng.integers(0, rows, shape))
    return drawn.int() if rng.random() < 0.3 else drawn


@settings(max_examples=60)
@given(seed=st.integers(0, 1 << 32))
def test_embedding_sum(isa, threads, seed):
    rng = np.random.default_rng(seed)
    k, length = int(rng.choice([1, 7, 16, 48, 100])), int(rng.choice([0, 1, 5, 40]))
    shape = [(length,), (3, length), (2, 1, length)][rng.integers(3)]
    dtype = DTYPES[rng.integers(3)]

    def table(rows):
        values = torch.from_numpy(rng.standard_normal((rows, k)).astype(np.float32)).to(dtype)
        if rng.random() < 0.2:
            values[0, 0] = np.nan
        return values if rng.random() < 0.7 else values.repeat(1, 2)[:, :k]

    words, types, positions = table(9), table(2), table(length + 2)
    indices, type_indices = drawn_indices(rng, 9, shape), drawn_indices(rng, 2, shape)
    expected = words[indices.long()]
    kind = rng.integers(3)
    if kind == 0:
        types = type_indices = None
    elif kind == 1:
        type_indices, expected = None, expected + types[0]
    else:
        expected = expected + types[type_indices.long()]
    if rng.random() < 0.3:
        positions = None
    else:
        expected = expected + positions[:length]
    norm = drawn_norm(rng, k)
    found = ops.embedding_sum(indices, words, type_indices, types, positions, *norm)
    assert_same(found, normalized(expected, *norm))


class TestEmbeddingSum:
    def test_indices_outside(self):
        table = torch.zeros(3, 4)
        for wrong in (3, -1, 1 << 40):
            with pytest.raises(RuntimeError, match=rf"indices must lie in \[0, 3\), found {wrong}"):
                ops.embedding_sum(torch.tensor([0, wrong]), table)
            with pytest.raises(RuntimeError, match=r"type_indices must lie in \[0, 3\)"):
                ops.embedding_sum(torch.tensor([0, 0]), table, torch.tensor([0, wrong]), table)

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"type_table": None}, "type_indices are given without type_table"),
            ({"type_table": torch.zeros(0, 4)}, "type_table must have a row"),
            ({"type_table": torch.zeros(2, 5)}, "type_table must have K = 4"),
            ({"type_table": torch.zeros(2, 4).half()}, "type_table"),
            ({"type_indices": torch.zeros(3, dtype=torch.int64)}, "type_indices must have the sh"),
            ({"position_table": torch.zeros(1, 4)}, "position_table must have a row for each of 2"),
            ({"norm": 4}, "norm must be 0"),
            ({"norm_weight": torch.ones(4)}, "norm_weight and norm_bias belong to a norm"),
        ],
    )
    def test_errors(self, changes, message):
        indices = torch.tensor([0, 1])
        values = {"type_indices": indices, "type_table": torch.zeros(2, 4)} | changes
        with pytest.raises(RuntimeError, match=message):
            ops.embedding_sum(indices, torch.zeros(3, 4), **values)


@settings(max_examples=80)
@given(case=cases())
def test_softmax(isa, case):
    x = case.activation()
    with np.errstate(all="ignore"):
        assert_same(ops.softmax(x), reference_float.softmax(widened(x), name_of(x.dtype)))


class TestAccuracy:
    """Against float64, over values that lie densely where the functions do something."""

    @staticmethod
    def values():
        every = np.arange(0, 2**32, 4099, dtype=np.uint32).view(np.float32)
        near = np.linspace(-9, 9, 3_000_001, dtype=np.float32)
        values = np.concatenate([every, near])
        return values[np.isfinite(values) & (np.abs(values) < 1e30)]

    def test_gelu(self):
        x = torch.from_numpy(self.values())
        y = ops.activation(x, ACTIVATIONS["gelu"]).double()
        exact = x.double() * torch.special.ndtr(x.double())
        error = (y - exact).abs()
        assert (error / x.abs().clamp(min=1)).max() < 1e-7
        above = (x > 0) & (exact > 2e-38)
        units = error[above].numpy() / np.spacing(exact[above].float().numpy())
        assert units.max() < 2.5

    @pytest.mark.parametrize("function", ["gelu", "gelu_tanh", "silu", "relu", "quick_gelu"])
    def test_functions_of_torch(self, function):
        x = torch.from_numpy(self.values())
        real = {
            "gelu": torch.nn.functional.gelu,
            "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
            "silu": torch.nn.functional.silu,
            "relu": torch.relu,
            "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
        }[function]
        error = (ops.activation(x, ACTIVATIONS[function]).double() - real(x.double())).abs()
        assert (error / x.abs().clamp(min=1)).max() < 3e-7

    def test_norms_and_softmax(self):
        torch.manual_seed(0)
        x, weight, bias = torch.randn(200, 777) * 3 + 1, torch.randn(777), torch.randn(777)
        functional = torch.nn.functional
        torch.testing.assert_close(
            ops.layer_norm(x, weight, bias), functional.layer_norm(x, (777,), weight, bias)
        )
        torch.testing.assert_close(
            ops.rms_norm(x, weight), functional.rms_norm(x, (777,), weight, 1e-6)
        )
        torch.testing.assert_close(ops.softmax(x), x.softmax(-1))

    def test_softmax_of_masked_rows(self):
        masked = torch.tensor([[-torch.inf] * 5, [0.0, -torch.inf, 1.0, -torch.inf, -1e30]])
        assert ops.softmax(masked)[0].isnan().all()
        torch.testing.assert_close(ops.softmax(masked)[1], masked[1].softmax(-1))


def weights(rng, n, k, bias):
    """packed, weight_scale, bias."""
    weight = torch.from_numpy(rng.standard_normal((n, k)).astype(np.float32))
    quantized, scale = ops.quantize_weight(weight)
    values = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    return ops.pack_weight(quantized), scale, values if bias else None


def norm_of(rng, n, norm):
    if not norm:
        return 0, None, None, 0.0
    weight = torch.from_numpy(rng.standard_normal(n).astype(np.float32))
    bias = weight.flip(0).contiguous() if norm == NORMS["layer"] else None
    return norm, weight, bias, 1e-5


def drawn_norm(rng, n):
    return norm_of(rng, n, int(rng.integers(len(NORMS))))


def normalized(x, norm, weight, bias, eps):
    if norm == NORMS["layer"]:
        return ops.layer_norm(x, weight, bias, eps)
    return ops.rms_norm(x, weight, eps, norm == NORMS["rms_plus_one"]) if norm else x


def ended(y, residual, norm, residual_last):
    """A block's last steps."""
    if residual is None:
        return normalized(y, *norm)
    return residual + normalized(y, *norm) if residual_last else normalized(residual + y, *norm)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn_scheme(rng):
    """per_token, symmetric, activation_bits."""
    per_token = bool(rng.random() < 0.7)
    return (per_token, *((False, 8), (True, 8), (False, 16))[rng.integers(3)])


def drawn_residual(rng, x, n):
    """A tensor for a block's residual, or None."""
    if rng.random() < 0.5:
        return None
    values = rng.standard_normal((*x.shape[:-1], n)).astype(np.float32)
    return torch.from_numpy(values).to(x.dtype)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_linear_block_is_its_parts(isa, threads, seed):
    rng = np.random.default_rng(seed)
    m, n, k = (
        int(rng.choice(sizes))
        for sizes in ((0, 1, 3, 17, 97, 200), (0, 1, 15, 64, 70, 257), (0, 5, 64, 100))
    )
    x = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32))
    x = x.to(DTYPES[rng.integers(3)])
    if x.numel() and rng.random() < 0.2:
        x[rng.integers(m), 0] = np.nan
    x = x[:, None] if rng.random() < 0.5 else x
    weight = weights(rng, n, k, rng.random() < 0.5)
    function, residual = int(rng.integers(len(ACTIVATIONS))), drawn_residual(rng, x, n)
    before, after = drawn_norm(rng, k), drawn_norm(rng, n)
    schemes, last = drawn_scheme(rng), bool(rng.random() < 0.3)
    y = ops.linear_block(x, *weight, function, residual, *before, *after, *schemes, last)
    expected = ops.linear_dynamic(normalized(x, *before), *weight, *schemes)
    expected = ops.activation(expected, function)
    assert y.dtype == x.dtype
    assert_same(y, ended(expected, residual, after, last))


def test_linear_block_is_the_reference(isa):
    """Bits of all steps at once, without any op, in rows and columns around the tiles' edges."""
    rng = np.random.default_rng(2)
    for m, n, k in ((1, 65, 33), (7, 1, 64), (50, 130, 5)):
        x, residual = (rng.standard_normal(s).astype(np.float32) for s in ((m, k), (m, n)))
        q, scale = ref.quantize_weight(rng.standard_normal((n, k)).astype(np.float32))
        normed = reference_float.rms_norm(x, None, 1e-6)
        y = residual + reference_float.gelu(ref.linear_dynamic(normed, q, scale, None))
        expected = reference_float.layer_norm(y, None, None, 1e-5)
        rms_norm, layer_norm = (NORMS["rms"], None, None, 1e-6), (NORMS["layer"], None, None, 1e-5)
        packed, scale = ops.pack_weight(torch.from_numpy(q)), torch.from_numpy(scale)
        x, residual = torch.from_numpy(x), torch.from_numpy(residual)
        y = ops.linear_block(x, packed, scale, None, 1, residual, *rms_norm, *layer_norm)
        assert_same(y, expected)


@pytest.mark.parametrize("m", [300, 1000])
def test_linear_block_in_many_blocks(isa, threads, m):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((m, 384)).astype(np.float32))
    weight, norm = weights(rng, 1536, 384, True), norm_of(rng, 1536, NORMS["layer"])
    no_norm = norm_of(rng, 384, 0)
    y = ops.linear_block(x, *weight, ACTIVATIONS["gelu"], None, *no_norm, *norm)
    hidden = ops.activation(ops.linear_dynamic(x, *weight), ACTIVATIONS["gelu"])
    assert_same(y, normalized(hidden, *norm))


def composed(x, up, gate, down, function, split, residual, before, after, schemes, last=False):
    """feed_forward as one op after the other."""

    def linear(x, weight):
        return ops.linear_dynamic(x, *weight, *schemes)

    normed = normalized(x, *before)
    hidden = linear(normed, up)
    if gate is not None:
        hidden = ops.activation(linear(normed, gate), function) * hidden
    elif split:
        first, second = hidden.chunk(2, -1)
        first, second = (first, second) if split == 1 else (second, first)
        hidden = ops.activation(first, function) * second
    else:
        hidden = ops.activation(hidden, function)
    y = linear(hidden, down)
    return ended(y, residual, after, last)


def drawn_block(seed):
    rng = np.random.default_rng(seed)
    m, k, n = (int(rng.choice(sizes)) for sizes in ((0, 1, 3, 17, 97), (5, 64, 100), (1, 64, 70)))
    f = int(rng.choice([3, 64, 130, 256]))
    kind, dtype = rng.choice(["plain", "gate", "split 1", "split 2"]), DTYPES[rng.integers(3)]
    split = int(kind[-1]) if kind.startswith("split") else 0
    x = torch.from_numpy(rng.standard_normal((m, k)).astype(np.float32)).to(dtype)
    if m and rng.random() < 0.2:
        x[rng.integers(m), 0] = np.nan
    return {
        "x": x if rng.random() < 0.5 else x[None],
        "up": weights(rng, 2 * f if split else f, k, rng.random() < 0.5),
        "gate": weights(rng, f, k, rng.random() < 0.5) if kind == "gate" else None,
        "down": weights(rng, n, f, rng.random() < 0.5),
        "function": int(rng.integers(len(ACTIVATIONS))),
        "split": split,
        "residual": None,
        "before": drawn_norm(rng, k),
        "after": drawn_norm(rng, n),
        "schemes": drawn_scheme(rng),
        "last": bool(rng.random() < 0.3),
    }, rng


def fused(x, up, gate, down, function, split, residual, before, after, schemes, last=False):
    gate = gate if gate is not None else (None, None, None)
    return ops.feed_forward(
        x, *up, *gate, *down, function, split, residual, *before, *after, *schemes, last
    )


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_feed_forward_is_its_parts(isa, threads, seed):
    block, rng = drawn_block(seed)
    block["residual"] = drawn_residual(rng, block["x"], block["down"][1].numel())
    assert_same(fused(**block), composed(**block))


@pytest.mark.parametrize("m", [300, 1000])
def test_feed_forward_in_many_blocks(isa, threads, m):
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((m, 384)).astype(np.float32))
    block = {
        "x": x,
        "up": weights(rng, 1536, 384, True),
        "gate": None,
        "down": weights(rng, 384, 1536, True),
        "function": ACTIVATIONS["gelu"],
        "split": 0,
        "residual": x,
        "before": norm_of(rng, 384, 0),
        "after": norm_of(rng, 384, NORMS["layer"]),
        "schemes": (True, False, 8),
    }
    assert_same(fused(**block), composed(**block))


def test_feed_forward_is_the_reference(isa):
    """Bits of all steps at once, without any op."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((5, 33)).astype(np.float32)
    up, down = (
        ref.quantize_weight(rng.standard_normal(shape).astype(np.float32))
        for shape in ((50, 33), (33, 50))
    )
    hidden = reference_float.gelu(ref.linear_dynamic(x, *up, None))
    y = x + ref.linear_dynamic(hidden, *down, None)
    expected = reference_float.layer_norm(y, None, None, 1e-5)
    packed = [
        (ops.pack_weight(torch.from_numpy(q)), torch.from_numpy(scale), None)
        for q, scale in (up, down)
    ]
    x = torch.from_numpy(x)
    layer_norm = (NORMS["layer"], None, None, 1e-5)
    result = fused(
        x, packed[0], None, packed[1], 1, 0, x, norm_of(rng, 33, 0), layer_norm, (True, False, 8)
    )
    assert_same(result, expected)


def test_the_batch_changes_nothing(isa):
    block, _ = drawn_block(3)
    block |= {"x": torch.randn(20, block["x"].shape[-1]), "schemes": (True, False, 8)}
    whole = fused(**block)
    for row in range(20):
        assert_same(fused(**block | {"x": block["x"][row : row + 1]})[0], whole[row])


@pytest.mark.parametrize("m", [1, 2, 5, 8, 9])
def test_wide_feed_forward_of_few_rows(isa, threads, m):
    """Weights that were not read before count as far: threads take part after part of them."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((m, 100)).astype(np.float32))
    for schemes in ((True, False, 8), (False, False, 8), (True, False, 16)):
        block = {
            "x": x,
            "up": weights(rng, 4700, 100, True),
            "gate": weights(rng, 4700, 100, False),
            "down": weights(rng, 2100, 4700, True),
            "function": ACTIVATIONS["silu"],
            "split": 0,
            "residual": None,
            "before": norm_of(rng, 100, NORMS["rms"]),
            "after": norm_of(rng, 2100, 0),
            "schemes": schemes,
        }
        far, near = fused(**block), fused(**block)
        assert_same(far, near)
        assert_same(far, composed(**block))
