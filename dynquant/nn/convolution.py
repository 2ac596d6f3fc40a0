"""nn.Conv1d with an int8 weight, whose input is quantized at each call, window by window."""

import torch
from torch import nn

from dynquant.nn._convolution import ConvolutionModule
from dynquant.nn._fx import as_one_call
from dynquant.qconfig import QConfig


class Conv1d(ConvolutionModule):
    """nn.Conv1d with an int8 weight: dynquant.nn.Linear of what its kernel sees.

    Made by from_float, which quantize_dynamic calls where nn.Conv1d is asked for. x is fp32, bf16
    or fp16 [B, in_channels, L] or [in_channels, L]; y has x's dtype and the float module's shape; a
    float64 x is an error. Each window of kernel_size positions of a group's channels is quantized
    on its own (per_token), or all by the range of x (per_tensor), to 8 or 16 bits. All padding
    modes are served.

    The weight is held once, packed for the machine. The state dict has weight_int8 (int8
    [out_channels, kernel_size * in_channels / groups], one position of the kernel behind the
    other), weight_scale (fp32 [out_channels] or [1]), bias where there is one, and version (int64).
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
    COPIED = (
        *ConvolutionModule.COPIED,
        "_reversed_padding_repeated_twice",  # (left, right) of the padding modes other than zeros
    )

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__(mod, qconfig, tied_to)
        self.out_channels, channels, _ = mod.weight.shape
        self.in_channels = channels * self.groups

    @classmethod
    def unlike(cls, mod: nn.Module) -> str | None:
        """Why a convolution has no such form, or None."""
        if "_conv_forward" in vars(mod) or type(mod)._conv_forward is not nn.Conv1d._conv_forward:
            return "has a _conv_forward other than Conv1d's"
        return super().unlike(mod)

    @classmethod
    def _rows_of(cls, mod, weight):
        return weight.transpose(1, 2).flatten(1)

    def _shown(self, rows):
        return rows.unflatten(1, (self.kernel_size[0], -1)).transpose(1, 2)

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
        y = self._product(
            x, self.bias, self.kernel_size[0], self.stride[0], left, right, self.dilation[0]
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
            return self._scripted_rows().unflatten(1, [self.kernel_size[0], -1]).transpose(1, 2)
        return self._weight("weight")
