"""nn.ConvTranspose1d with an int8 weight, whose input is quantized at each call."""

import torch
from torch import nn

from dynquant.nn._convolution import ConvolutionModule
from dynquant.nn._fx import as_one_call
from dynquant.qconfig import QConfig


class ConvTranspose1d(ConvolutionModule):
    """nn.ConvTranspose1d with an int8 weight: dynquant.nn.Linear of what its outputs come from.

    Made by from_float, which quantize_dynamic calls where nn.ConvTranspose1d is asked for. x is
    fp32, bf16 or fp16 [B, in_channels, L] or [in_channels, L]; y has x's dtype and the float
    module's shape; a float64 x is an error.

    Output o of a channel, with q = o + padding, is a sum over the inputs at q // stride - j and the
    positions q % stride + j * stride of the kernel, for j = 0, 1, ...; so `stride` outputs next to
    each other come from the same window of inputs. It is quantized on its own (per_token), or all
    by the range of x, without inputs whose outputs the padding takes away (per_tensor), to 8 or 16
    bits. Each channel has a row for each of these outputs, and so the weight has a scale for each.

    The weight is held once, packed for the machine. The state dict has weight_int8 (int8
    [out_channels * stride, windows' positions * in_channels / groups]), weight_scale (fp32
    [out_channels * stride] or [1]), bias where there is one, and version (int64). load_state_dict
    also takes what the float module has (its weight is then quantized as this one was).

    Attributes:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, dilation, groups,
            padding_mode: as nn.ConvTranspose1d has them.
        weight: a QuantizedWeight, of the float module's shape and dtype. Assigning a float weight
            quantizes it.
        weight_scale: fp32 [out_channels * stride] (per_channel) or [1] (per_tensor).
        bias: a parameter [out_channels] without gradient, or None.
        per_token, symmetric, activation_bits: how windows are quantized.
    """

    FLOAT = "nn.ConvTranspose1d"
    COPIED = (*ConvolutionModule.COPIED, "output_padding")

    _output_padding = nn.ConvTranspose1d._output_padding  # of an output_size

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__(mod, qconfig, tied_to)
        self.in_channels, channels, _ = mod.weight.shape
        self.out_channels = channels * self.groups
        self._taps = _taps_of(self.kernel_size[0], self.stride[0])

    @classmethod
    def unlike(cls, mod: nn.Module) -> str | None:
        """Why a convolution has no such form, or None."""
        if _number(mod.dilation) != 1:
            return f"has the dilation {_number(mod.dilation)}; that of 1 has a quantized form"
        return super().unlike(mod)

    @classmethod
    def _rows_of(cls, mod, weight):
        channels, outputs, size = weight.shape
        stride, groups = _number(mod.stride), mod.groups
        taps = _taps_of(size, stride)
        weight = nn.functional.pad(weight, (0, taps * stride - size))
        weight = weight.reshape(groups, channels // groups, outputs, taps, stride).flip(3)
        return weight.permute(0, 2, 4, 3, 1).reshape(groups * outputs * stride, -1)

    def _shown(self, rows):
        sizes = self.groups, self.out_channels // self.groups, self.stride[0], self._taps, -1
        weight = rows.reshape(sizes).permute(0, 4, 1, 3, 2).flip(3)
        weight = weight.reshape(self.in_channels, self.out_channels // self.groups, -1)
        return weight[..., : self.kernel_size[0]]

    def _float_module(self):
        return nn.ConvTranspose1d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.bias is not None,
            self.dilation,
            self.padding_mode,
        )

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        if not torch.jit.is_scripting() and not isinstance(input, torch.Tensor):
            return as_one_call(self, input, output_size)
        x = input.unsqueeze(0) if input.dim() == 2 else input
        if x.dim() != 3:
            raise RuntimeError(
                f"input must have the shape [B, C, L] or [C, L], got {list(input.shape)}"
            )
        added = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 1, self.dilation
        )
        stride, padding = self.stride[0], self.padding[0]
        if added[0] >= max(stride, self.dilation[0]):
            raise RuntimeError(
                f"output_padding must be smaller than stride, {stride}, got {added[0]}"
            )
        reach = self.kernel_size[0] + added[0] - padding
        size = (x.shape[2] - 1) * stride - padding + reach
        if size < 1 or x.shape[2] < 1:
            raise RuntimeError(
                f"input is too short: of {x.shape[2]} positions the result would have {size}"
            )
        # Windows from that which ends at the input number `first` on.
        first = padding // stride
        left, right = self._taps - 1 - first, (reach - 1) // stride
        if left < 0:  # outputs that the padding takes away need no inputs
            x = x[..., -left:]
        if right < 0:
            x = x[..., :right]
        bias = self.bias
        if bias is not None:
            bias = bias.repeat_interleave(stride)
        y = self._product(x, bias, self._taps, 1, max(0, left), max(0, right), 1)
        y = y.unflatten(1, [self.out_channels, stride]).transpose(2, 3).flatten(2)
        y = y.narrow(2, padding - first * stride, size).contiguous()
        return y.squeeze(0) if input.dim() == 2 else y

    @property
    def weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            return self._shown(self._scripted_rows())
        return self._weight("weight")


def _number(size):
    """Of a size that may be a number or a tuple of one."""
    return size if isinstance(size, int) else size[0]


def _taps_of(kernel_size, stride):
    """How many inputs an output comes from."""
    return -(-kernel_size // stride)
