"""Builder: makes nodes and constants of an ONNX graph."""

import numpy as np
import onnx_ir as ir
from onnx_ir import convenience


class Builder:
    """Makes nodes whose outputs have names that no other has.

    Args:
        root: the model's main graph, which gets the constants.
        prefix: of the names.

    Attributes:
        prefix: of the names.
        made: the nodes, in order.
    """

    def __init__(self, root, prefix):
        self._root = root
        self.prefix = prefix
        self.made = []

    def __call__(self, kind, *inputs, outputs=1, **attributes):
        """The output of a new node, or a tuple of several. None is an input that is left out."""
        names = [f"{self.prefix}.{kind}_{len(self.made)}.{place}" for place in range(outputs)]
        node = ir.Node(
            "",
            kind,
            inputs,
            convenience.convert_attributes(attributes),
            outputs=[ir.Value(name=name) for name in names],
            name=f"{self.prefix}.{kind}_{len(self.made)}",
        )
        self.made.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    def constant(self, value, dtype=np.float32):
        """A number, or a list of numbers, as a constant that all nodes share."""
        array = np.array(value, dtype)
        return self.named(f"dynquant.{array.dtype}.{array.tolist()}", array)

    def named(self, name, array):
        """A constant of that name, which is there once; `array` may be a function that gives it."""
        value = self._root.initializers.get(name)
        if value is None:
            tensor = ir.tensor(array() if callable(array) else array, name=name)
            value = ir.Value(
                name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._root.register_initializer(value)
        return value

    def inner(self, name):
        """The Builder of a graph within this one."""
        return Builder(self._root, f"{self.prefix}.{name}")

    def cast(self, value, dtype):
        """`value` in a dtype, an ir.DataType. What does not say its own is in fp32."""
        has = ir.DataType.FLOAT if value.dtype is None else value.dtype
        return value if has == dtype else self("Cast", value, to=int(dtype))

    def floats(self, value):
        return self.cast(value, ir.DataType.FLOAT)


def array_of(value):
    """The numpy array of a constant."""
    if value.const_value is None:
        raise ValueError(f"{value.name} is computed or an input; weights have to be constants")
    return value.const_value.numpy()
