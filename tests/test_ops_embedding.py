"""quantize_embedding, embedding and embedding_bag equal the reference bit for bit."""

import numpy as np
import pytest
import reference as ref
import torch
from compare import assert_same, widened
from drawn import DTYPES, LAYOUTS, ROWS, rows_of
from hypothesis import given
from hypothesis import strategies as st
from test_ops_environment import flushed_subnormals, rounding, threads

ops = torch.ops.dynquant
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MODES = ("sum", "mean", "max")
BITS = (8, 4)
WIDTHS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 63, 64, 65, 100, 127, 129, 300)
FINITE = [kind for kind in ROWS if kind not in ("NaN", "Inf", "-Inf", "overflowing range", "huge")]


def spanned(rows):
    """Finite values whose ranges fp32 holds, of FINITE ones: any magnitude comes near its end."""
    return rows.nan_to_num() / 4


def table(rng, count, dim, bits, kinds=("normal",)):
    """A float table, and the arguments by which the ops take its quantized form."""
    weight = spanned(rows_of(rng, count, dim, kinds))
    q, qparams = ref.quantize_embedding(weight.numpy(), bits)
    rows = torch.from_numpy(q if bits == 8 else ref.two_to_a_byte(q))
    return (q, qparams), (rows, torch.from_numpy(qparams), bits, dim)


class TestQuantize:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dim", WIDTHS)
    def test_every_width(self, isa, bits, dim):
        weight = torch.randn(5, dim, generator=torch.Generator().manual_seed(dim))
        q, qparams = ref.quantize_embedding(weight.numpy(), bits)
        rows, actual = ops.quantize_embedding(weight, bits)
        assert_same(rows, q if bits == 8 else ref.two_to_a_byte(q))
        assert_same(actual, qparams)

    @given(
        count=st.integers(0, 9),
        dim=st.sampled_from((*WIDTHS, 511, 512, 513, 1030)),
        bits=st.sampled_from(BITS),
        dtype=st.sampled_from(DTYPES),
        layout=st.sampled_from(list(LAYOUTS)),
        kinds=st.sampled_from([tuple(FINITE), *((kind,) for kind in FINITE)]),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_is_the_specification(self, isa, count, dim, bits, dtype, layout, kinds, seed):
        rows = rows_of(np.random.default_rng(seed), count, dim, kinds).to(dtype)
        weight = LAYOUTS[layout](spanned(rows))
        q, qparams = ref.quantize_embedding(widened(weight), bits)
        actual_rows, actual_qparams = ops.quantize_embedding(weight, bits)
        assert_same(actual_rows, q if bits == 8 else ref.two_to_a_byte(q))
        assert_same(actual_qparams, qparams)

    @pytest.mark.parametrize("bits", BITS)
    def test_error_is_half_a_step(self, bits):
        weight = torch.randn(50, 33)
        rows, qparams = ops.quantize_embedding(weight, bits)
        values = ops.embedding(torch.arange(50), rows, qparams, bits, 33, torch.float32)
        step = (weight.amax(1) - weight.amin(1)) / (2**bits - 1)
        assert (values - weight).abs().le(0.5001 * step[:, None]).all()

    def test_constant_rows_are_exact(self, isa):
        weight = torch.tensor([0.0, -0.0, 0.3, -7.25, 1e-40, 3e38])[:, None].expand(6, 21)
        for bits in BITS:
            rows, qparams = ops.quantize_embedding(weight, bits)
            values = ops.embedding(torch.arange(6), rows, qparams, bits, 21, torch.float32)
            assert torch.equal(values, weight)

    @pytest.mark.parametrize("row", [[np.nan], [np.inf], [-np.inf], [3e38, -3e38]])
    def test_rows_that_cannot_be_held(self, isa, row):
        for position in (0, 20, 37 - len(row)):
            weight = torch.ones(9, 37)
            weight[4, position : position + len(row)] = torch.tensor(row)
            with pytest.raises(RuntimeError, match="weight holds NaN or Inf.* in row 4"):
                ops.quantize_embedding(weight, 8)

    @pytest.mark.parametrize("bits", [0, 1, 2, 7, 16, -8])
    def test_bits(self, bits):
        with pytest.raises(RuntimeError, match="bits must be 8 or 4"):
            ops.quantize_embedding(torch.ones(2, 2), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_embedding_of_every_width(isa, bits, dim):
    rng = np.random.default_rng(dim)
    (q, qparams), arguments = table(rng, 40, dim, bits)
    for shape in ((), (0,), (1,), (70,), (2, 3, 4)):
        for index_dtype in (torch.int64, torch.int32):
            indices = torch.from_numpy(rng.integers(0, 40, shape)).to(index_dtype)
            actual = ops.embedding(indices, *arguments, torch.float32)
            assert_same(actual, ref.embedding(indices.numpy(), q, qparams), str(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_dtypes(isa, dtype):
    rng = np.random.default_rng(1)
    (q, qparams), arguments = table(rng, 30, 45, 8, tuple(FINITE))
    indices = torch.arange(30)
    actual = ops.embedding(indices, *arguments, dtype)
    assert actual.dtype == dtype
    assert_same(actual, ref.embedding(indices.numpy(), q, qparams, NAMES[dtype]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", WIDTHS)
def test_bags_of_every_width(isa, mode, bits, dim):
    rng = np.random.default_rng(dim)
    (q, qparams), arguments = table(rng, 40, dim, bits)
    indices = torch.from_numpy(rng.integers(0, 40, (4, 5)))
    actual = ops.embedding_bag(indices, *arguments, torch.float32, mode=MODES.index(mode))
    assert_same(actual, ref.embedding_bag(indices.tolist(), q, qparams, mode))


def bags_of(rng, sizes, count, padding_idx):
    """Indices bag by bag, every third of which is the padding."""
    bags = [rng.integers(0, count, size) for size in sizes]
    if padding_idx >= 0:
        bags = [np.where(rng.random(len(bag)) < 0.3, padding_idx, bag) for bag in bags]
    return [bag.astype(np.int64) for bag in bags]


@given(
    sizes=st.lists(st.sampled_from([0, 0, 1, 2, 3, 11, 30]), max_size=7),
    count=st.sampled_from([1, 2, 50]),
    dim=st.sampled_from(WIDTHS),
    bits=st.sampled_from(BITS),
    mode=st.sampled_from(MODES),
    kinds=st.sampled_from([("normal",), tuple(FINITE)]),
    weights_dtype=st.sampled_from([None, *DTYPES]),
    padding=st.booleans(),
    include_last=st.booleans(),
    index_dtype=st.sampled_from([torch.int64, torch.int32]),
    offset_dtype=st.sampled_from([torch.int64, torch.int32]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32 - 1),
)
def test_bags_are_the_specification(
    isa,
    sizes,
    count,
    dim,
    bits,
    mode,
    kinds,
    weights_dtype,
    padding,
    include_last,
    index_dtype,
    offset_dtype,
    dtype,
    seed,
):
    rng = np.random.default_rng(seed)
    (q, qparams), arguments = table(rng, count, dim, bits, kinds)
    padding_idx = int(rng.integers(count)) if padding else -1
    bags = bags_of(rng, sizes, count, padding_idx)
    ends = np.cumsum([0, *sizes])
    indices = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *bags])).to(index_dtype)
    weights = split = None
    if weights_dtype is not None and mode == "sum":
        weights = torch.from_numpy(rng.standard_normal(len(indices))).to(weights_dtype)
        split = np.split(widened(weights), ends[1:-1]) if sizes else []
    actual = ops.embedding_bag(
        indices,
        *arguments,
        dtype,
        torch.from_numpy(ends if include_last else ends[:-1]).to(offset_dtype),
        weights,
        MODES.index(mode),
        include_last,
        padding_idx,
    )
    expected = ref.embedding_bag(bags, q, qparams, mode, split, padding_idx, NAMES[dtype])
    assert_same(actual, expected)


@pytest.mark.parametrize("mode", MODES)
def test_bags_of_a_float_table_agree_with_torch(mode):
    rng = np.random.default_rng(0)
    weight = torch.randn(50, 20)
    rows, qparams = ops.quantize_embedding(weight, 8)
    values = ops.embedding(torch.arange(50), rows, qparams, 8, 20, torch.float32)
    indices = torch.from_numpy(rng.integers(0, 50, 37))
    offsets = torch.tensor([0, 0, 4, 4, 30])
    expected = torch.nn.functional.embedding_bag(indices, values, offsets, mode=mode, padding_idx=7)
    actual = ops.embedding_bag(
        indices, rows, qparams, 8, 20, torch.float32, offsets, None, MODES.index(mode), False, 7
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("mode", MODES)
def test_threads_and_state_of_the_caller(isa, mode):
    rng = np.random.default_rng(0)
    _, arguments = table(rng, 300, 130, 8, tuple(FINITE))
    indices = torch.from_numpy(rng.integers(0, 300, (90, 20)))

    def run():
        bag = ops.embedding_bag(indices, *arguments, torch.float32, mode=MODES.index(mode))
        return bag, ops.embedding(indices, *arguments, torch.float32)

    with threads(1):
        alone = run()
    for count in (2, 3, 7):
        with threads(count):
            again = run()
        assert_same(again[0], alone[0])
        assert_same(again[1], alone[1])
    with flushed_subnormals(), rounding(0x400):
        again = run()
    assert_same(again[0], alone[0])
    assert_same(again[1], alone[1])


class TestErrors:
    def arguments(self, **changes):
        _, (rows, qparams, bits, dim) = table(np.random.default_rng(0), 10, 6, 8)
        given = {
            "indices": torch.tensor([1, 2, 3, 4]),
            "rows": rows,
            "qparams": qparams,
            "bits": bits,
            "dim": dim,
            "dtype": torch.float32,
            "offsets": torch.tensor([0, 2]),
        }
        return given | changes

    @pytest.mark.parametrize("index", [-1, 10, 11, -(2**31), 2**31 - 1])
    @pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32])
    def test_index_out_of_range(self, index, index_dtype):
        for position in (0, 5, 99_999):
            indices = torch.zeros(100_000, dtype=index_dtype)
            indices[position] = index
            message = rf"indices must lie in \[0, 10\), found {index} at position {position}"
            with pytest.raises(RuntimeError, match=message):
                ops.embedding_bag(**self.arguments(indices=indices))
            arguments = self.arguments(indices=indices)
            del arguments["offsets"]
            with pytest.raises(RuntimeError, match=message):
                ops.embedding(**arguments)

    def test_index_beyond_32_bits(self):
        for index in (2**32 + 1, -(2**63), 2**63 - 1):
            with pytest.raises(RuntimeError, match=f"found {index} at position 1"):
                ops.embedding_bag(**self.arguments(indices=torch.tensor([1, index])))

    def test_table_without_rows(self):
        table = {"rows": torch.zeros(0, 6, dtype=torch.uint8), "qparams": torch.zeros(0, 2)}
        empty = torch.zeros(0, dtype=torch.int64)
        y = ops.embedding_bag(**self.arguments(indices=empty, offsets=torch.tensor([0, 0])) | table)
        assert_same(y, torch.zeros(2, 6))
        with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 0\)"):
            ops.embedding_bag(**self.arguments(**table))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"offsets": torch.tensor([1, 2])}, "offsets must begin with 0, got 1"),
            ({"offsets": torch.tensor([0, 3, 2])}, "offsets must not decrease.*found 3 before 2"),
            ({"offsets": torch.tensor([0, 5])}, "offsets must not"),
            ({"offsets": torch.tensor([0, -1])}, "offsets must not decrease"),
            ({"offsets": torch.tensor([[0, 2]])}, "offsets must have one dimension"),
            ({"offsets": torch.tensor([0.0])}, "offsets must have dtype int64, int32, got float32"),
            (
                {"offsets": torch.zeros(0, dtype=torch.int64), "include_last_offset": True},
                "offsets must have at least one element",
            ),
            ({"offsets": torch.tensor([7]), "include_last_offset": True}, "offsets must not exce"),
            ({"offsets": None}, "must come with offsets"),
            ({"indices": torch.ones(2, 2, dtype=torch.int64)}, "must come without offsets"),
            ({"indices": torch.ones(1, 2, 2, dtype=torch.int64)}, "indices must have one dim"),
            ({"mode": 3}, "mode must be 0"),
            ({"mode": -1}, "mode must be 0"),
            ({"padding_idx": 10}, "padding_idx must be -1 .*or lie in .0, 10., got 10"),
            ({"padding_idx": -2}, "padding_idx must be"),
            ({"bits": 5}, "bits must be 8 or 4, got 5"),
            ({"bits": 4}, r"rows must have the shape \[10, 3\] for dim = 6 at 4 bits"),
            ({"dim": -1}, "dim must be the width"),
            ({"dim": 2**62}, "dim must be the width"),
            ({"dtype": torch.float64}, "dtype must be float32"),
            ({"per_sample_weights": torch.ones(4), "mode": 1}, "per_sample_weights need mode 0"),
            ({"per_sample_weights": torch.ones(3)}, "per_sample_weights must have the shape"),
            ({"per_sample_weights": torch.ones(4).double()}, "per_sample_weights must have dtype"),
        ],
    )
    def test_other_arguments(self, changes, message):
        with pytest.raises(RuntimeError, match=message):
            ops.embedding_bag(**self.arguments(**changes))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("form", ["2-D", "offsets", "last offset", "weights"])
def test_opcheck(bits, form):
    _, arguments = table(np.random.default_rng(0), 20, 7, bits)
    indices = torch.arange(12)
    given = {
        "2-D": (indices.view(3, 4),),
        "offsets": (indices, torch.tensor([0, 2, 2])),
        "last offset": (indices, torch.tensor([0, 2, 2, 5]), None, 2, True, 3),
        "weights": (indices, torch.tensor([0, 7]), torch.rand(12)),
    }[form]
    arguments = (given[0], *arguments, torch.bfloat16, *given[1:])
    torch.library.opcheck(ops.embedding_bag.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_traced_without_a_break(dynamic):
    _, arguments = table(np.random.default_rng(0), 20, 7, 4)

    def function(indices, offsets):
        bag = ops.embedding_bag(indices, *arguments, torch.float32, offsets)
        return bag.sum() + ops.embedding(indices, *arguments, torch.float32).sum()

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for count in (3, 12, 20):
        indices, offsets = torch.arange(count), torch.arange(0, count, 2)
        assert_same(compiled(indices, offsets), function(indices, offsets))
