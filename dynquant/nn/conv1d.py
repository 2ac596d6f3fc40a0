"""Hugging Face's Conv1D, GPT-2's linear layer, with an int8 or 16-bit weight.

nn.Conv1d, a convolution, is in convolution.py.
"""

import torch

from dynquant.nn.linear import Linear
from dynquant.nn.linear_half import Linear16bit


class _Conv1D:
    """What is Conv1D's own.

    Attributes:
        nx, nf: in_features and out_features, by the names that Conv1D has for them.
    """

    FLOAT = "Conv1D"

    @property
    def nx(self) -> int:
        return self.in_features

    @property
    def nf(self) -> int:
        return self.out_features

    def _float_module(self):
        from transformers.pytorch_utils import Conv1D

        return Conv1D(self.nf, self.nx)

    @staticmethod
    def _rows(weight):
        return weight.t()

    _shown = _rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # as the float module calls its argument
        return super().forward(x)


class Conv1D(_Conv1D, Linear):
    """transformers' Conv1D: y = x @ weight + bias with a float weight [in, out].

    What it holds, and its state dict, are those of dynquant.nn.Linear: weight_int8 is [out, in].
    load_state_dict takes the float module's weight [in, out].

    Attributes:
        nx, nf: in_features and out_features, by the names that Conv1D has for them.
    """


class Conv1D16bit(_Conv1D, Linear16bit):
    """transformers' Conv1D with a weight in 16 bits, computed in fp32.

    It holds and saves what dynquant.nn.Linear16bit does: its weight is [out, in].
    load_state_dict takes the float module's weight [in, out].

    Attributes:
        nx, nf: in_features and out_features, by the names that Conv1D has for them.
    """
