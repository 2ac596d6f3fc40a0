"""Tensor parallelism: dynquant.nn.Linear sharded over the processes of a device mesh.

    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module
    from dynquant.parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})

The result has the bits that one process gives: a row that is spread over processes is quantized
with the range of all of it, and the int32 sums are added before they are rounded.
"""

from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from dynquant.nn.conv1d import Conv1D
from dynquant.nn.linear import Linear
from dynquant.nn.linear_sharded import (
    MAX_LOCAL_COLUMNS,
    ColwiseLinear,
    RowwiseLinear,
    ShardedLinear,
)
from dynquant.swap.undo import all_or_nothing


class _LinearStyle(ParallelStyle):
    """Shards a dynquant.nn.Linear.

    Attributes:
        FORM: what it becomes.
        LAYOUTS: the default placements of input and output.
    """

    FORM: type[ShardedLinear]
    LAYOUTS: tuple[Placement, Placement]

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
    ) -> None:
        super().__init__()
        given = {"input_layouts": input_layouts, "output_layouts": output_layouts}
        for name, layout in given.items():
            if layout is not None and not isinstance(layout, Placement):
                raise TypeError(
                    f"{name} is {layout!r}; expected a placement: Replicate() or Shard(dim)"
                )
        if not isinstance(use_local_output, bool):
            raise TypeError(f"use_local_output is {use_local_output!r}; expected a bool")
        self._layouts = tuple(
            default if layout is None else layout
            for layout, default in zip(given.values(), self.LAYOUTS, strict=True)
        )
        self._use_local_output = use_local_output

    def _apply(self, module, device_mesh):
        name = type(self).__name__
        if type(module) not in (Linear, Conv1D):
            raise TypeError(
                f"{name} is for dynquant.nn.Linear, not {type(module).__name__}; quantize the "
                "model first"
            )
        if self.FORM is RowwiseLinear and module.activation_bits != 8:
            raise ValueError(
                f"{name} is there for activations in 8 bits, not 16: the sums "
                "of both bytes would have to be exchanged; ColwiseParallel takes them"
            )
        if device_mesh.ndim != 1:
            raise ValueError(
                f"{name} needs a mesh of one dimension, got {device_mesh.ndim}: pass mesh[name]"
            )
        if module.packed.is_meta:
            raise ValueError(f"{name} needs a layer with its weight, not one on the meta device")
        columns = -(-module.in_features // device_mesh.size())
        if self.FORM is RowwiseLinear and columns > MAX_LOCAL_COLUMNS:
            raise ValueError(
                f"{name} gives a process {columns:,} of {module.in_features:,} columns; at most "
                f"{MAX_LOCAL_COLUMNS:,} can be summed exactly beside the row's range: take more "
                "processes, or ColwiseParallel"
            )
        with all_or_nothing(module):
            module.__class__ = self.FORM
            module._become(device_mesh, self)
        return module


class ColwiseParallel(_LinearStyle):
    """Shards a dynquant.nn.Linear by its outputs: each process has some rows of the weight.

    Args:
        input_layouts: the placement of the input where it is a plain tensor (a DTensor says it
            itself); Replicate() by default.
        output_layouts: the placement of the output; Shard(-1) by default.
        use_local_output: give the local part as a plain tensor; otherwise a DTensor.

    Raises:
        TypeError: for another argument; where it is applied, for another module.
        ValueError: where it is applied, for a mesh of more than one dimension, or a layer on the
            meta device.
    """

    FORM = ColwiseLinear
    LAYOUTS = (Replicate(), Shard(-1))


class RowwiseParallel(_LinearStyle):
    """Shards a dynquant.nn.Linear by its inputs: each process has some columns of the weight.

    Args:
        input_layouts: the placement of the input where it is a plain tensor (a DTensor says it
            itself); Shard(-1) by default.
        output_layouts: the placement of the output; Replicate() by default.
        use_local_output: give the local part as a plain tensor; otherwise a DTensor.

    Raises:
        TypeError, ValueError: as ColwiseParallel; also for activations in 16 bits, and for more
            than 65,534 columns in a process.
    """

    FORM = RowwiseLinear
    LAYOUTS = (Shard(-1), Replicate())
