"""nn.Conv1d with an int8 weight, whose input is quantized at each call, window by window."""

import torch
from torch import nn

from dynquant.nn._formats import Int8
from dynquant.nn._fx import as_one_call
from dynquant.nn._module import QuantizedModule
from dynquant.nn.weight import convolution_weight
from dynquant.qconfig import ConfigLike, QConfig

_conv1d_dynamic = torch.ops.dynquant.conv1d_dynamic.default
_conv1d_without_gradient = torch.ops.dynquant.conv1d_dynamic.inference


class Conv1d(QuantizedModule):
    """nn.Conv1d of one group with an int8 weight: dynquant.nn.Linear of what its kernel sees.

    Made by from_float, which quantize_dynamic calls where nn.Conv1d is asked for. x is fp32, bf16
    or fp16 [B, in_channels, L] or [in_channels, L]; y has x's dtype and the float module's shape; a
    float64 x is an error. Each window of kernel_size positions is quantized on its own (per_token),
    or all by the range of x (per_tensor), to 8 or 16 bits. All padding modes are served.

    The weight is held once, packed for the machine. The state dict has weight_int8 (int8
    [out_channels, kernel_size * in_channels], one position of the kernel behind the other),
    weight_scale (fp32 [out_channels] or [1]), bias where there is one, and version (int64).
    load_state_dict also takes what the float module has (its weight is then quantized as this one
    was).

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as
            nn.Conv1d has them.
        weight: a QuantizedWeight, of the float module's shape and dtype. Assigning a float weight
            quantizes it.
        weight_scale: fp32 [out_channels] (per_channel) or [1] (per_tensor).
        bias: a parameter [out_channels] without gradient, or None.
        per_token, symmetric, activation_bits: how windows are quantized.
    """

    FLOAT = "nn.Conv1d"
    FORMAT = Int8
    DTYPES = Int8.DTYPES
    COPIED = (
        *("stride", "padding", "dilation", "groups", "padding_mode"),
        "_reversed_padding_repeated_twice",  # (left, right) of the padding modes other than zeros
    )

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__(mod, qconfig, tied_to)
        self.out_channels, self.in_channels, *kernel_size = mod.weight.shape
        self.kernel_size = tuple(kernel_size)
        for name in ("stride", "padding", "dilation"):  # numbers may have been set for pairs of one
            if isinstance(getattr(self, name), int):
                setattr(self, name, (getattr(self, name),))

    @staticmethod
    def unlike(mod: nn.Module) -> str | None:
        """Why a convolution has no such form, or None."""
        if mod.groups != 1:
            return f"has {mod.groups} groups; convolutions of one group have a quantized form"
        if "_conv_forward" in vars(mod) or type(mod)._conv_forward is not nn.Conv1d._conv_forward:
            return "has a _conv_forward other than Conv1d's"
        return None

    @classmethod
    def check_float(cls, mod: nn.Module, qconfig: ConfigLike, name: str = "") -> None:
        if reason := cls.unlike(mod):
            raise ValueError(f"{name or 'the module'} {reason}")
        super().check_float(mod, qconfig, name)
        if mod.weight.shape[1] == 0:
            raise ValueError(f"{name or 'the module'} has no channels")

    @staticmethod
    def _rows(weight):
        return weight.transpose(1, 2).flatten(1)

    def _weight(self, name):
        taps = self.kernel_size[0]
        return convolution_weight(self._formats[name], self._held(name), self._dtype(), taps)

    def _float_module(self):
        return nn.Conv1d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting() and not isinstance(input, torch.Tensor):
            return as_one_call(self, input)
        if self.padding_mode != "zeros":
            both = self._reversed_padding_repeated_twice
            input = nn.functional.pad(input, [both[0], both[1]], self.padding_mode)
            left, right = 0, 0
        else:
            left, right = self._zeros()
        is_unbatched = input.dim() == 2
        x = input.unsqueeze(0) if is_unbatched else input
        if torch.jit.is_scripting():
            conv1d = torch.ops.dynquant.conv1d_dynamic
        elif input.requires_grad and torch.is_grad_enabled():
            conv1d = _conv1d_dynamic
        else:
            conv1d = _conv1d_without_gradient
        y = conv1d(
            x,
            self.packed,
            self.weight_scale,
            self.bias,
            self.kernel_size[0],
            self.stride[0],
            left,
            right,
            self.dilation[0],
            self.per_token,
            self.symmetric,
            self.activation_bits,
        )
        return y.squeeze(0) if is_unbatched else y

    def _zeros(self) -> tuple[int, int]:
        """The zeros on the left and on the right."""
        padding = self.padding
        if isinstance(padding, str):
            both = self.dilation[0] * (self.kernel_size[0] - 1) if padding == "same" else 0
            return both // 2, both - both // 2
        return padding[0], padding[0]

    @property
    def weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            integers = torch.ops.dynquant.unpack_weight(
                self.packed, self.out_channels, self.in_channels * self.kernel_size[0]
            )
            values = integers.to(torch.float32) * self.weight_scale.unsqueeze(1)
            return values.unflatten(1, [self.kernel_size[0], self.in_channels]).transpose(1, 2)
        return self._weight("weight")

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"padding_mode={self.padding_mode}, bias={self.bias is not None}, "
            f"{self._formats['weight']}"
        )
