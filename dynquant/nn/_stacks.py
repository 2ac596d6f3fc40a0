"""Formats of weights with three dimensions: one matrix [N, K] for each expert of a mixture.

Each is a format of dynquant/nn/_formats.py for a stack of such matrices: rows and entries have the
number of experts as their first dimension, and an expert's weight is held as nn.Linear's would be.
"""

import torch

from dynquant import _C
from dynquant.nn._formats import Bits16, Format, Int8

_ALIGNED = 64  # bytes: where an expert's packed weight begins


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
        packed = integers.new_zeros(self.experts, -(-self.bytes // _ALIGNED) * _ALIGNED)
        for expert, one in enumerate(integers):
            packed[expert, : self.bytes] = super()._packed(one)
        return packed


class Bits16Stack(_Stack, Bits16):
    """fp16 or bf16 [E, N, K]."""

    INNER = Bits16

    def of(self, held, expert):
        return self.inner, (held[0][expert],)

    def held_of(self, entries, device):
        held = super().held_of(entries, device)
        self.inner.dtype = self.dtype
        return held
