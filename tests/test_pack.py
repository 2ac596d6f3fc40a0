"""The packed weight: the round trip, and a damaged one is an error."""

import numpy as np
import pytest
import torch
from compare import assert_same
from drawn import COLUMN_COUNTS, DEPTHS

HEADER = 64
ops = torch.ops.dynquant


def drawn(n, k):
    rng = np.random.default_rng([n, k])
    return torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))


@pytest.mark.parametrize("n", COLUMN_COUNTS)
def test_round_trip(isa, n):
    for k in DEPTHS:
        weight = drawn(n, k)
        packed = ops.pack_weight(weight)
        assert packed.dtype == torch.int8 and packed.ndim == 1 and packed.is_contiguous()
        assert_same(ops.unpack_weight(packed, n, k), weight, f"{n}x{k}")
        assert_same(ops.pack_weight(weight), packed, "packing twice")


def test_packed_does_not_depend_on_the_instruction_set(isa):
    assert_same(ops.pack_weight(drawn(70, 130)), packed_by_default)


packed_by_default = ops.pack_weight(drawn(70, 130))


def test_packed_is_about_as_large_as_the_weight():
    n, k = 1024, 1024
    assert ops.pack_weight(drawn(n, k)).numel() <= n * k + 8 * n + HEADER


def test_a_damaged_header_is_refused():
    """Any byte of the header may be reserved; damage is then harmless, but never wrong."""
    weight, x = drawn(33, 70), torch.randn(2, 70)
    packed, scale = ops.pack_weight(weight), torch.ones(33)
    whole, refusals = ops.linear_dynamic(x, packed, scale), 0
    for position in range(HEADER):
        for flip in (1, -128, -1):
            damaged = packed.clone()
            damaged[position] ^= flip
            try:
                y = ops.linear_dynamic(x, damaged, scale)
            except RuntimeError as error:
                assert "packed" in str(error)
                refusals += 1
            else:
                assert_same(y, whole, f"byte {position}")
    assert refusals >= 3 * 8, "magic, version, n and k must all be checked"


@pytest.mark.parametrize("start", [0, 8, 16, 32])
def test_a_header_with_zeros_or_ones_is_refused(start):
    for value in (0, -1, 127):
        damaged = ops.pack_weight(drawn(33, 70))
        damaged[start:HEADER] = value
        if start < 32:
            with pytest.raises(RuntimeError, match="packed"):
                ops.unpack_weight(damaged, 33, 70)


def test_a_wrong_size_is_refused():
    packed = ops.pack_weight(drawn(33, 70))
    for wrong in (packed[:-1], packed[:HEADER], packed[1:], torch.cat([packed, packed[-1:]])):
        with pytest.raises(RuntimeError, match="packed"):
            ops.unpack_weight(wrong, 33, 70)
        with pytest.raises(RuntimeError, match="packed"):
            ops.linear_dynamic(torch.randn(2, 70), wrong, torch.ones(33))


def test_a_packed_tensor_anywhere_in_memory(isa):
    """safetensors and mmap give tensors whose data is not aligned to a cache line."""
    weight, x, scale = drawn(70, 130), torch.randn(9, 130), torch.rand(70)
    packed = ops.pack_weight(weight)
    expected = ops.linear_dynamic(x, packed, scale)
    for offset in (1, 3, 4, 16, 33):
        buffer = torch.zeros(packed.numel() + offset, dtype=torch.int8)
        moved = buffer[offset:].copy_(packed)
        assert_same(ops.linear_dynamic(x, moved, scale), expected)
        assert_same(ops.linear_dynamic(x[:1], moved, scale), expected[:1])
        assert_same(ops.unpack_weight(moved, 70, 130), weight)
