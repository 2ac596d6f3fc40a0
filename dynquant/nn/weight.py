"""Int8Weight: what `.weight` of a quantized module is."""

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
