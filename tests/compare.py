"""Equality of tensors: the same bits, zero's sign included; any NaN equals any NaN."""

import numpy as np
import torch


def widened(tensor):
    """The values as numpy: floats as float32, which holds bf16 and fp16 exactly."""
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _bits(array):
    if array.dtype != np.float32:
        return array
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def assert_same(actual, expected, note=""):
    """`expected` is a tensor or an array from the reference, to which floats widen."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype, (note, actual.dtype, expected.dtype)
        expected = widened(expected)
    actual = widened(actual)
    expected = np.ascontiguousarray(expected).reshape(expected.shape)
    assert actual.shape == expected.shape, (note, actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (note, actual.dtype, expected.dtype)
    different = _bits(np.ascontiguousarray(actual)) != _bits(expected)
    if different.any():
        first = tuple(int(i) for i in np.argwhere(different)[0])
        raise AssertionError(
            f"{note} {different.sum()} of {different.size} differ, first at {first}: "
            f"{actual[first]!r}, expected {expected[first]!r}"
        )


def assert_same_state(one, other):
    """The state dicts of two modules, or two state dicts, are the same."""
    one, other = (each if isinstance(each, dict) else each.state_dict() for each in (one, other))
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert_same(value, other[key], key)


def assert_all_same(actual, expected, note=""):
    assert len(actual) == len(expected)
    for position, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same(one, other, f"{note} [{position}]")


def assert_equal_layers(one, other):
    """Two linear layers have the same state and give the same."""
    assert_same_state(one, other)
    x = torch.randn(3, one.in_features)
    assert_same(one(x), other(x))
