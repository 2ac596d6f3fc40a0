"""Observer: the range of what passes."""

from functools import partial

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._move import moved
from dynquant.qconfig import one_of, per_channel, per_tensor, scheme


class Observer(nn.Module):
    """Returns its input unchanged and records the range seen.

    Args:
        dtype: torch.qint8, torch.quint8 or torch.bfloat16: what the range is recorded for.
        quant_scheme: dynquant.per_tensor, or dynquant.per_channel for one range for each index
            of dim 0; torch's qschemes of those names serve too.
        once: keep the range of the first call alone, instead of that of everything seen.

    Attributes:
        qmin, qmax: fp32, scalars for per_tensor, [size of dim 0] for per_channel. Before any
            input they are inf and -inf (per_channel: empty). An input without elements is no
            input. They are part of the state dict.

    Raises:
        ValueError: for another dtype or quant_scheme.
    """

    qmin: torch.Tensor
    qmax: torch.Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.qint8,
        quant_scheme: str | torch.qscheme = per_tensor,
        once: bool = False,
    ) -> None:
        super().__init__()
        one_of("dtype", dtype, (torch.qint8, torch.quint8, torch.bfloat16))
        granularity, _ = scheme(quant_scheme, "quant_scheme")
        one_of("quant_scheme", granularity, (per_tensor, per_channel))
        self.dtype = dtype
        self.quant_scheme = granularity
        self.once = once
        self.register_buffer("qmin", None)
        self.register_buffer("qmax", None)
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen."""
        shape = () if self.quant_scheme == per_tensor else (0,)
        device = None if self.qmin is None else self.qmin.device
        self.qmin = torch.full(shape, torch.inf, device=device)
        self.qmax = torch.full(shape, -torch.inf, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: a real tensor of any shape (per_channel: of one dimension or more)."""
        if x.numel():
            with torch.no_grad():
                self._observe(x.detach())
        return x

    def _observe(self, x):
        if self.quant_scheme == per_tensor:
            low, high = torch.aminmax(x)
        else:
            low, high = self._channel_ranges(x)
        unseen = self.qmin > self.qmax
        taken = unseen if self.once else torch.ones_like(unseen)
        # In place, because a buffer assigned in inference mode could not be changed outside it.
        # The comparisons of minimum and maximum keep a NaN.
        self.qmin.copy_(torch.where(taken, torch.minimum(self.qmin, low), self.qmin))
        self.qmax.copy_(torch.where(taken, torch.maximum(self.qmax, high), self.qmax))

    def _channel_ranges(self, x):
        if x.dim() == 0:
            raise ValueError("a per_channel Observer needs an input of one dimension or more")
        channels = x.shape[0]
        if self.qmin.shape[0] == 0:
            with torch.inference_mode(False):
                self.qmin = self.qmin.new_full((channels,), torch.inf)
                self.qmax = self.qmax.new_full((channels,), -torch.inf)
        if self.qmin.shape[0] != channels:
            raise ValueError(
                f"the Observer has seen {self.qmin.shape[0]} channels (dim 0); this input has "
                f"{channels}"
            )
        return torch.aminmax(x.reshape(channels, -1), dim=1)

    @property
    def has_data(self) -> bool:
        """Whether any input was seen."""
        return self.qmin.numel() > 0 and not bool((self.qmin > self.qmax).any())

    def calculate_qparams(
        self, symmetric: bool = False, bits: int = 8
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale (fp32) and zero point (int32) of the range seen, in qmin's shape.

        They are what dynquant quantizes 8 bits with: torch.ops.dynquant.quantize_with takes them.
        bfloat16 needs neither: its scale is 1 and its zero point 0.

        Raises:
            RuntimeError: when nothing was seen.
            ValueError: when NaN or Inf was seen.
        """
        if not self.has_data:
            raise RuntimeError("the Observer has seen no data")
        ends = torch.stack([self.qmin, self.qmax], dim=-1)
        if not ends.isfinite().all():
            raise ValueError("the Observer has seen NaN or Inf; reset() forgets it")
        if self.dtype == torch.bfloat16:
            return torch.ones_like(self.qmin), torch.zeros_like(self.qmin, dtype=torch.int32)
        return torch.ops.dynquant.choose_qparams(ends, True, symmetric, bits)

    def _apply(self, fn, recurse=True):
        return super()._apply(partial(moved, fn), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for key in ("qmin", "qmax"):
            value, held = state_dict.get(prefix + key), getattr(self, key)
            if value is not None and held.shape == (0,) and value.dim() == 1:
                setattr(self, key, torch.empty_like(value, dtype=held.dtype, device=held.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        once = ", once=True" if self.once else ""
        return f"dtype={self.dtype}, quant_scheme={self.quant_scheme}{once}"
