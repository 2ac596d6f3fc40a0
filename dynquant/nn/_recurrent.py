"""What recurrent layers and cells share: the weights of a direction, and the call of its op."""

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import check_config, check_parameters
from dynquant.nn._half import HalfState, in_16_bits
from dynquant.nn._packed import PackedModule, check_weight, packed_from_float, packed_name
from dynquant.nn.weight import int8_weight
from dynquant.qconfig import (
    QConfig,
    bits_repr,
    parse_qconfig,
    per_channel,
    per_tensor,
    per_token,
)


class Recurrent:
    """A module whose weights come in directions: weight_ih{suffix}, weight_hh{suffix}, and so on.

    What holds the weights is for another base class to tell: Int8Weights or HalfWeights, which
    come after this one.

    Attributes:
        FLOAT: the float module's type.
        COPIED: what is copied of the float module.
        OP: the op of one direction of one layer.
    """

    FLOAT = None
    COPIED = ()
    OP = None

    bidirectional = False

    def __init__(self, mod, suffixes, qconfig):
        super().__init__()
        for key in self.COPIED:
            setattr(self, key, getattr(mod, key))
        self._suffixes = suffixes
        names = _parameter_names(mod, suffixes)
        weights = {name: getattr(mod, name).detach() for name in names["weight"]}
        biases = {}
        for name in names["bias"]:
            bias = getattr(mod, name, None)
            biases[name] = None if bias is None else bias.detach().clone()
        self._hold_float(weights, biases, qconfig)

    @classmethod
    def from_float(cls, mod, qconfig=None):
        """The quantized form of `mod`, which is not changed and shares no memory with it.

        Args:
            mod: the float module, with weights in fp32, bf16 or fp16.
            qconfig: any form of a config; None means QConfig() of the first of DTYPES.

        Raises:
            ValueError: as check_float.
        """
        qconfig = QConfig(dtype=cls.DTYPES[0]) if qconfig is None else parse_qconfig(qconfig)
        cls.check_float(mod, qconfig)
        return cls(mod, cls._suffixes_of(mod), qconfig)

    @classmethod
    def check_float(cls, mod, qconfig, name=""):
        """Raises what stands against quantizing `mod`, naming its parameters after `name`.

        Raises:
            ValueError: for a parameter that holds NaN or Inf or has another dtype than fp32, bf16
                and fp16; for an int8 weight of more than 65,536 columns; for a dtype of the config
                that is not in DTYPES; for dynamic=False.
        """
        check_config(name, f"nn.{cls.FLOAT.__name__}", qconfig, cls.DTYPES)
        prefix = f"{name}." if name else ""
        names = _parameter_names(mod, cls._suffixes_of(mod))
        every = [*names["weight"], *names["bias"]]
        check_parameters({prefix + key: getattr(mod, key, None) for key in every})
        for key in names["weight"]:
            cls.check_weight(prefix + key, getattr(mod, key))

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
        op = self.OP.default if wants_gradient else self.OP.inference
        suffix = self._suffixes[place]
        parameters = self._parameters  # nn.Module.__getattr__ would cost 0.4 microseconds for each
        y, *states = op(
            x,
            *states,
            *self._held_form(f"weight_ih{suffix}"),
            parameters[f"bias_ih{suffix}"],
            *self._held_form(f"weight_hh{suffix}"),
            parameters[f"bias_hh{suffix}"],
            *self._more_arguments(suffix),
            batch_sizes,
            place % 2 == 1 and self.bidirectional,
            *self._scheme(),
        )
        return y, states

    def _more_arguments(self, suffix):
        """What the op takes between the bias and the batch sizes."""
        return ()


class Int8Weights(PackedModule):
    """The int8 weights of a Recurrent, and how the input and the states are quantized."""

    activation_bits = 8  # of what was pickled before there were others

    check_weight = staticmethod(check_weight)

    def _hold_float(self, weights, biases, qconfig):
        self.per_token = qconfig.activation == per_token
        self.symmetric = qconfig.symmetric
        self.activation_bits = qconfig.activation_bits
        packed = {
            name: (*packed_from_float(weight, qconfig.weight), *weight.shape)
            for name, weight in weights.items()
        }
        self._hold(packed, biases, next(iter(weights.values())).dtype)

    def __getattr__(self, name):
        shapes = self.__dict__.get("_shapes", {})
        if name in shapes:
            n, k = shapes[name]
            return int8_weight([(self._packed(name), n)], k)
        return super().__getattr__(name)

    def _held_form(self, name):
        """What an op takes for the weight `name`, which need not be there."""
        return self._buffers.get(packed_name(name)), self._buffers.get(f"{name}_scale")

    def _scheme(self):
        """What an op takes last."""
        return self.per_token, self.symmetric, self.activation_bits

    def _scheme_repr(self):
        per_row = self._is_per_channel(next(iter(self._shapes)))
        return (
            f", weight={per_channel if per_row else per_tensor}"
            f", activation={per_token if self.per_token else per_tensor}"
            f", symmetric={self.symmetric}{bits_repr(self)}"
        )


class HalfWeights(HalfState):
    """The 16-bit weights of a Recurrent."""

    def _hold_float(self, weights, biases, qconfig):
        for name, weight in weights.items():
            self.register_buffer(name, in_16_bits(weight, qconfig.dtype))
        for name, bias in biases.items():
            bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
            self.register_parameter(name, bias)
        self._set_placeholder(weight, weight.dtype)
        self.eval()

    def _held_form(self, name):
        return (self._buffers.get(name),)

    def _scheme(self):
        return ()

    def _scheme_repr(self):
        return f", dtype={next(iter(self._buffers.values())).dtype}"


def _parameter_names(mod, suffixes):
    """Those of a float module's weights and of its biases, which may be None."""
    kinds = ["ih", "hh", "hr"] if getattr(mod, "proj_size", 0) else ["ih", "hh"]
    return {
        "weight": [f"weight_{kind}{suffix}" for suffix in suffixes for kind in kinds],
        "bias": [f"bias_{kind}{suffix}" for suffix in suffixes for kind in kinds[:2]],
    }


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
