"""What functions that multiply do with a weight of a quantized module: what the module does."""

from types import FunctionType

import torch

from dynquant.nn._renamed import with_names
from dynquant.nn.weight import MATRICES, Traced


def _linear(input, weight, bias=None):
    is_one = isinstance(weight, MATRICES) and not weight._is_transposed
    return _product(_plain(input), weight, _plain(bias)) if is_one else NotImplemented


def _matmul(input, other):
    """x @ rows.T, or rows @ x as Mamba has it."""
    if isinstance(input, MATRICES):
        is_plain = not isinstance(other, MATRICES) and other.layout == torch.strided
        of_rows = not input._is_transposed and is_plain and other.dim() > 1
        return _product(other.mT, input, None).mT.contiguous() if of_rows else NotImplemented
    is_one = isinstance(other, MATRICES) and other._is_transposed
    return _product(input, other, None) if is_one and input.dim() else NotImplemented


def _mm(input, mat2):
    return _matmul(input, mat2) if input.dim() == mat2.dim() == 2 else NotImplemented


def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1 or isinstance(input, MATRICES) or input.dim() != 1:
        return NotImplemented
    is_one = isinstance(mat2, MATRICES) and mat2._is_transposed
    return _product(_plain(mat1), mat2, input) if is_one else NotImplemented


def _product(x, weight, bias):
    """x @ rows.T + bias, where the weight is these rows or their transpose."""
    outputs, first = [], 0
    for one, held in weight._parts:
        piece = None if bias is None else bias[first : first + one.n]
        outputs.append(one.linear(x, held, piece))
        first += one.n
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _linear_or_plain(input, weight, bias=None):
    result = _linear(input, weight, bias)
    if result is NotImplemented:
        return torch.nn.functional.linear(input, weight, bias)
    return result


class _AttentionOfWeights:
    """multi_head_attention_forward, which goes on with weights of any class.

    It would ask them, as one of its arguments, for an own form of it again; and while dynamo traces
    what such a form does, linear asks no weight.
    """

    def __init__(self):
        self._names, self._attention = _attention_with_names()
        _, self._traced = _attention_with_names()

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return self._traced(*args, **kwargs)
        # Some may have been replaced, as libraries do with scaled_dot_product_attention.
        replaced = vars(torch.nn.functional)
        self._names.update({key: replaced[key] for key in replaced.keys() - _OWN_NAMES})
        return self._attention(*args, **kwargs)


_PROJECTIONS = ("_in_projection", "_in_projection_packed")
_OWN_NAMES = {"has_torch_function", "linear", *_PROJECTIONS}


def _attention_with_names():
    """The names that a copy of multi_head_attention_forward finds, and that copy."""
    names = vars(torch.nn.functional).copy()
    names |= {"has_torch_function": lambda tensors: False, "linear": _linear_or_plain}
    for one in _PROJECTIONS:  # torch's own, which another version may not have
        if isinstance(names.get(one), FunctionType):
            names[one] = with_names(names[one], names)
    return names, with_names(_attention, names)


def _plain(tensor):
    return tensor.dequantize() if isinstance(tensor, MATRICES) else tensor


_T = torch.Tensor
_attention = torch.nn.functional.multi_head_attention_forward
PRODUCTS = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.addmm: _addmm,
    _T.matmul: _matmul,
    _T.__matmul__: _matmul,
    _T.mm: _mm,
    _T.addmm: _addmm,
}
# Called by models that keep its projections in linear layers: fairseq's, WavLM, CLIP's pooling.
# What took its place before dynquant was imported finds the dequantized values, as anything else.
if getattr(_attention, "__globals__", None) is vars(torch.nn.functional):
    PRODUCTS[_attention] = _AttentionOfWeights()
Traced.PRODUCTS.update(PRODUCTS)
