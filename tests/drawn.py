"""Drawn test cases: shapes around every tile edge, memory layouts, dtypes and awkward values."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from hypothesis import strategies as st

ROW_COUNTS = (0, 1, 2, 3, 5, 6, 7, 8, 11, 12, 13, 17, 47, 48, 49, 50, 51, 95, 96, 97)
COLUMN_COUNTS = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000)
DEPTHS = (0, 1, 3, 4, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1000)
MOST_PRODUCTS = 2_000_000  # keeps a drawn case in milliseconds on the scalar kernel
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _at(values, position, value):
    if values.size:
        values[position % values.size] = value
    return values


def _ties(rng, k):
    """Halves over a range of 255, where 1 / scale is 1 and nothing but the tie rule decides."""
    values = rng.integers(-100, 155, k) + 0.5
    return _at(_at(values, 0, -100), 1, 155)


ROWS = {
    "normal": lambda rng, k: rng.standard_normal(k),
    "positive": lambda rng, k: np.abs(rng.standard_normal(k)),
    "negative": lambda rng, k: -np.abs(rng.standard_normal(k)),
    "small": lambda rng, k: rng.standard_normal(k) * 10.0 ** rng.uniform(-8, -3),
    "any magnitude": lambda rng, k: rng.standard_normal(k) * 10.0 ** rng.uniform(-44, 38, k),
    "zero": lambda rng, k: np.zeros(k),
    "negative zero": lambda rng, k: np.full(k, -0.0),
    "constant": lambda rng, k: np.full(k, rng.standard_normal()),
    "ties": _ties,
    "huge": lambda rng, k: rng.choice([1e38, -1e38, 1.7e38], k),
    "overflowing range": lambda rng, k: rng.choice([3e38, -3e38], k),
    "scale near the least": lambda rng, k: rng.uniform(7e-37, 8e-37, k) * rng.choice([1, 0.5]),
    "weight scale near the least": lambda rng, k: rng.uniform(1.4e-36, 1.6e-36, k),
    "symmetric scale near the least": lambda rng, k: rng.uniform(-4e-37, 4e-37, k),
    "subnormal": lambda rng, k: rng.standard_normal(k) * 1e-40,
    "NaN": lambda rng, k: _at(rng.standard_normal(k), rng.integers(1 << 20), np.nan),
    "Inf": lambda rng, k: _at(rng.standard_normal(k), rng.integers(1 << 20), np.inf),
    "-Inf": lambda rng, k: _at(rng.standard_normal(k), rng.integers(1 << 20), -np.inf),
}


def rows_of(rng, count, k, kinds):
    """[count, k] whose every row is of a kind drawn from `kinds`."""
    drawn = rng.choice(np.array(kinds, dtype=object), count)
    rows = [ROWS[kind](rng, k) for kind in drawn]
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(count, k))


def _strided(x, axis, step):
    shape = list(x.shape)
    shape[axis] *= step
    spread = torch.full(shape, 77, dtype=x.dtype)  # what lies between is not zero
    index = [slice(None)] * x.ndim
    index[axis] = slice(step - 1, None, step)
    view = spread[tuple(index)]
    return view.copy_(x)


def _offset(x):
    buffer = torch.full((x.numel() + 5,), 77, dtype=x.dtype)
    return buffer[3 : 3 + x.numel()].view(x.shape).copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "offset": _offset,
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "first axis last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
    "every third value": lambda x: _strided(x, -1, 3),
    "every second row": lambda x: _strided(x, 0, 2),
    "padded rows": lambda x: torch.nn.functional.pad(x, (1, 6), value=77)[..., 1:-6],
    "one row expanded": lambda x: x[:1].expand(x.shape) if x.ndim > 1 else x,
    "one value expanded": lambda x: x[..., :1].expand(x.shape),
}
LEADS = {
    "[M]": lambda m: (m,),
    "[]": lambda m: (),
    "[1, M]": lambda m: (1, m),
    "[M, 1]": lambda m: (m, 1),
    "[2, M]": lambda m: (2, m),
    "[2, 3, M]": lambda m: (2, 3, m),
    "[0, M]": lambda m: (0, m),
}
BIASES = (None, *DTYPES)
WEIGHT_SCALES = (1e-2, 1.0, 1e-38, 1e-43, 1e30)  # results from subnormal to infinite


@dataclass(frozen=True)
class Case:
    m: int
    n: int
    k: int
    lead: str
    layout: str
    dtype: torch.dtype
    kinds: tuple
    per_token: bool
    symmetric: bool
    bits: int
    per_channel: bool
    bias_dtype: torch.dtype | None
    weight_magnitude: float
    seed: int

    @property
    def scheme(self):
        """per_token, symmetric and bits, as ops take them."""
        return self.per_token, self.symmetric, self.bits

    @cached_property
    def rng(self):
        return np.random.default_rng(self.seed)

    @property
    def lead_shape(self):
        return LEADS[self.lead](self.m)

    @property
    def products(self):
        return math.prod(self.lead_shape) * self.n * self.k

    def activation(self):
        rows = rows_of(self.rng, math.prod(self.lead_shape), self.k, self.kinds)
        return LAYOUTS[self.layout](rows.reshape(*self.lead_shape, self.k).to(self.dtype))

    def float_weight(self):
        weight = rows_of(self.rng, self.n, self.k, self.kinds).to(self.dtype)
        return LAYOUTS[self.layout](weight.nan_to_num())

    def weight(self):
        """int8 [N, K] over all of -127..127 and its scale."""
        weight = self.rng.integers(-127, 128, (self.n, self.k), dtype=np.int8)
        count = self.n if self.per_channel else 1
        scale = self.rng.uniform(0.5, 2, count) * self.weight_magnitude
        return torch.from_numpy(weight), torch.from_numpy(scale.astype(np.float32))

    def bias(self):
        if self.bias_dtype is None:
            return None
        values = self.rng.standard_normal(self.n)
        special = self.rng.choice([0.0, -0.0, 1e-40, 3e38, np.inf, np.nan], self.n)
        keep = self.rng.random(self.n) < 0.9
        with np.errstate(over="ignore"):
            values = np.where(keep, values, special).astype(np.float32)
        return torch.from_numpy(values).to(self.bias_dtype)


def cases(bits=(8, 8, 16)):
    """bits: of activations; 16 in asymmetric cases alone."""
    drawn = st.builds(
        Case,
        m=st.sampled_from(ROW_COUNTS),
        n=st.sampled_from(COLUMN_COUNTS),
        k=st.sampled_from(DEPTHS),
        lead=st.sampled_from([*LEADS, "[M]"]),
        layout=st.sampled_from(list(LAYOUTS)),
        dtype=st.sampled_from(DTYPES),
        kinds=st.sampled_from([("normal",), tuple(ROWS), *((kind,) for kind in ROWS)]),
        per_token=st.booleans(),
        symmetric=st.booleans(),
        bits=st.sampled_from(bits),
        per_channel=st.booleans(),
        bias_dtype=st.sampled_from(BIASES),
        weight_magnitude=st.sampled_from(WEIGHT_SCALES),
        seed=st.integers(0, 2**32 - 1),
    )
    return drawn.filter(
        lambda case: case.products <= MOST_PRODUCTS and not (case.symmetric and case.bits == 16)
    )
