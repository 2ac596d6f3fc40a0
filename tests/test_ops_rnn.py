"""The recurrent ops give the bits of the reference, on every instruction set."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import op_arguments
import pytest
import reference_rnn as ref
import torch
from compare import assert_all_same, assert_same, widened
from drawn import DTYPES, LAYOUTS, ROWS, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from dynquant import _C

ops = torch.ops.dynquant
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
CELLS = tuple(GATES)
HALVES = (torch.bfloat16, torch.float16)
EXCEPTIONS = (RuntimeError, TypeError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Case:
    cell: str
    steps: int
    batch: int
    k: int
    size: int
    projected: int | None
    dtype: torch.dtype = torch.float32
    bias_dtypes: tuple = (torch.float32, torch.float32)
    packed: bool = False
    reverse: bool = False
    per_token: bool = True
    symmetric: bool = False
    per_channel: bool = True
    half: torch.dtype | None = None  # of 16-bit weights; None: int8 ones
    bits: int = 8
    # The kind of each product's weight, ih, hh and hr, in an op that mixes them: (per_token,
    # symmetric, bits) of int8, or a float dtype. None: all are alike.
    mixed: tuple | None = None
    layout: str = "contiguous"
    kinds: tuple = ("normal",)
    seed: int = 0

    @cached_property
    def rng(self):
        return np.random.default_rng(self.seed)

    @property
    def hidden(self):
        return self.size if self.projected is None else self.projected

    def weight(self, n, k, part):
        """Such that gates neither vanish nor saturate everywhere; int8 [n, k] with its scale."""
        half = self.half
        if self.mixed is not None:
            kind = self.kinds_of_products[part]
            half = kind if isinstance(kind, torch.dtype) else None
        if half is not None:
            values = self.rng.standard_normal((n, k)).astype(np.float32) / max(k, 1) ** 0.5
            return torch.from_numpy(values).to(half)
        weight = self.rng.integers(-127, 128, (n, k), dtype=np.int8)
        count = n if self.per_channel else 1
        scale = self.rng.uniform(0.5, 2, count) / 100 / max(k, 1) ** 0.5
        return torch.from_numpy(weight), torch.from_numpy(scale.astype(np.float32))

    def bias(self, dtype):
        if dtype is None:
            return None
        values = self.rng.standard_normal(GATES[self.cell] * self.size)
        return torch.from_numpy(values.astype(np.float32)).to(dtype)

    def state(self, size):
        values = self.rng.standard_normal((self.batch, size)).astype(np.float32)
        return torch.from_numpy(values).to(self.dtype)

    def x(self):
        lead = (self.steps, self.batch)
        if self.packed:
            sizes = -np.sort(-self.rng.integers(1, self.batch + 1, self.steps))
            sizes[0] = self.batch
            self.__dict__["batch_sizes"] = torch.from_numpy(sizes.astype(np.int64))
            lead = (int(sizes.sum()),)
        rows = rows_of(self.rng, int(np.prod(lead)), self.k, self.kinds)
        return LAYOUTS[self.layout](rows.reshape(*lead, self.k).to(self.dtype))

    @cached_property
    def arguments(self):
        """What both the op and the reference need, by name; weights are plain."""
        columns = GATES[self.cell] * self.size
        return {
            "x": self.x(),
            "h": self.state(self.hidden),
            "c": self.state(self.size) if self.cell == "lstm" else None,
            "weight_ih": self.weight(columns, self.k, "ih"),
            "bias_ih": self.bias(self.bias_dtypes[0]),
            "weight_hh": self.weight(columns, self.hidden, "hh"),
            "bias_hh": self.bias(self.bias_dtypes[1]),
            "weight_hr": None
            if self.projected is None
            else self.weight(self.hidden, self.size, "hr"),
            "batch_sizes": self.__dict__.get("batch_sizes"),
            "reverse": self.reverse,
            "per_token": self.per_token,
            "symmetric": self.symmetric,
            "bits": self.bits,
        }

    @property
    def kinds_of_products(self):
        return dict(zip(("ih", "hh", "hr"), self.mixed, strict=True))

    def expected(self):
        values = pytree.tree_map_only(torch.Tensor, widened, self.arguments)
        dtype = str(self.dtype).removeprefix("torch.")
        schemes = None if self.mixed is None else self.kinds_of_products
        results = ref.recurrent(self.cell, **values, dtype=dtype, schemes=schemes)
        return results if self.cell == "lstm" else results[:2]

    def run(self, **changes):
        op, arguments = self.call(**changes)
        return op(*arguments)

    def call(self, **changes):
        if self.mixed is not None:
            return call_mixed(self.cell, self.arguments | changes, self.mixed)
        return call(self.cell, self.arguments | changes)


def call(cell, a):
    """The op of a cell, and its arguments in order."""
    if isinstance(a["weight_ih"], torch.Tensor):
        return call_half(cell, a)
    ih, hh = ((ops.pack_weight(a[key][0]), a[key][1]) for key in ("weight_ih", "weight_hh"))
    arguments = (*ih, a["bias_ih"], *hh, a["bias_hh"])
    rest = (a["batch_sizes"], a["reverse"], a["per_token"], a["symmetric"], a["bits"])
    if cell == "lstm":
        hr = (None, None)
        if a["weight_hr"] is not None:
            hr = (ops.pack_weight(a["weight_hr"][0]), a["weight_hr"][1])
        return ops.lstm_dynamic.default, (a["x"], a["h"], a["c"], *arguments, *hr, *rest)
    if cell == "gru":
        return ops.gru_dynamic.default, (a["x"], a["h"], *arguments, *rest)
    relu = cell == "rnn_relu"
    return ops.rnn_dynamic.default, (a["x"], a["h"], *arguments, relu, *rest)


def call_mixed(cell, a, kinds):
    def held(name):
        weight = a[name]
        if isinstance(weight, tuple):
            return ops.pack_weight(weight[0]), weight[1]
        return weight, None

    arguments = (*held("weight_ih"), a["bias_ih"], *held("weight_hh"), a["bias_hh"])
    schemes = [(True, False, 8) if isinstance(kind, torch.dtype) else kind for kind in kinds]
    rest = (a["batch_sizes"], a["reverse"], *schemes[0], *schemes[1])
    if cell == "lstm":
        states = (a["h"], a["c"])
        arguments = (a["x"], *states, *arguments, *held("weight_hr"), *rest, *schemes[2])
        return ops.lstm_mixed.default, arguments
    if cell == "gru":
        return ops.gru_mixed.default, (a["x"], a["h"], *arguments, *rest)
    return ops.rnn_mixed.default, (a["x"], a["h"], *arguments, cell == "rnn_relu", *rest)


def call_half(cell, a):
    arguments = (a["weight_ih"], a["bias_ih"], a["weight_hh"], a["bias_hh"])
    rest = (a["batch_sizes"], a["reverse"])
    if cell == "lstm":
        states = (a["h"], a["c"])
        return ops.lstm_half.default, (a["x"], *states, *arguments, a["weight_hr"], *rest)
    if cell == "gru":
        return ops.gru_half.default, (a["x"], a["h"], *arguments, *rest)
    return ops.rnn_half.default, (a["x"], a["h"], *arguments, cell == "rnn_relu", *rest)


# Of one product's weight: int8 with per_token, symmetric and bits, or a float dtype.
KINDS = (
    *((True, False, 8), (True, False, 16), (False, True, 8), (False, False, 16)),
    *DTYPES,
)
MIXED = ((True, False, 16), torch.float32, (True, True, 8))


def cases():
    drawn = st.builds(
        Case,
        cell=st.sampled_from(CELLS),
        steps=st.sampled_from([1, 2, 3, 7, 20]),
        batch=st.sampled_from([0, 1, 2, 3, 7, 13]),
        k=st.sampled_from([0, 1, 4, 15, 33, 64, 65]),
        size=st.sampled_from([1, 3, 7, 8, 15, 16, 17, 31, 33, 48, 65]),
        projected=st.sampled_from([None, None, 1, 5, 17]),
        dtype=st.sampled_from(DTYPES),
        bias_dtypes=st.tuples(*[st.sampled_from([None, *DTYPES])] * 2),
        packed=st.booleans(),
        reverse=st.booleans(),
        per_token=st.booleans(),
        symmetric=st.booleans(),
        per_channel=st.booleans(),
        half=st.sampled_from([None, *HALVES]),
        bits=st.sampled_from([8, 8, 16]),
        mixed=st.one_of(st.none(), st.tuples(*[st.sampled_from(KINDS)] * 3)),
        layout=st.sampled_from(list(LAYOUTS)),
        kinds=st.sampled_from([("normal",), ("normal", "zero"), tuple(ROWS)]),
        seed=st.integers(0, 2**32 - 1),
    )
    return drawn.filter(
        lambda case: (
            (case.projected is None or case.cell == "lstm")
            and not (case.packed and not case.batch)
            and not (case.symmetric and case.bits == 16)
        )
    )


@settings(max_examples=300)
@given(case=cases())
def test_drawn(isa, case):
    results = case.run()
    assert all(result.is_contiguous() and result.dtype == case.dtype for result in results)
    assert_all_same(results, case.expected())


SPLIT = [(3, 1, 520, 300), (2, 40, 70, 260), (5, 200, 16, 33), (3, 2, 64, 1030)]


HELD = pytest.mark.parametrize("half", [None, torch.float16], ids=["int8", "float16"])
EACH = pytest.mark.parametrize(
    "held",
    [{}, {"half": torch.float16}, {"bits": 16}, {"mixed": MIXED}],
    ids=["int8", "float16", "16-bit activations", "mixed"],
)


@EACH
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("sizes", SPLIT, ids=str)
def test_any_number_of_threads(isa, cell, sizes, held):
    steps, batch, k, size = sizes
    projected = 130 if cell == "lstm" else None
    case = Case(cell, steps, batch, k, size, projected, kinds=("normal", "NaN"), **held)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results = case.run()
            if threads == 1:
                assert_all_same(results, case.expected())
                alone = results
            assert_all_same(results, alone, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@EACH
@pytest.mark.parametrize("cell", CELLS)
def test_long_sequences(isa, cell, held):
    """More steps than one product of inputs takes, in both directions."""
    for reverse in (False, True):
        case = Case(cell, 250, 3, 9, 18, None, packed=True, reverse=reverse, **held)
        assert_all_same(case.run(), case.expected())


@HELD
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_broken_row_is_alone(isa, cell, value, half):
    case = Case(cell, 6, 5, 20, 33, 9 if cell == "lstm" else None, half=half)
    whole = case.run()
    x = case.arguments["x"].clone()
    x[2, 3, 7] = value
    broken = case.run(x=x)
    others = torch.arange(5) != 3
    assert_same(broken[0][:, others], whole[0][:, others])
    assert_same(broken[0][:2], whole[0][:2])
    spread = half is None or np.isnan(value)  # float gates may saturate for Inf
    assert not spread or broken[0][2:, 3].isnan().all()
    for one, other in zip(broken[1:], whole[1:], strict=True):
        assert_same(one[others], other[others])
        assert not spread or one[3].isnan().all()


@EACH
@pytest.mark.parametrize("cell", CELLS)
def test_rows_alone_and_in_a_batch(isa, cell, held):
    case = Case(cell, 5, 9, 21, 34, 11 if cell == "lstm" else None, **held)
    whole = case.run()
    for row in range(9):
        changes = {
            key: None if case.arguments[key] is None else case.arguments[key][row : row + 1]
            for key in ("h", "c")
        }
        alone = case.run(x=case.arguments["x"][:, row : row + 1], **changes)
        assert_same(alone[0][:, 0], whole[0][:, row])
        for one, other in zip(alone[1:], whole[1:], strict=True):
            assert_same(one[0], other[row])


@EACH
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_in_two_parts(cell, held):
    case = Case(cell, 8, 3, 21, 34, 11 if cell == "lstm" else None, **held)
    whole, x = case.run(), case.arguments["x"]
    first = case.run(x=x[:3])
    states = dict(zip(("h", "c"), first[1:], strict=False))
    second = case.run(x=x[3:], **states)
    assert_same(torch.cat([first[0], second[0]]), whole[0])
    assert_all_same(second[1:], whole[1:])


class TestActivationFunctions:
    REAL = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}

    @staticmethod
    def values():
        every = np.arange(0, 2**32, 4099, dtype=np.uint32).view(np.float32)
        near = np.linspace(-20, 20, 300_001, dtype=np.float32)
        edges = [0.0, -0.0, np.inf, -np.inf, np.nan, 87.6, 87.7, 88, 89, 1e-45, 1e-39, 9.99, 10.01]
        return np.concatenate([every, near, np.float32(edges), -np.float32(edges)])

    @pytest.mark.parametrize("name", REAL)
    def test_are_the_reference(self, isa, name):
        x = self.values()
        expected = getattr(ref, name)(x)
        assert_same(torch.from_numpy(_C.activate(isa, name, x)), expected)
        for count in (0, 1, 7, 8, 9, 15, 16, 17, 31, 33):
            part = x[1000 : 1000 + count]
            assert_same(torch.from_numpy(_C.activate(isa, name, part)), getattr(ref, name)(part))

    @pytest.mark.parametrize("name", REAL)
    def test_are_close_to_the_real_functions(self, name):
        x = self.values()
        x = x[np.isfinite(x)]
        with np.errstate(all="ignore"):
            exact = self.REAL[name](x.astype(np.float64))
        error = np.abs(getattr(ref, name)(x) - exact)
        assert error.max() < 1.5e-7
        normal = np.abs(exact) > 2e-38
        units = error[normal] / np.spacing(np.abs(exact[normal]).astype(np.float32))
        assert units.max() < 2.6
        assert error[~normal].max(initial=0) < 1e-38

    def test_saturate(self):
        x = np.float32([-np.inf, -1e30, -100, -88, 20, 1e30, np.inf])
        assert_same(torch.from_numpy(ref.sigmoid(x)), np.float32([0, 0, 0, 0, 1, 1, 1]))
        assert_same(torch.from_numpy(ref.tanh(x)), np.float32([-1, -1, -1, -1, 1, 1, 1]))
        assert np.isnan(ref.sigmoid(np.float32([np.nan, -np.nan]))).all()
        assert np.isnan(ref.tanh(np.float32([np.nan, -np.nan]))).all()

    def test_other_functions_are_refused(self):
        with pytest.raises(ValueError, match="relu"):
            _C.activate("scalar", "relu", np.zeros(1, np.float32))


VARIANTS = {
    "plain": {},
    "projected": {"projected": 4},
    "without bias": {"bias_dtypes": (None, None)},
    "packed": {"packed": True},
    "bfloat16, reversed": {"dtype": torch.bfloat16, "reverse": True},
    "one scale": {"per_channel": False, "per_token": False, "symmetric": True},
    "16-bit activations": {"bits": 16},
    "mixed": {"mixed": MIXED},
    "mixed, projected": {"mixed": (torch.float32, *MIXED[:1], torch.bfloat16), "projected": 4},
    "mixed, projected in int8": {"mixed": MIXED, "projected": 4, "packed": True},
    "16-bit weights": {"half": torch.float16},
    "16-bit weights, projected": {"half": torch.bfloat16, "projected": 4},
    "16-bit weights, without bias": {"half": torch.bfloat16, "bias_dtypes": (None, None)},
    "16-bit weights, packed": {"half": torch.float16, "packed": True},
    "16-bit weights, bfloat16, reversed": {
        "half": torch.bfloat16,
        "dtype": torch.bfloat16,
        "reverse": True,
    },
}
VARIANTS_OF_CELLS = [
    (cell, name) for cell in CELLS for name in VARIANTS if "projected" not in name or cell == "lstm"
]


def variant(cell, name):
    return Case(
        **{"cell": cell, "steps": 4, "batch": 3, "k": 6, "size": 5, "projected": None}
        | VARIANTS[name]
    )


@pytest.mark.parametrize("cell, name", VARIANTS_OF_CELLS)
def test_opcheck(cell, name):
    op, arguments = variant(cell, name).call()
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("cell, name", VARIANTS_OF_CELLS)
def test_inference_is_the_same(cell, name):
    op, arguments = variant(cell, name).call()
    overload = getattr(ops, op._schema.name.split("::")[1]).inference
    assert_all_same(overload(*arguments), op(*arguments))


@pytest.mark.parametrize("cell, name", VARIANTS_OF_CELLS)
def test_fakes(cell, name):
    op, arguments = variant(cell, name).call()
    with FakeTensorMode() as mode:
        fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        results = op(*fakes)
    for fake, real in zip(results, op(*arguments), strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


FLOATS = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": lambda *sizes, **more: torch.nn.RNN(*sizes, nonlinearity="relu", **more),
}


@pytest.mark.parametrize("cell, name", VARIANTS_OF_CELLS)
def test_gradients_are_those_of_the_float_layer(cell, name):
    """With the dequantized weights; the two differ by what rounding moves the gates."""
    case = variant(cell, name)
    arguments = dict(case.arguments)
    inputs = [arguments[key] for key in ("x", "h", "c") if arguments[key] is not None]
    layer = FLOATS[cell](
        case.k, case.size, **({"proj_size": case.projected} if case.projected else {})
    )
    with torch.no_grad():
        for part in ("ih", "hh", "hr"):
            held = arguments.get(f"weight_{part}")
            if held is not None:
                if isinstance(held, tuple):
                    held = held[0] * held[1][:, None]
                getattr(layer, f"weight_{part}_l0").copy_(held)
            bias = arguments.get(f"bias_{part}")
            if part != "hr":
                getattr(layer, f"bias_{part}_l0").copy_(torch.tensor(0.0) if bias is None else bias)
    for one in inputs:
        one.requires_grad_()
    results = case.run()
    weights = [torch.randn_like(result) for result in results]
    found = torch.autograd.grad(results, inputs, weights)
    x, *states = (one.detach().float().requires_grad_() for one in inputs)
    given, batch_sizes = x, arguments["batch_sizes"]
    if case.reverse:
        given = x.flip(0)
    if batch_sizes is not None:
        given = torch.nn.utils.rnn.PackedSequence(given, batch_sizes)
    hx = [state[None] for state in states]
    y, last = layer(given, tuple(hx) if len(hx) > 1 else hx[0])
    y = y.data if batch_sizes is not None else y
    outputs = [y.flip(0) if case.reverse else y, *(last if len(hx) > 1 else [last])]
    loss = sum((o * w.float().view(o.shape)).sum() for o, w in zip(outputs, weights, strict=True))
    expected = torch.autograd.grad(loss, [x, *states])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == case.dtype
        torch.testing.assert_close(one.float(), other, rtol=0.05, atol=0.05)


@HELD
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_casts_inputs_and_states(cell, half):
    case = Case(cell, 4, 3, 6, 5, None, half=half)
    with torch.autocast("cpu", torch.bfloat16):
        results = case.run()
    states = {key: case.arguments[key] for key in ("x", "h", "c")}
    cast = {key: None if one is None else one.bfloat16() for key, one in states.items()}
    assert_all_same(results, case.run(**cast))


class Refusals:
    """An lstm op, called with one argument that is wrong.

    Attributes:
        CASE: a call without an error.
        ARGUMENTS: the names of its arguments.
    """

    CASE = None
    ARGUMENTS = ()

    def named(self, **changed):
        _, arguments = self.CASE.call()
        return dict(zip(self.ARGUMENTS, arguments, strict=True)) | changed

    def refused(self, argument, value, text=None):
        op, _ = self.CASE.call()
        with pytest.raises(EXCEPTIONS, match=text or rf"\b{argument}\b") as error:
            op(*self.named(**{argument: value}).values())
        assert len(str(error.value)) > len(argument) + 10

    def refused_by_the_fake(self, argument, value, text=None):
        op, _ = self.CASE.call()
        arguments = tuple(self.named(**{argument: value}).values())
        with FakeTensorMode() as mode, pytest.raises(Exception, match=text or argument):
            op(*pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments))

    def test_names_of_the_arguments(self):
        op, _ = self.CASE.call()
        assert tuple(argument.name for argument in op._schema.arguments) == self.ARGUMENTS
        kind = op.name().partition("_")[2].partition(".")[0]
        for cell in ("lstm", "gru", "rnn"):
            assert "Raises:" in getattr(ops, f"{cell}_{kind}").__doc__


class TestErrors(Refusals):
    CASE = Case("lstm", 4, 3, 6, 5, 2)
    ARGUMENTS = (
        *("x", "h0", "c0", "packed_ih", "weight_scale_ih", "bias_ih"),
        *("packed_hh", "weight_scale_hh", "bias_hh", "packed_hr", "weight_scale_hr"),
        *("batch_sizes", "reverse", "per_token", "symmetric", "activation_bits"),
    )

    @pytest.mark.parametrize("argument", ARGUMENTS[:12])
    def test_dtypes(self, argument):
        held = self.named()[argument]
        shape = (4,) if held is None else held.shape
        for dtype in (torch.float64, torch.int16, torch.bool, torch.complex64):
            self.refused(argument, torch.zeros(shape, dtype=dtype))

    @pytest.mark.parametrize("argument", ["h0", "c0"])
    def test_states_have_the_dtype_of_x(self, argument):
        self.refused(argument, torch.zeros(3, 5, dtype=torch.bfloat16))

    @pytest.mark.parametrize(
        ("argument", "shapes"),
        [
            ("x", [(), (4,), (4, 3), (1, 4, 3, 6), (4, 3, 5), (4, 3, 7), (0, 3, 6)]),
            ("h0", [(), (2,), (2, 2), (4, 2), (3, 1), (3, 3), (1, 3, 2)]),
            ("c0", [(), (5,), (2, 5), (4, 5), (3, 4), (3, 6), (1, 3, 5)]),
            ("weight_scale_ih", [(), (0,), (19,), (21,), (20, 1)]),
            ("weight_scale_hh", [(), (0,), (19,), (21,), (20, 1)]),
            ("weight_scale_hr", [(), (0,), (3,), (5,), (2, 1)]),
            ("bias_ih", [(), (1,), (19,), (21,), (20, 1)]),
            ("bias_hh", [(), (1,), (19,), (21,), (20, 1)]),
        ],
    )
    def test_shapes(self, argument, shapes):
        for shape in shapes:
            # Sizes that contradict each other can be laid to either's charge.
            text = {"h0": "h0|packed", "c0": "c0|packed", "x": "x|h0"}.get(argument)
            self.refused(argument, torch.zeros(shape), text)

    @pytest.mark.parametrize("part, n, k", [("ih", 20, 6), ("hh", 20, 2), ("hr", 2, 5)])
    def test_packed_weights(self, part, n, k):
        for other in ((n + 1, k), (n - 1, k), (n, k + 1), (n, k - 1), (k, n)):
            packed = ops.pack_weight(torch.zeros(other, dtype=torch.int8))
            self.refused(f"packed_{part}", packed, f"packed_{part}|weight_scale_{part}")
        for size in (0, 10, 64, 4096):
            self.refused(f"packed_{part}", torch.zeros(size, dtype=torch.int8))

    @pytest.mark.parametrize(
        "sizes", [[], [3, 3], [3, 3, 3, 4], [0, 12], [12], [3, 3, 3, 2], [-3, 15], [3, 4, 3, 2]]
    )
    def test_batch_sizes(self, sizes):
        op, _ = self.CASE.call()
        batch_sizes = torch.tensor(sizes, dtype=torch.int64)
        with pytest.raises(EXCEPTIONS, match="batch_sizes|h0"):
            op(*self.named(x=torch.zeros(12, 6), batch_sizes=batch_sizes).values())

    def test_half_of_a_projection(self):
        self.refused("packed_hr", None, "packed_hr and weight_scale_hr")
        self.refused("weight_scale_hr", None, "packed_hr and weight_scale_hr")

    @pytest.mark.parametrize("argument", ARGUMENTS[:11])
    def test_other_devices(self, argument):
        held = self.named()[argument]
        self.refused(argument, held.to("meta"), "device|meta|Meta|cpu|CPU")
        self.refused(argument, held.to_sparse(), "(?i)sparse")

    def test_a_fake_refuses_as_well(self):
        for argument, value in {
            "x": torch.zeros(4, 3, 6, dtype=torch.float64),
            "h0": torch.zeros(2, 2),
            "packed_hh": torch.zeros(99, dtype=torch.int8),
            "bias_ih": torch.zeros(7),
        }.items():
            self.refused_by_the_fake(argument, value)


class TestErrorsOf16BitWeights(Refusals):
    CASE = Case("lstm", 4, 3, 6, 5, 2, half=torch.float16)
    ARGUMENTS = (
        *("x", "h0", "c0", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr"),
        *("batch_sizes", "reverse"),
    )

    def refused(self, argument, value, text=None):
        super().refused(argument, value, text)
        self.refused_by_the_fake(argument, value, text)

    @pytest.mark.parametrize("part", ["ih", "hh", "hr"])
    def test_weights(self, part):
        name = f"weight_{part}"
        held = self.CASE.arguments[name]
        for dtype in (torch.float32, torch.float64, torch.int8):
            self.refused(name, held.to(dtype))
        for shape in ((), (3,), (*held.shape, 1)):
            self.refused(name, torch.zeros(shape, dtype=torch.float16))
        n, k = held.shape
        for shape in ((n + 1, k), (n - 1, k), (n, k + 1), (n, k - 1)):
            # Sizes that contradict each other can be laid to either's charge.
            self.refused(name, torch.zeros(shape, dtype=torch.float16), f"{name}|bias|x|h0")

    @pytest.mark.parametrize("part", ["ih", "hh"])
    def test_biases(self, part):
        for shape in ((), (1,), (19,), (21,), (20, 1)):
            self.refused(f"bias_{part}", torch.zeros(shape))
        self.refused(f"bias_{part}", torch.zeros(20, dtype=torch.float64))

    @pytest.mark.parametrize("argument", ARGUMENTS[:8])
    def test_other_devices(self, argument):
        held = self.named()[argument]
        self.refused(argument, held.to("meta"), "device|meta|Meta|cpu|CPU")


class TestErrorsOfMixedWeights(Refusals):
    CASE = Case("lstm", 4, 3, 6, 5, 2, mixed=MIXED)
    ARGUMENTS = op_arguments.RECURRENT["lstm_mixed"]

    def refused(self, argument, value, text=None):
        super().refused(argument, value, text)
        self.refused_by_the_fake(argument, value, text)

    def test_weights(self):
        for part in ("ih", "hh", "hr"):
            name = f"weight_{part}"
            for dtype in (torch.float64, torch.int32):
                self.refused(name, torch.zeros(20, 6, dtype=dtype))
        # What has a scale is a packed weight, and what has none is a float one.
        self.refused("weight_scale_ih", None, "weight_ih")
        self.refused("weight_scale_hh", torch.ones(20), "weight_hh")
        self.refused("weight_hr", None, "weight_scale_hr")

    @pytest.mark.parametrize("part", ["ih", "hh", "hr"])
    def test_bits(self, part):
        self.refused(f"activation_bits_{part}", 12)
        op, _ = self.CASE.call()
        changed = {f"activation_bits_{part}": 16, f"symmetric_{part}": True}
        with pytest.raises(RuntimeError, match=f"activation_bits_{part}"):
            op(*self.named(**changed).values())
