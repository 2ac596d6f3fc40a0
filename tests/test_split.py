"""How products are split over threads, from 1 to 128 of them: by the costs of the set's table."""

import itertools
import math

import numpy as np
import pytest

from dynquant import _C

PANEL = 64  # columns
THREADS = (1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 32, 48, 64, 96, 127, 128)
SHAPES = [
    *itertools.product((1, 2, 5, 16, 17, 100, 1000, 5000), (1, 64, 65, 768, 5000), (1, 768, 4096)),
    (3, 100_000, 64),
    (200_000, 3, 64),
]


class Model:
    """What a split takes, as csrc/ops/split.cpp estimates it where waiting threads spin."""

    def __init__(self, isa, m, n, k):
        self.costs = _C.costs(isa, m, n, k)
        self.multiple = _C.split(isa, m, n, k, 1)[2]
        self.shape, self.m, self.k = (m, n, k), m, k
        self.units, self.panels = math.ceil(m / self.multiple), math.ceil(n / PANEL)

    def rows(self, parts):
        return min(self.m, math.ceil(self.units / parts) * self.multiple)

    def nanoseconds(self, row_parts, column_parts, threads):
        wake = 0 if row_parts * column_parts == 1 else 3e3 + 50 * (threads - 2)
        rows, cost = self.rows(row_parts), self.costs
        weight = max(rows * cost["multiply_add"], cost["weight_byte"]) * PANEL * self.k
        product = math.ceil(self.panels / column_parts) * (weight + rows * cost["panel_row"])
        first, apart = (
            self.rows(parts) * self.k * cost["quantized_value"] for parts in (threads, row_parts)
        )
        return wake + product + (min(wake + first, apart) if wake else apart)

    def best(self, threads):
        """Of one part, and of every number of parts of rows with as many of columns as fit."""
        splits = [
            (r, min(threads // r, self.panels)) for r in range(1, min(threads, self.units) + 1)
        ]
        return min(self.nanoseconds(*split, threads) for split in [(1, 1), *splits])

    def chosen(self, isa, threads):
        return self.nanoseconds(*_C.split(isa, *self.shape, threads)[:2], threads)


@pytest.mark.parametrize("m, n, k", [(0, 5, 5), (5, 0, 5), (0, 0, 0), (1, 1, 0), (1, 1, 1)])
def test_what_is_nothing_or_little_is_one_part(isa, m, n, k):
    for threads in THREADS:
        assert _C.split(isa, m, n, k, threads)[:2] == (1, 1)


def test_parts_are_the_whole(isa):
    """Each element in one part, none without work, never more parts than threads."""
    for m, n, k in SHAPES:
        for threads in THREADS:
            rows, columns, multiple, first, parts = _C.split(isa, m, n, k, threads)
            assert len(parts) == rows * columns <= threads
            assert not (first and threads == 1)
            assert rows <= math.ceil(m / multiple) and columns <= math.ceil(n / PANEL)
            assert all(m0 < m1 and n0 < n1 for m0, m1, n0, n1 in parts)
            assert all(m0 % multiple == 0 and n0 % PANEL == 0 for m0, _, n0, _ in parts)
            assert sum((m1 - m0) * (n1 - n0) for m0, m1, n0, n1 in parts) == m * n
            ends = {(m0, n0) for m0, _, n0, _ in parts}
            assert len(ends) == len(parts)
            assert all((m1 == m or (m1, n0) in ends) for _, m1, n0, _ in parts)
            assert all((n1 == n or (m0, n1) in ends) for m0, _, n0, n1 in parts)


def test_small_parts_are_the_whole(isa):
    """More of them than threads where there are enough columns, of four panels each at least."""
    wide = itertools.product((1, 3, 8), (1023, 2048, 2049, 9728), (768,))
    for m, n, k in [*SHAPES, *wide]:
        for threads in THREADS:
            rows, columns, *_ = _C.split(isa, m, n, k, threads)
            *_, parts = _C.split(isa, m, n, k, threads, small_parts=True)
            enough = rows == 1 < columns and math.ceil(n / PANEL / 4) >= 4 * columns
            assert len(parts) >= 4 * columns if enough else len(parts) == rows * columns
            assert all(m0 < m1 and n0 < n1 for m0, m1, n0, n1 in parts)
            assert sum((m1 - m0) * (n1 - n0) for m0, m1, n0, n1 in parts) == m * n
            if enough:
                assert all(n0 % (4 * PANEL) == 0 for _, _, n0, _ in parts)
                starts = [n0 for _, _, n0, _ in parts]
                assert [*starts[1:], n] == [n1 for *_, n1 in parts]


def test_no_other_split_is_much_better(isa):
    """Few numbers of parts are tried: what that loses against trying all of them is bounded."""
    ratios = []
    for shape in SHAPES:
        model = Model(isa, *shape)
        ratios += [model.chosen(isa, threads) / model.best(threads) for threads in THREADS]
    assert min(ratios) >= 1 - 1e-9 and max(ratios) < 1.3 and np.mean(ratios) < 1.002


def test_more_threads_never_take_much_longer(isa):
    for shape in SHAPES:
        model, least = Model(isa, *shape), math.inf
        for threads in THREADS:
            taken = model.chosen(isa, threads)
            assert taken < 1.25 * least + 50 * threads, (shape, threads)
            least = min(least, taken)
