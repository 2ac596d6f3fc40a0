"""QuantizedWeight: what `.weight` of a quantized module is."""

import math
from types import FunctionType

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from dynquant.nn._checks import FLOAT_DTYPES

_READ_ONLY = (
    "the weight of a quantized module cannot be written to: assign a float tensor to the "
    "attribute of the module (layer.weight = tensor), which quantizes it"
)


class QuantizedWeight(torch.Tensor):
    """A float tensor that stands for the dequantized values of a weight [N, K] (or its transpose).

    It holds what the module holds, and takes no memory of its own. torch.nn.functional.linear,
    multi_head_attention_forward, matrix products with its transpose, and those of itself with a
    matrix compute as the module does; slices of rows and concatenations
    of rows, casts to other float dtypes and the transpose stay quantized. Every other operator sees
    the dequantized values, and gives plain tensors.

    Code that merely looks at it (shape, dtype, device) costs nothing and finds, by
    torch.overrides.has_torch_function, that this is not a plain tensor. The fast path of
    nn.TransformerEncoder looks so at each call, and then runs the quantized modules instead of a
    float kernel of its own.

    Under torch.compile products with the weight, its transpose, and a list of weights concatenated
    by rows are the module's as well; every other operator takes the dequantized values, which are
    computed where they are used.

    Multiplied or divided in place by a positive number, it scales what the module holds.

    Raises:
        RuntimeError: when an operator writes to it or to a view of it in another way, since the
            module would not see the change.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _WRITES:  # under torch.compile the module would not see it
            raise RuntimeError(_READ_ONLY)
        if func in _DETACHING:
            return args[0]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    def whole(self, rows):
        """The format and what it holds, where this is one weight, else None.

        rows: what the module that asks does to the float weight.
        """
        return None

    def dequantize(self):
        """The values, as a plain tensor."""
        return self.as_subclass(torch.Tensor)


class _Held(QuantizedWeight):
    """Has formats, each with what a module holds as it says, and no storage.

    The weight is the rows of the formats, one below the other. Some functions have handlers.

    is_own: whether this is a module's whole weight or a view of it, and no copy.
    """

    @staticmethod
    def __new__(cls, parts, dtype, is_transposed=False, is_own=False):
        *lead, _, k = parts[0][0].shape
        n = sum(one.n for one, _ in parts)
        shape, strides = (n, k), (k, 1)
        if is_transposed:
            shape, strides = (k, n), (1, k)
        if lead:
            shape, strides = (*lead, *shape), (n * k, *strides)
        device = parts[0][1][0].device
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=device
        )
        weight._parts, weight._is_transposed = tuple(parts), is_transposed
        weight._is_own = is_own
        return weight

    @classmethod
    def _handlers(cls):
        """What some functions do instead of taking the dequantized values, by function.

        Each may give NotImplemented, for arguments with which the function takes the values.
        """
        raise NotImplementedError

    def whole(self, rows):
        if len(self._parts) > 1 or rows(self)._is_transposed:
            return None
        return self._parts[0]

    def dequantize(self):
        with torch.inference_mode(False), torch.no_grad():  # whose tensors have no _version
            values = _values(self._parts, self.dtype)
            return values.mT if self._is_transposed else values

    def int_repr(self):
        """The integers, as they stand in a state dict: [N, K], or [K, N] of the transpose.

        Raises:
            TypeError: for a weight in 16 bits.
        """
        integers = torch.cat([one.integers(held) for one, held in self._parts])
        return integers.mT if self._is_transposed else integers

    def data_ptr(self):
        """The address of what is held: equal for weights that are tied."""
        return self._parts[0][1][0].data_ptr()

    def _like(self, **changes):
        given = {
            "parts": self._parts,
            "dtype": self.dtype,
            "is_transposed": self._is_transposed,
            "is_own": self._is_own and changes.keys() == {"is_transposed"},
            **changes,
        }
        return type(self)(**given)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = cls._handlers().get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__" or func in _LOOKS:
                return func(*args, **kwargs)
            if func.__name__ == "__set__":
                raise RuntimeError(_READ_ONLY)
            unpacked = []

            def unpack(weight):
                unpacked.append(weight.dequantize())
                return unpacked[-1]

            args, kwargs = tree_map_only(_Held, unpack, (args, kwargs))
            versions = [weight._version for weight in unpacked]
            result = func(*args, **kwargs)
            if any(
                weight._version != version
                for weight, version in zip(unpacked, versions, strict=True)
            ):
                raise RuntimeError(_READ_ONLY)
            return _read_only(result, unpacked)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Quantized(_Held):
    """A matrix [N, K], or its transpose."""

    @classmethod
    def _handlers(cls):
        return _HANDLERS

    def _slice(self, first, last):
        """The rows from `first` to before `last`."""
        parts, before = [], 0
        for one, held in self._parts:
            begin, end = max(first - before, 0), min(last - before, one.n)
            if begin == 0 and end == one.n:
                parts.append((one, held))
            elif begin < end:
                parts.append(one.part(held, begin, end))
            before += one.n
        return self._like(parts=parts or [self._parts[0][0].part(self._parts[0][1], 0, 0)])


class _Stack(_Held):
    """Matrices [E, N, K], or their transposes, as experts have them: one part."""

    @classmethod
    def _handlers(cls):
        return _STACK_HANDLERS

    def _matrix(self, index):
        ((one, held),) = self._parts
        return _Quantized([one.of(held, index)], self.dtype, self._is_transposed)


class _Shaped(_Held):
    """A matrix as a weight of another shape: what `shown` makes of its rows."""

    @staticmethod
    def __new__(cls, parts, dtype, shown, is_own=False):
        ((one, held),) = parts
        like = shown(torch.empty(one.shape, device="meta"))
        weight = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=dtype, device=held[0].device
        )
        weight._parts, weight._shown_rows, weight._is_own = tuple(parts), shown, is_own
        return weight

    @classmethod
    def _handlers(cls):
        return _ALIKE

    def whole(self, rows):
        return None

    def dequantize(self):
        with torch.inference_mode(False), torch.no_grad():
            return self._shown_rows(_values(self._parts, self.dtype))

    def int_repr(self):
        ((one, held),) = self._parts
        return self._shown_rows(one.integers(held))

    def _like(self, **changes):
        given = {"parts": self._parts, "dtype": self.dtype, "shown": self._shown_rows}
        return type(self)(**{**given, **changes})


class _Traced(QuantizedWeight):
    """A matrix while torch.compile traces, which knows no tensors without storage: the values.

    They are in the graph where an operator takes them. Beside them are the same parts as of _Held.
    """

    @classmethod
    def of(cls, values, parts, is_transposed=False):
        weight = values.as_subclass(cls)
        weight._parts, weight._is_transposed = parts, is_transposed
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = _PRODUCTS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
        first = args[0] if args else None
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _DETACHING:
            return result
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        rows_join = func in _CONCATENATIONS and dim == 0  # dynamo asks for lists, not for tuples
        if rows_join and all(isinstance(one, cls) and not one._is_transposed for one in first):
            return cls.of(result, [part for one in first for part in one._parts])
        if func in _TRANSPOSES and isinstance(first, cls) and _is_transpose(args[1:]):
            return cls.of(result, first._parts, not first._is_transposed)
        if func in _CASTS and isinstance(first, cls) and result.dtype in FLOAT_DTYPES:
            return cls.of(result, first._parts, first._is_transposed)
        return result


class _ValuesView(torch.Tensor):
    """A view of dequantized values, which cannot be written to either."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__" and func != torch.Tensor.data.__get__:
                return func(*args)
            views = [one for one in tree_leaves((args, kwargs)) if isinstance(one, cls)]
            versions = [view._version for view in views]
            result = func(*args, **kwargs or {})
            written = any(
                view._version != version for view, version in zip(views, versions, strict=True)
            )
            if written or func.__name__ == "__set__":
                raise RuntimeError(_READ_ONLY)
            return _read_only(result, views)


def _read_only(result, tensors):
    """`result` with the views of any of the tensors marked, so that writing to one is an error."""

    def marked(one):
        if type(one) is torch.Tensor and any(
            torch._C._is_alias_of(one, other) for other in tensors
        ):
            return one.as_subclass(_ValuesView)
        return one

    return tree_map_only(torch.Tensor, marked, result)


def _values(parts, dtype):
    values = [one.values(held).to(dtype) for one, held in parts]
    return values[0] if len(values) == 1 else torch.cat(values)


def quantized_weight(parts, dtype):
    """The weight of a module, whose rows `parts` hold one below the other, as a QuantizedWeight.

    Args:
        parts: each a Format and what the module holds; a single one of a stack of matrices.
        dtype: the float dtype that the weight shows.
    """
    is_matrix = len(parts[0][0].shape) == 2
    if torch.compiler.is_dynamo_compiling():
        values = _values(parts, dtype)
        return _Traced.of(values, parts) if is_matrix else values.as_subclass(QuantizedWeight)
    kind = _Quantized if is_matrix else _Stack
    return kind(parts, dtype, is_own=True)


def shaped_weight(one, held, dtype, shown):
    """The weight that `shown` makes of the rows [N, K], which are held by a Format."""
    parts = [(one, held)]
    if torch.compiler.is_dynamo_compiling():
        return shown(_values(parts, dtype)).as_subclass(QuantizedWeight)
    return _Shaped(parts, dtype, shown, is_own=True)


# What some functions do instead of taking the dequantized values; NotImplemented: they take those.


def _itself(weight, *args, **kwargs):
    return weight


def _transposed(weight, *dims):
    if _is_transpose(dims):
        return weight._like(is_transposed=not weight._is_transposed)
    return NotImplemented


def _is_transpose(dims):
    """Whether the arguments of t, transpose or permute exchange the two dimensions of a matrix."""
    return dims in ((), (0, 1), (1, 0), (-1, -2), (-2, -1), ((1, 0),))


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
    return _moved(weight, other.device, other.dtype) if isinstance(weight, _Held) else other


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
        isinstance(one, _Quantized)
        and not one._is_transposed
        and (one.dtype, one.device, one.shape[1])
        == (tensors[0].dtype, tensors[0].device, tensors[0].shape[1])
        for one in tensors
    )
    if not alike or dim not in (0, -2):
        return NotImplemented
    return tensors[0]._like(parts=[part for one in tensors for part in one._parts])


def _linear(input, weight, bias=None):
    is_one = isinstance(weight, _MATRICES) and not weight._is_transposed
    return _product(_plain(input), weight, _plain(bias)) if is_one else NotImplemented


def _matmul(input, other):
    """x @ rows.T, or rows @ x as Mamba has it."""
    if isinstance(input, _MATRICES):
        of_rows = not input._is_transposed and not isinstance(other, _MATRICES) and other.dim() > 1
        return _product(other.mT, input, None).mT.contiguous() if of_rows else NotImplemented
    is_one = isinstance(other, _MATRICES) and other._is_transposed
    return _product(input, other, None) if is_one and input.dim() else NotImplemented


def _addmm(input, mat1, mat2, *, beta=1, alpha=1):
    if beta != 1 or alpha != 1 or isinstance(input, _MATRICES) or input.dim() != 1:
        return NotImplemented
    is_one = isinstance(mat2, _MATRICES) and mat2._is_transposed
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


def _copied(function, names):
    """A function in Python with other global names."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _attention_of_weights():
    """multi_head_attention_forward, which goes on with weights of any class.

    It would ask them, as one of its arguments, for an own form of it again; and while dynamo traces
    what such a form does, linear asks no weight.
    """
    names = vars(torch.nn.functional).copy()
    names |= {"has_torch_function": lambda tensors: False, "linear": _linear_or_plain}
    names["_in_projection"] = _copied(torch.nn.functional._in_projection, names)
    return _copied(_attention, names)


def _plain(tensor):
    return tensor.dequantize() if isinstance(tensor, _MATRICES) else tensor


_MATRICES = (_Quantized, _Traced)


def _scaled_in_place(scaled):
    """Handles an operator that multiplies in place: `scaled` is its form that gives a new tensor.

    A positive number scales the values as it scales their scales, up to rounding; a power of two
    without any.
    """

    def handler(weight, number):
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not isinstance(weight, _Held) or not weight._is_own or not is_number:
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
_attention = torch.nn.functional.multi_head_attention_forward
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
_STACK_HANDLERS = {
    **_ALIKE,
    torch.transpose: _stack_transposed,
    _T.mT.__get__: _stack_transposed,
    _T.transpose: _stack_transposed,
    _T.__getitem__: _of_stack,
}
_PRODUCTS = {
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
_TRANSPOSES = {
    **dict.fromkeys(
        (torch.t, torch.transpose, _T.T.__get__, _T.mT.__get__, _T.t, _T.transpose), _transposed
    ),
    torch.permute: _permuted,
    _T.permute: _permuted,
}
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate, torch.vstack)
_CASTS = (_T.to, _T.float, _T.half, _T.bfloat16, _T.type_as, _T.detach, torch.detach)
_HANDLERS = {
    **_ALIKE,
    **_PRODUCTS,
    **_TRANSPOSES,
    **dict.fromkeys(_CONCATENATIONS, _cat),
    torch.narrow: _narrow,
    torch.chunk: _chunk,
    torch.split: _split,
    _T.narrow: _narrow,
    _T.chunk: _chunk,
    _T.split: _split,
    _T.__getitem__: _item,
}
_LOOKS = {
    _T.__hash__,
    _T.__len__,
    _T.dim,
    _T.element_size,
    _T.get_device,
    _T.is_complex,
    _T.is_contiguous,
    _T.is_floating_point,
    _T.is_signed,
    _T.ndimension,
    _T.nelement,
    _T.numel,
    _T.size,
    _T.stride,
    torch.is_complex,
    torch.is_floating_point,
    torch.numel,
}
_DETACHING = {torch.detach, _T.detach, _T.data.__get__}
_WRITING_OPERATORS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__")
# Methods that write to the tensor, by their names.
_WRITES = {
    getattr(_T, name)
    for name in dir(_T)
    if name in _WRITING_OPERATORS
    or (name.endswith("_") and not name.endswith("__"))
    and name not in ("detach_", "requires_grad_", "share_memory_", "rename_")
}
