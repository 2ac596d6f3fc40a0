"""What recurrent layers and cells share: the weights of a direction, and the call of its op."""

from collections.abc import Mapping

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._formats import Float, Format, Int8, format_of
from dynquant.nn._module import QuantizedModule
from dynquant.nn._products import Products
from dynquant.qconfig import QConfig


class Recurrent(Products, QuantizedModule):
    """A module whose weights come in directions: weight_ih{suffix}, weight_hh{suffix}, and so on.

    Each weight belongs to a product of its own, which may have a config of its own.

    Attributes:
        OP: the op of one direction of one layer.
        MIXED: the op that takes weights of different formats.
    """

    OP = None

    bidirectional = False

    def __init__(
        self,
        mod: nn.Module,
        qconfig: QConfig,
        tied_to: nn.Module | None = None,
        products: Mapping[str, QConfig | None] | None = None,
    ) -> None:
        self.__dict__["_products"] = products
        super().__init__(mod, qconfig, tied_to)
        self._suffixes = self._suffixes_of(mod)
        # The op of one format takes one way to quantize for all products.
        kinds = {(type(one), one.scheme) for one in self._formats.values()}
        self._is_mixed = len(kinds) > 1 or Float in {kind for kind, _ in kinds}

    @classmethod
    def _products(cls, mod):
        return {name: (name, weight) for name, weight in cls._float_parameters(mod)[0].items()}

    def config_of(self, product: str) -> QConfig | None:
        return self._formats[product].qconfig

    def _format_of(self, name, rows, qconfig, mod):
        products = self._products
        if not products:
            return super()._format_of(name, rows, qconfig, mod)
        config = products.get(name, qconfig)
        return format_of(config)(name, rows, config)

    @staticmethod
    def _suffixes_of(mod):
        """The ends of the parameters' names, for each direction."""
        raise NotImplementedError

    @classmethod
    def _float_parameters(cls, mod):
        kinds = ["ih", "hh", "hr"] if getattr(mod, "proj_size", 0) else ["ih", "hh"]
        suffixes = cls._suffixes_of(mod)
        weights = [f"weight_{kind}{suffix}" for suffix in suffixes for kind in kinds]
        biases = [f"bias_{kind}{suffix}" for suffix in suffixes for kind in kinds[:2]]
        return (
            {name: getattr(mod, name) for name in weights},
            {name: getattr(mod, name, None) for name in biases},
        )

    def _float_module(self):
        kind = getattr(nn, self.FLOAT.removeprefix("nn."))
        settings = {key: getattr(self, key) for key in self.COPIED if key != "mode"}
        if kind not in (nn.LSTM, nn.GRU, nn.RNN):
            return kind(**settings)
        projected = settings.pop("proj_size")
        return kind(**settings, **({"proj_size": projected} if projected else {}))

    def _direction(self, x, states, place, batch_sizes=None):
        """One direction of one layer.

        Args:
            x: [T, B, K], or [rows, K] where there are batch_sizes.
            states: those before the first step, each [B, size].
            place: counts the directions of all layers.

        Returns:
            the output of every step, and the states after the last one.
        """
        # The op without a gradient costs less to call.
        wants_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(state.requires_grad for state in states)
        )
        op = self.MIXED if self._is_mixed else self.OP
        op = op.default if wants_gradient else op.inference
        suffix = self._suffixes[place]
        parameters = self._parameters  # nn.Module.__getattr__ would cost 0.4 microseconds for each
        y, *states = op(
            x,
            *states,
            *self._arguments(f"weight_ih{suffix}"),
            parameters[f"bias_ih{suffix}"],
            *self._arguments(f"weight_hh{suffix}"),
            parameters[f"bias_hh{suffix}"],
            *self._more_arguments(suffix),
            batch_sizes,
            place % 2 == 1 and self.bidirectional,
            *(self._schemes(suffix) if self._is_mixed else self._scheme()),
        )
        return y, states

    def _arguments(self, name):
        """What the op takes for the weight `name`, which need not be there."""
        if self._is_mixed:
            one = self._formats.get(name)
            return (None, None) if one is None else one.mixed(self._held(name))
        return [self._buffers.get(key) for key in self.FORMAT.buffers_of(name)]

    def _more_arguments(self, suffix):
        """What the op takes between the bias and the batch sizes."""
        return ()

    def _scheme(self):
        """What the op takes last."""
        return ()

    def _schemes(self, suffix):
        """What the op of mixed formats takes last."""
        parts = ("ih", "hh", "hr") if self.MIXED is torch.ops.dynquant.lstm_mixed else ("ih", "hh")
        formats = (self._formats.get(f"weight_{part}{suffix}") for part in parts)
        return [value for one in formats for value in (Format if one is None else one).scheme]

    def _format_repr(self):
        if self._is_mixed:
            return "".join(f", {name}=({one})" for name, one in self._formats.items())
        return f", {next(iter(self._formats.values()))}"


class Int8Scheme:
    """What a Recurrent with int8 weights has: how the input and the states are quantized."""

    FORMAT = Int8
    DTYPES = Int8.DTYPES

    def _scheme(self):
        return self.per_token, self.symmetric, self.activation_bits


def check_states(module, hx, count):
    """Raises TypeError unless hx is a tensor, or a tuple or list of `count` tensors beyond one."""
    states = [hx] if count == 1 else hx
    is_right = isinstance(states, (tuple, list)) and len(states) == count
    if is_right and all(isinstance(state, torch.Tensor) for state in states):
        return
    wanted = "a tensor" if count == 1 else "a tuple of two tensors, (h_0, c_0)"
    found = type(hx).__name__
    if isinstance(hx, (tuple, list)):
        found += f" of {', '.join(type(state).__name__ for state in hx) or 'nothing'}"
    raise TypeError(f"{type(module).__name__}: hx must be {wanted}, got {found}")
