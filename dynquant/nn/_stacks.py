"""Formats of weights that are several matrices, each of which is packed for itself.

Each is a format of dynquant/nn/_formats.py. Of a mixture's experts, with a matrix [N, K] each, rows
and entries have the number of experts as their first dimension, and an expert's weight is held as
nn.Linear's would be. Of a convolution's groups, rows and entries are those of one matrix.
"""

import torch

from dynquant import _C
from dynquant.nn._formats import Bits16, Format, Int8
from dynquant.ops.library import unpacked_groups

_ALIGNED = 64  # bytes: where each packed weight begins


def _packed(matrices):
    """int8 [E, bytes], each row of which begins with what pack_weight gives for a matrix."""
    each = [torch.ops.dynquant.pack_weight(one) for one in matrices]
    longest = max(len(one) for one in each)
    rows = each[0].new_zeros(len(each), -(-longest // _ALIGNED) * _ALIGNED)
    for row, one in zip(rows, each, strict=True):
        row[: len(one)] = one
    return rows


class _Stack(Format):
    """What stacks share.

    Attributes:
        experts: how many there are; n and k are those of each.
        inner: the format of one expert's weight.
        INNER: its class.
    """

    INNER = None

    def __init__(self, name, rows, qconfig):
        self.experts = len(rows)
        self.inner = self.INNER(name, rows[0], qconfig)
        super().__init__(name, rows[0], qconfig)

    @property
    def shape(self):
        return self.experts, self.n, self.k

    def of(self, held, expert):
        """The format of one expert's weight, and what it holds."""
        raise NotImplementedError

    def each(self, held):
        return (self.of(held, expert) for expert in range(self.experts))

    def chunks(self, held):
        for one, own in self.each(held):
            yield from one.chunks(own)

    def part(self, held, first, last):
        raise TypeError(f"{self.name} is a weight for each expert, of which rows are parts")

    def linear(self, x, held, bias):
        raise TypeError(f"{self.name} is a weight for each expert: multiply with one of them")


class Int8Stack(_Stack, Int8):
    """int8 [E, N, K], and fp32 scales [E, N] or [E, 1]; each expert's packed for the kernels."""

    INNER = Int8

    @staticmethod
    def buffers_of(name):
        return (f"{name}_packed", f"{name}_scale")

    def __init__(self, name, rows, qconfig):
        super().__init__(name, rows, qconfig)
        self.bytes = _C.packed_bytes(self.n, self.k)

    def of(self, held, expert):
        return self.inner, (held[0][expert, : self.bytes], held[1][expert])

    def quantized(self, rows, key):
        each = [self.inner.quantized(one, key) for one in rows]
        return {one: torch.stack([entries[one] for entries in each]) for one in self.keys}

    def held_of(self, entries, device):
        held = super().held_of(entries, device)
        self.inner.per_channel = self.per_channel
        return held

    def integers(self, held):
        return torch.stack([one.integers(own) for one, own in self.each(held)])

    def _packed(self, integers):
        return _packed(integers)


class Int8Groups(Int8):
    """int8 [N, K], and fp32 scales [N] or [1]; the rows of each of some groups are packed alone.

    Attributes:
        groups: how many there are; they have as many rows each.
    """

    def __init__(self, name, rows, qconfig, groups):
        super().__init__(name, rows, qconfig)
        self.groups = groups
        self.bytes = _C.packed_bytes(self.n // groups, self.k)  # of each packed weight

    def holds_like(self, other):
        return super().holds_like(other) and other.groups == self.groups

    def _packed(self, integers):
        return _packed(integers.chunk(self.groups))

    def integers(self, held):
        return unpacked_groups(held[0], self.n, self.k, self.bytes)

    def part(self, held, first, last):
        """As of one group."""
        rows = Int8.__new__(Int8)
        vars(rows).update({key: one for key, one in vars(self).items() if key != "groups"})
        rows.n = max(0, min(last, self.n) - first)
        return rows, self._held_part(held, first, last)


class Bits16Stack(_Stack, Bits16):
    """fp16 or bf16 [E, N, K]."""

    INNER = Bits16

    def of(self, held, expert):
        return self.inner, (held[0][expert],)

    def held_of(self, entries, device):
        held = super().held_of(entries, device)
        self.inner.dtype = self.dtype
        return held
