"""QuantizedWeight: what `.weight` of a quantized module is."""

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
    matrix compute as the module does; slices of rows and concatenations of rows, casts to other
    float dtypes and the transpose stay quantized. Every other operator sees the dequantized values,
    and gives plain tensors.

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


class Held(QuantizedWeight):
    """Has formats, each with what a module holds as it says, and no storage.

    The weight is the rows of the formats, one below the other.

    is_own: whether this is a module's whole weight or a view of it, and no copy.
    HANDLERS: what some functions do instead of taking the dequantized values, by function. Each may
        give NotImplemented, for arguments with which the function takes the values. They come from
        _weight_products.py and _weight_views.py.
    """

    HANDLERS = {}

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
        handler = cls.HANDLERS.get(func)
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

            args, kwargs = tree_map_only(Held, unpack, (args, kwargs))
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


class Matrix(Held):
    """A matrix [N, K], or its transpose."""

    HANDLERS = {}

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


class Stack(Held):
    """Matrices [E, N, K], or their transposes, as experts have them: one part."""

    HANDLERS = {}

    def _matrix(self, index):
        ((one, held),) = self._parts
        return Matrix([one.of(held, index)], self.dtype, self._is_transposed)


class Shaped(Held):
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

    HANDLERS = {}

    def whole(self, rows):
        # A module of another kind would make other rows of what is shown.
        asked, own = (getattr(one, "__self__", None) for one in (rows, self._shown_rows))
        return self._parts[0] if type(asked) is type(own) else None

    def dequantize(self):
        with torch.inference_mode(False), torch.no_grad():
            return self._shown_rows(_values(self._parts, self.dtype))

    def int_repr(self):
        ((one, held),) = self._parts
        return self._shown_rows(one.integers(held))

    def _like(self, **changes):
        given = {"parts": self._parts, "dtype": self.dtype, "shown": self._shown_rows}
        return type(self)(**{**given, **changes})


class Traced(QuantizedWeight):
    """A matrix while torch.compile traces, which knows no tensors without storage: the values.

    They are in the graph where an operator takes them. Beside them are the same parts as of Held.

    PRODUCTS: as HANDLERS of Held.
    """

    PRODUCTS = {}

    @classmethod
    def of(cls, values, parts, is_transposed=False):
        weight = values.as_subclass(cls)
        weight._parts, weight._is_transposed = parts, is_transposed
        return weight

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        handler = cls.PRODUCTS.get(func)
        result = NotImplemented if handler is None else handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
        first = args[0] if args else None
        result = super().__torch_function__(func, types, args, kwargs)
        if func in _DETACHING:
            return result
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        rows_join = func in CONCATENATIONS and dim == 0  # dynamo asks for lists, not for tuples
        if rows_join and all(isinstance(one, cls) and not one._is_transposed for one in first):
            return cls.of(result, [part for one in first for part in one._parts])
        if func in TRANSPOSES and isinstance(first, cls) and is_transpose(args[1:]):
            return cls.of(result, first._parts, not first._is_transposed)
        if func in CASTS and isinstance(first, cls) and result.dtype in FLOAT_DTYPES:
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
        return Traced.of(values, parts) if is_matrix else values.as_subclass(QuantizedWeight)
    kind = Matrix if is_matrix else Stack
    return kind(parts, dtype, is_own=True)


def shaped_weight(one, held, dtype, shown):
    """The weight that `shown` makes of the rows [N, K], which are held by a Format."""
    parts = [(one, held)]
    if torch.compiler.is_dynamo_compiling():
        return shown(_values(parts, dtype)).as_subclass(QuantizedWeight)
    return Shaped(parts, dtype, shown, is_own=True)


def is_transpose(dims):
    """Whether the arguments of t, transpose or permute exchange the two dimensions of a matrix."""
    return dims in ((), (0, 1), (1, 0), (-1, -2), (-2, -1), ((1, 0),))


MATRICES = (Matrix, Traced)
_T = torch.Tensor
TRANSPOSES = (
    *(torch.t, torch.transpose, torch.permute),
    *(_T.T.__get__, _T.mT.__get__, _T.t, _T.transpose, _T.permute),
)
CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate, torch.vstack)
CASTS = (_T.to, _T.float, _T.half, _T.bfloat16, _T.type_as, _T.detach, torch.detach)
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
