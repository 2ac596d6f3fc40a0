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
    def __new__(cls, packed, shape):
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=torch.int8, device=packed.device
        )
        weight._packed = packed
        return weight

    def _unpack(self):
        with torch.inference_mode(False):  # whose tensors have no _version
            return torch.ops.dynquant.unpack_weight(self._packed, *self.shape)

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


def int8_weight(packed, n, k):
    """The weight int8 [n, k] that `packed` holds, as an Int8Weight."""
    if torch.compiler.is_dynamo_compiling():  # which cannot trace a tensor without storage
        return torch.ops.dynquant.unpack_weight(packed, n, k).as_subclass(Int8Weight)
    return _PackedWeight(packed, (n, k))
