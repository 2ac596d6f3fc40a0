"""What functions that multiply do with a weight of a quantized module: what the module does."""

import torch

from dynquant.nn._renamed import with_names
from dynquant.nn.weight import MATRICES, Traced


def _linear(input, weight, bias=None):
    is_one = isinstance(weight, MATRICES) and not weight._is_transposed
    return _product(_plain(input), weight, _plain(bias)) if is_one else NotImplemented


def _matmul(input, other):
    """x @ rows.T, or rows @ x as Mamba has it."""
    if isinstance(input, MATRICES):
        of_rows = not input._is_transposed and not isinstance(other, MATRICES) and other.dim() > 1
        return _product(other.mT, input, None).mT.contiguous() if of_rows else NotImplemented
    is_one = isinstance(other, MATRICES) and other._is_transposed
    return _product(input, other, None) if is_one and input.dim() else NotImplemented


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


def _attention_of_weights():
    """multi_head_attention_forward, which goes on with weights of any class.

    It would ask them, as one of its arguments, for an own form of it again; and while dynamo traces
    what such a form does, linear asks no weight.
    """
    names = vars(torch.nn.functional).copy()
    names |= {"has_torch_function": lambda tensors: False, "linear": _linear_or_plain}
    if inner := names.get("_in_projection"):  # torch's own, which another version may not have
        names["_in_projection"] = with_names(inner, names)
    return with_names(_attention, names)


def _plain(tensor):
    return tensor.dequantize() if isinstance(tensor, MATRICES) else tensor


_T = torch.Tensor
_attention = torch.nn.functional.multi_head_attention_forward
PRODUCTS = {
    torch.nn.functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.addmm: _addmm,
    _T.matmul: _matmul,
    _T.__matmul__: _matmul,
    _T.mm: _matmul,
    _T.addmm: _addmm,
    # Called by models that keep its projections in linear layers: fairseq's, WavLM, CLIP's pooling.
    _attention: _attention_of_weights(),
}
Traced.PRODUCTS.update(PRODUCTS)
