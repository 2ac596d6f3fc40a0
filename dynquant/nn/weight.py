"""Int8Weight and QuantizedTable: what `.weight` of a quantized module is."""

import torch
from torch.utils._pytree import tree_map_only


class Int8Weight(torch.Tensor):
    """A read-only int8 tensor [N, K] that is unpacked only when its values are asked for.

    Code that merely looks at a weight (its shape, dtype or device) costs nothing and finds, by
    torch.overrides.has_torch_function, that this is no plain tensor. The fast path of
    nn.TransformerEncoder looks so at each call, and then runs the quantized modules instead of a
    float kernel of its own. An operator sees a plain int8 tensor, and gives plain tensors.

    Raises:
        RuntimeError: when an operator writes to it, since the module would not see the change.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})


class _PackedWeight(Int8Weight):
    @staticmethod
    def __new__(cls, parts, k):
        weight = torch.Tensor._make_wrapper_subclass(
            cls, (sum(n for _, n in parts), k), dtype=torch.int8, device=parts[0][0].device
        )
        weight._parts = parts
        return weight

    def _unpack(self):
        with torch.inference_mode(False):  # whose tensors have no _version
            return _unpacked(self._parts, self.shape[1])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func.__name__ == "__get__":  # shape, dtype, device, ...
                return func(*args, **kwargs)
            unpacked = []

            def unpack(weight):
                unpacked.append(weight._unpack())
                return unpacked[-1]

            args, kwargs = tree_map_only(cls, unpack, (args, kwargs))
            result = func(*args, **kwargs)
            if any(weight._version for weight in unpacked):
                raise RuntimeError("the weight of a quantized module cannot be written to")
            return result

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls._unpack, (args, kwargs or {}))
        return func(*args, **kwargs)


def _unpacked(parts, k):
    weights = [torch.ops.dynquant.unpack_weight(packed, n, k) for packed, n in parts]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def int8_weight(parts, k):
    """The rows that `parts` hold, one below the other, as an Int8Weight.

    Args:
        parts: each a packed weight and the number N of its rows.
        k: the number of columns.
    """
    if torch.compiler.is_dynamo_compiling():  # which cannot trace a tensor without storage
        return _unpacked(parts, k).as_subclass(Int8Weight)
    return _PackedWeight(parts, k)


class QuantizedTable(torch.Tensor):
    """The rows of a quantized embedding (uint8 [V, D], or [V, (D + 1) // 2] in 4 bits).

    It knows its scales, so that transformers can tie the weight of another module to it.

    Attributes:
        qparams: fp32 [V, 2], scale and offset.
        bits: 8 or 4.
        width: D.
    """

    __torch_function__ = Int8Weight.__torch_function__

    _CHUNK = 4096  # rows that are compared at once

    @staticmethod
    def of(rows, qparams, bits, width):
        table = rows.as_subclass(QuantizedTable)
        table.qparams, table.bits, table.width = qparams, bits, width
        return table

    def dequantized(self, first=0, last=None):
        """The rows from `first` to before `last` in fp32, [last - first, D]."""
        last = len(self) if last is None else min(last, len(self))
        indices = torch.arange(first, last, device=self.device)
        rows = self.as_subclass(torch.Tensor)
        return torch.ops.dynquant.embedding(
            indices, rows, self.qparams, self.bits, self.width, torch.float32
        )

    def is_alike(self, weight, scale=None):
        """Whether both can be forms of one float weight [V, D], each within its rounding.

        Args:
            weight: int8 with `scale` (fp32 [V] or [1]), or in 16 bits without.
        """
        if tuple(weight.shape) != (len(self), self.width) or self.is_meta or weight.is_meta:
            return False
        eps = torch.finfo(torch.float32 if scale is not None else weight.dtype).eps
        for first in range(0, len(self), self._CHUNK):
            values = self.dequantized(first, first + self._CHUNK)
            held = weight[first : first + self._CHUNK].float()
            step = self.qparams[first : first + self._CHUNK, :1]
            if scale is not None:
                own = scale if scale.numel() == 1 else scale[first : first + self._CHUNK]
                held, step = held * own[:, None], step + own[:, None]
            # Half a step each, and what fp32 or 16 bits round off.
            bound = 0.501 * step + 2 * eps * held.abs()
            if not ((values - held).abs() <= bound).all():
                return False
        return True
