"""QuantStub and DeQuantStub: where a float model says that tensors are to be quantized."""

import torch
from torch import nn

from dynquant.observer import Observer
from dynquant.qconfig import EIGHT_BITS, ConfigLike, QConfig, one_of, parse_qconfig


class QuantStub(nn.Module):
    """Identity until quantize_dynamic or convert makes a dynquant.nn.Quantize of it.

    Args:
        qconfig: any form of a config. With one, `observer` records the range of what passes, and
            dynquant.nn.Quantize will use it unless the config says 'dynamic': True.

    Raises:
        TypeError, ValueError: for a qconfig that is not a config, or whose dtype has not 8 bits.
    """

    def __init__(self, qconfig: ConfigLike | None = None) -> None:
        super().__init__()
        self.qconfig: QConfig | None = None
        self.observer: Observer | None = None
        if qconfig is not None:
            self.observe(parse_qconfig(qconfig))

    def observe(self, qconfig: QConfig) -> None:
        """Records the range of what passes from now on. qconfig: a QConfig."""
        one_of("a QuantStub's dtype", qconfig.dtype, EIGHT_BITS)
        self.qconfig = qconfig
        self.observer = Observer(qconfig.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.observer is None else self.observer(x)


class DeQuantStub(nn.Module):
    """Identity until quantize_dynamic or convert makes a dynquant.nn.DeQuantize of it.

    Args:
        qconfig: any form of a config. It is checked, and changes nothing.

    Raises:
        TypeError, ValueError: for a qconfig that is not a config.
    """

    def __init__(self, qconfig: ConfigLike | None = None) -> None:
        super().__init__()
        self.qconfig = None if qconfig is None else parse_qconfig(qconfig)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x
