"""What the quantized forms of convolutions over one dimension share."""

import torch
from torch import nn

from dynquant.nn._formats import Int8
from dynquant.nn._module import QuantizedModule
from dynquant.nn._stacks import Int8Groups
from dynquant.nn.weight import shaped_weight
from dynquant.qconfig import ConfigLike, QConfig

_conv1d_dynamic = torch.ops.dynquant.conv1d_dynamic.default
_conv1d_without_gradient = torch.ops.dynquant.conv1d_dynamic.inference

_LEAST_ROWS = 32  # of a group: fewer multiply too little for each value that is quantized


class ConvolutionModule(QuantizedModule):
    """A matrix of rows [N, K] and the windows of positions that they are multiplied with.

    The rows of each group of channels, one below the other, see windows of these channels.
    """

    FORMAT = Int8
    DTYPES = Int8.DTYPES
    COPIED = ("stride", "padding", "dilation", "groups", "padding_mode")

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__(mod, qconfig, tied_to)
        self.kernel_size = (mod.weight.shape[2],)
        for name in ("stride", "padding", "dilation"):  # numbers may have been set for pairs of one
            if isinstance(getattr(self, name), int):
                setattr(self, name, (getattr(self, name),))
        one = self._formats["weight"]
        self._columns, self._depth = one.n, one.k
        self._group_bytes = 0 if self.groups == 1 else one.bytes

    @classmethod
    def unlike(cls, mod: nn.Module) -> str | None:
        """Why a convolution has no such form, or None."""
        rows = cls._rows_of(mod, mod.weight).shape[0] // mod.groups
        if mod.groups == 1 or rows >= _LEAST_ROWS:
            return None
        return (
            f"has {mod.groups} groups of {rows} rows; groups of {_LEAST_ROWS} and more have a "
            "quantized form"
        )

    @classmethod
    def check_float(cls, mod: nn.Module, qconfig: ConfigLike, name: str = "") -> None:
        if 0 in mod.weight.shape[:2]:
            raise ValueError(f"{name or 'the module'} has no channels")
        if reason := cls.unlike(mod):
            raise ValueError(f"{name or 'the module'} {reason}")
        super().check_float(mod, qconfig, name)

    @classmethod
    def _format_of(cls, name, rows, qconfig, mod):
        if mod.groups == 1:
            return cls.FORMAT(name, rows, qconfig)
        return Int8Groups(name, rows, qconfig, mod.groups)

    def _rows(self, weight):
        return self._rows_of(self, weight)

    def _shown(self, rows):
        raise NotImplementedError

    def _weight(self, name):
        return shaped_weight(self._formats[name], self._held(name), self._dtype(), self._shown)

    def _scripted_rows(self) -> torch.Tensor:
        """The rows in fp32, for TorchScript."""
        n, k = self._columns // self.groups, self._depth
        if self.groups == 1:
            packed = [self.packed]
        else:
            packed = [one[: self._group_bytes] for one in self.packed.unbind()]
        rows = [torch.ops.dynquant.unpack_weight(one, n, k) for one in packed]
        return torch.cat(rows).to(torch.float32) * self.weight_scale.unsqueeze(1)

    def _product(
        self,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        taps: int,
        stride: int,
        left: int,
        right: int,
        dilation: int,
    ) -> torch.Tensor:
        """[B, N, windows] of x [B, C, L]."""
        if torch.jit.is_scripting():
            conv1d = torch.ops.dynquant.conv1d_dynamic
        elif x.requires_grad and torch.is_grad_enabled():
            conv1d = _conv1d_dynamic
        else:
            conv1d = _conv1d_without_gradient
        scale = self.weight_scale
        if self.groups > 1:
            scale = scale.expand(self._columns)
        return conv1d(
            x,
            self.packed,
            scale,
            bias,
            taps,
            stride,
            left,
            right,
            dilation,
            self.per_token,
            self.symmetric,
            self.activation_bits,
        )

    def extra_repr(self) -> str:
        more = "" if self.groups == 1 else f"groups={self.groups}, "
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, {more}"
            f"padding_mode={self.padding_mode}, bias={self.bias is not None}, "
            f"{self._formats['weight']}"
        )
