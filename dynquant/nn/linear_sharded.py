"""dynquant.nn.Linear spread over the processes of a device mesh."""

import copy

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from dynquant.nn._formats import MAX_IN_FEATURES
from dynquant.nn.linear import Linear

_ops = torch.ops.dynquant

# The range of the whole row reaches the kernels as this many further columns of each shard.
_RANGE_COLUMNS = 2
MAX_LOCAL_COLUMNS = MAX_IN_FEATURES - _RANGE_COLUMNS  # of a row that is spread over processes


class ShardedLinear(Linear):
    """What ColwiseParallel and RowwiseParallel make of a dynquant.nn.Linear, in place.

    The state dict holds DTensors. load_state_dict takes DTensors and whole tensors, also those of a
    float layer.

    Attributes:
        in_features, out_features: of the whole layer.
        weight: the dequantized values [out_features, in_features], a DTensor.
    """

    PLACEMENTS = {}  # of the entries of the state dict

    def _become(self, mesh, style):
        whole = {key: value for key, value in self._state().items() if key != "version"}
        local = {
            key: distribute_tensor(
                value.detach(),
                mesh,
                [self._placement(key, value)],
                src_data_rank=getattr(style, "src_data_rank", 0),
            ).to_local()
            for key, value in whole.items()
        }
        integers = self._held_form(local["weight_int8"])
        packed = _ops.pack_weight(integers)  # which may raise: nothing is changed before
        self._mesh = mesh
        self._input_layout, self._output_layout = style._layouts
        self._use_local_output = style._use_local_output
        self._buffers["packed"] = packed
        self._buffers["weight_scale"] = local["weight_scale"]
        if self.bias is not None:
            self._parameters["bias"] = nn.Parameter(local["bias"], requires_grad=False)
        local_format = copy.copy(self._formats["weight"])
        local_format.n, local_format.k = integers.shape
        self._formats["weight"] = local_format
        part = -(-self.in_features // mesh.size())
        self._local_in_features = max(0, min(part, self.in_features - part * mesh.get_local_rank()))

    def _placement(self, key, value):
        key = "weight_int8" if key == "weight" else key
        if key == "weight_scale" and value.numel() != self.out_features:
            return Replicate()
        return self.PLACEMENTS[key]

    @staticmethod
    def _held_form(weight):
        """The local part of the weight as it is packed."""
        return weight

    @staticmethod
    def _local_part(held):
        """The inverse of _held_form."""
        return held

    @property
    def weight(self):
        return self._whole("weight", self._values().to(self._dtype()))

    def _values(self):
        """The local part of the dequantized weight, fp32."""
        return self._local_part(self._formats["weight"].values(self._held("weight")))

    def _whole(self, key, local):
        return self._distributed(key, local, (self.out_features, self.in_features))

    def _distributed(self, key, local, shape):
        like = torch.empty(shape, device="meta")
        placement = self._placement(key, like)
        return DTensor.from_local(
            local, self._mesh, [placement], run_check=False, shape=like.shape, stride=like.stride()
        )

    def _held_biases(self):
        biases = super()._held_biases()
        if "_mesh" not in self.__dict__:
            return biases
        shape = (self.out_features,)
        return {name: self._distributed(name, one.detach(), shape) for name, one in biases.items()}

    def _state(self):
        state = super()._state()
        if "_mesh" in self.__dict__:
            integers = self._local_part(state["weight_int8"])
            state["weight_int8"] = self._whole("weight_int8", integers)
            scales = self.out_features if self._formats["weight"].per_channel else 1
            state["weight_scale"] = self._distributed("weight_scale", self.weight_scale, (scales,))
        return state

    def _formats_to_read(self):
        whole = copy.copy(self._formats["weight"])
        whole.n, whole.k = self.out_features, self.in_features
        return {"weight": whole}

    def _read(self, state_dict, prefix, *lists):
        """As of a whole layer; what is found are the local parts."""
        state_dict = dict(state_dict)
        for key in (f"{prefix}weight", f"{prefix}weight_scale"):  # whose values are looked at
            if isinstance(state_dict.get(key), DTensor):
                state_dict[key] = state_dict[key].full_tensor()
        found, errors = super()._read(state_dict, prefix, *lists)
        for key in () if errors else self.PLACEMENTS:
            if key in found:
                local = self._localized(key, found[key])
                found[key] = self._held_form(local) if key == "weight_int8" else local
        return found, errors

    def _localized(self, key, value):
        placement = self._placement(key, value)
        if isinstance(value, DTensor):
            return value.redistribute(self._mesh, [placement]).to_local()
        return distribute_tensor(
            value.detach(), self._mesh, [placement], src_data_rank=None
        ).to_local()

    def _assign(self, name, value):
        raise TypeError(f"{name} of a sharded layer cannot be assigned; use load_state_dict")

    def _input(self, x, placement, gradient):
        """The local part of x at `placement`; gradient: that of its gradient's local part."""
        last = (Shard(-1), Shard(x.dim() - 1))
        is_part = not isinstance(x, DTensor) and self._input_layout in last
        # Checked before anything is exchanged: processes that disagree would wait forever.
        k = self._local_in_features if is_part else self.in_features
        if x.dim() == 0 or x.shape[-1] != k:
            raise RuntimeError(f"x must have K = {k} as its last dimension, got {list(x.shape)}")
        if not isinstance(x, DTensor):
            if self._input_layout == placement and gradient == placement:
                return x
            whole = {}
            if is_part:
                like = torch.empty((*x.shape[:-1], self.in_features), device="meta")
                whole = {"shape": like.shape, "stride": like.stride()}
            layouts = [self._input_layout]
            x = DTensor.from_local(x, self._mesh, layouts, run_check=False, **whole)
        x = x.redistribute(self._mesh, [placement])
        return x.to_local(grad_placements=[last[1] if gradient in last else gradient])

    def _output(self, y, placement):
        """y, the local part at `placement`, as the style asks for it."""
        if self._use_local_output and self._output_layout == placement:
            return y
        shape = (*y.shape[:-1], self.out_features)
        like = torch.empty(shape, device="meta")
        y = DTensor.from_local(
            y, self._mesh, [placement], run_check=False, shape=like.shape, stride=like.stride()
        ).redistribute(self._mesh, [self._output_layout])
        return y.to_local() if self._use_local_output else y


class ColwiseLinear(ShardedLinear):
    """A Linear of which each process computes some outputs."""

    PLACEMENTS = {"weight_int8": Shard(0), "weight_scale": Shard(0), "bias": Shard(0)}

    def forward(self, input):
        wants_gradient = input.requires_grad and torch.is_grad_enabled()
        # Each process adds to the gradient of x what comes through its outputs.
        gradient = Partial() if wants_gradient else Replicate()
        y = super().forward(self._input(input, Replicate(), gradient))
        return self._output(y, Shard(-1))


class RowwiseLinear(ShardedLinear):
    """A Linear of which each process multiplies some inputs."""

    PLACEMENTS = {"weight_int8": Shard(1), "weight_scale": Replicate(), "bias": Replicate()}

    @staticmethod
    def _held_form(weight):
        return nn.functional.pad(weight, (0, _RANGE_COLUMNS))

    @staticmethod
    def _local_part(held):
        return held[:, :-_RANGE_COLUMNS]

    def forward(self, input):
        x = self._input(input, Shard(-1), Shard(-1))
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return self._output(_RowwiseProduct.apply(x, self), Replicate())


class _RowwiseProduct(torch.autograd.Function):
    """linear_dynamic of an x whose columns are spread over processes, and its gradient."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear, ctx.dtype = linear, x.dtype
        ends = _whole_range(x, linear)
        # With the ends of the whole range in it, a part of a row is quantized as the row is; the
        # weight is zero in these columns.
        q, scale, zero_point = _ops.quantize_activation(
            torch.cat([x, ends.to(x.dtype)], -1), linear.per_token, linear.symmetric
        )
        acc = _ops.int_mm(q, zero_point, linear.packed, linear.out_features)
        acc = _reduced(acc, "sum", linear._mesh)
        return _ops.rescale(acc, scale, linear.weight_scale, linear.bias, x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        linear = ctx.linear
        return (gradient.to(torch.float32) @ linear._values()).to(ctx.dtype), None


def _whole_range(x, linear):
    """The least and greatest value (or 0) of each whole row, or of the whole tensor: [..., 2]."""
    x = x.to(torch.float32)
    zero = x.new_zeros((*x.shape[:-1], 1))
    x = torch.cat([x, zero], -1)  # a shard may have no columns
    ends = torch.stack([-x.amin(-1), x.amax(-1)], -1)
    # Not every backend hands NaN on; infinity means the same for the row.
    ends = ends.masked_fill(ends.isnan(), torch.inf)
    ends = _reduced(ends, "max", linear._mesh)
    return torch.stack([-ends[..., 0], ends[..., 1]], -1)


def _reduced(local, operation, mesh):
    """The sum or maximum of the processes' tensors of one shape."""
    partial = DTensor.from_local(local, mesh, [Partial(operation)], run_check=False)
    reduced = partial.redistribute(mesh, [Replicate()]).to_local()
    return reduced.wait() if hasattr(reduced, "wait") else reduced
