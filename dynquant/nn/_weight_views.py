"""What transposes, parts, casts and multiples of a weight of a quantized module are."""

import math

import torch

from dynquant.nn._checks import FLOAT_DTYPES
from dynquant.nn._weight_products import PRODUCTS
from dynquant.nn.weight import CONCATENATIONS, TRANSPOSES, Held, Matrix, Shaped, Stack, is_transpose


def _itself(weight, *args, **kwargs):
    return weight


def _transposed(weight, *dims):
    if is_transpose(dims):
        return weight._like(is_transposed=not weight._is_transposed)
    return NotImplemented


def _stack_transposed(weight, *dims):
    if dims in ((), (1, 2), (2, 1), (-1, -2), (-2, -1)):
        return weight._like(is_transposed=not weight._is_transposed)
    return NotImplemented


def _of_stack(weight, index):
    if isinstance(index, torch.Tensor):
        if index.dim() or index.is_floating_point() or index.dtype == torch.bool:
            return NotImplemented
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool):
        return NotImplemented
    count = weight.shape[0]
    if not -count <= index < count:
        raise IndexError(f"index {index} is out of bounds for dimension 0 with size {count}")
    return weight._matrix(index % count)


def _permuted(weight, *dims):
    return _transposed(weight) if dims in ((1, 0), ((1, 0),), ([1, 0],)) else NotImplemented


def _to(weight, *args, **kwargs):
    if kwargs.pop("copy", False):
        return NotImplemented
    device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
    return _moved(weight, device, dtype)


def _moved(weight, device, dtype):
    dtype = dtype or weight.dtype
    if dtype not in FLOAT_DTYPES:
        return NotImplemented
    if device is None or device == weight.device:
        return weight if dtype == weight.dtype else weight._like(dtype=dtype)
    parts = [(one, tuple(tensor.to(device) for tensor in held)) for one, held in weight._parts]
    return weight._like(parts=parts, dtype=dtype)


def _cast_to(dtype):
    return lambda weight: _moved(weight, None, dtype)


def _type_as(weight, other):
    return _moved(weight, other.device, other.dtype) if isinstance(weight, Held) else other


def _item(weight, index):
    rows = index[0] if isinstance(index, tuple) and index else index
    rest = index[1:] if isinstance(index, tuple) else ()
    plain = isinstance(rows, slice) and rows.step in (None, 1)
    if weight._is_transposed or not plain or any(one != slice(None) for one in rest):
        return NotImplemented
    first, last, _ = rows.indices(weight.shape[0])
    return weight._slice(first, last)


def _narrow(weight, dim, start, length):
    if weight._is_transposed or dim not in (0, -2):
        return NotImplemented
    if not (isinstance(start, int) and 0 <= start <= start + length <= weight.shape[0]):
        return NotImplemented
    return weight._slice(start, start + length)


def _chunk(weight, chunks, dim=0):
    return _split(weight, max(1, -(-weight.shape[0] // chunks)), dim)


def _split(weight, sizes, dim=0):
    n = weight.shape[0]
    if weight._is_transposed or dim not in (0, -2):
        return NotImplemented
    if isinstance(sizes, int):
        ends = [(first, min(first + sizes, n)) for first in range(0, n, sizes)] if sizes else []
    else:
        ends = [(sum(sizes[:place]), sum(sizes[: place + 1])) for place in range(len(sizes))]
    if not ends or ends[-1][1] != n:
        return NotImplemented
    return tuple(weight._slice(*one) for one in ends)


def _cat(tensors, dim=0):
    tensors = list(tensors)
    alike = all(
        isinstance(one, Matrix)
        and not one._is_transposed
        and (one.dtype, one.device, one.shape[1])
        == (tensors[0].dtype, tensors[0].device, tensors[0].shape[1])
        for one in tensors
    )
    if not alike or dim not in (0, -2):
        return NotImplemented
    return tensors[0]._like(parts=[part for one in tensors for part in one._parts])


def _scaled_in_place(scaled):
    """Handles an operator that multiplies in place: `scaled` is its form that gives a new tensor.

    A positive number scales the values as it scales their scales, up to rounding; a power of two
    without any.
    """

    def handler(weight, number):
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not isinstance(weight, Held) or not weight._is_own or not is_number:
            return NotImplemented
        if not 0 < number < math.inf:
            return NotImplemented
        made = [
            (tensor, value)
            for one, held in weight._parts
            for tensor, value in zip(
                held, one.scaled(held, lambda tensor: scaled(tensor, number)), strict=True
            )
            if value is not tensor
        ]
        if not all(_is_in_range(*one) for one in made):
            return NotImplemented
        with torch.no_grad():
            for tensor, value in made:
                tensor.copy_(value)
        return weight

    return handler


def _is_in_range(before, after):
    """Whether all is finite, and scales, which are fp32, are in the normal range."""
    is_normal = after.abs() >= torch.finfo(torch.float32).tiny
    held = after.isfinite() & (is_normal | (before == 0) | (after.dtype != torch.float32))
    return bool(held.all())


def _requires_grad(weight, value=True):
    if value:
        raise RuntimeError(
            "the weight of a quantized module takes no gradient; weight.dequantize() is a plain "
            "tensor that can"
        )
    return weight


_T = torch.Tensor
_SCALES = {
    **dict.fromkeys((_T.mul_, _T.multiply_, _T.__imul__), _scaled_in_place(torch.mul)),
    **dict.fromkeys(
        (_T.div_, _T.divide_, _T.true_divide_, _T.__itruediv__), _scaled_in_place(torch.div)
    ),
}
_ALIKE = {  # for matrices and for stacks of them
    **_SCALES,
    torch.detach: _itself,
    torch.dequantize: lambda weight: weight.dequantize(),
    torch.int_repr: lambda weight: weight.int_repr(),
    _T.data.__get__: _itself,
    _T.requires_grad.__set__: _requires_grad,
    _T.requires_grad_: _requires_grad,
    _T.detach: _itself,
    _T.to: _to,
    _T.float: _cast_to(torch.float32),
    _T.half: _cast_to(torch.float16),
    _T.bfloat16: _cast_to(torch.bfloat16),
    _T.type_as: _type_as,
}
_STACK = {
    **_ALIKE,
    torch.transpose: _stack_transposed,
    _T.mT.__get__: _stack_transposed,
    _T.transpose: _stack_transposed,
    _T.__getitem__: _of_stack,
}
_MATRIX = {
    **_ALIKE,
    **PRODUCTS,
    **dict.fromkeys(TRANSPOSES, _transposed),
    torch.permute: _permuted,
    _T.permute: _permuted,
    **dict.fromkeys(CONCATENATIONS, _cat),
    torch.narrow: _narrow,
    torch.chunk: _chunk,
    torch.split: _split,
    _T.narrow: _narrow,
    _T.chunk: _chunk,
    _T.split: _split,
    _T.__getitem__: _item,
}
for _kind, _handlers in ((Matrix, _MATRIX), (Stack, _STACK), (Shaped, _ALIKE)):
    _kind.HANDLERS.update(_handlers)
