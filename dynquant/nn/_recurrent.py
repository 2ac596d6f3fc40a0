"""What recurrent layers and cells share: the weights of a direction, and the call of its op."""

import torch

import dynquant.rnn_ops  # noqa: F401 (registers the recurrent ops)
from dynquant.nn._checks import check_config, check_parameters
from dynquant.nn._packed import (
    PackedModule,
    check_weight,
    packed_from_float,
)
from dynquant.nn.weight import int8_weight
from dynquant.qconfig import QConfig, parse_qconfig, per_channel, per_tensor, per_token


class RecurrentModule(PackedModule):
    """A module whose weights come in directions: weight_ih{suffix}, weight_hh{suffix}, and so on.

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
        self.per_token = qconfig.activation == per_token
        self.symmetric = qconfig.symmetric
        self._suffixes = suffixes
        names = _parameter_names(mod, suffixes)
        weights, biases = {}, {}
        for name in names["weight"]:
            weight = getattr(mod, name)
            weights[name] = (*packed_from_float(weight, qconfig.weight), *weight.shape)
        for name in names["bias"]:
            bias = getattr(mod, name, None)
            biases[name] = None if bias is None else bias.detach().clone()
        self._hold(weights, biases, weight.dtype)

    @classmethod
    def from_float(cls, mod, qconfig=None):
        """The quantized form of `mod`, which is not changed and shares no memory with it.

        Args:
            mod: the float module, with weights in fp32, bf16 or fp16.
            qconfig: any form of a config; None means QConfig().

        Raises:
            ValueError: as check_float.
        """
        qconfig = QConfig() if qconfig is None else parse_qconfig(qconfig)
        cls.check_float(mod, qconfig)
        return cls(mod, cls._suffixes_of(mod), qconfig)

    @classmethod
    def check_float(cls, mod, qconfig, name=""):
        """Raises what stands against quantizing `mod`, naming its parameters after `name`.

        Raises:
            ValueError: for a parameter that holds NaN or Inf or has another dtype than fp32, bf16
                and fp16; for a weight of more than 65,536 columns; for a dtype of the config
                other than torch.qint8; for dynamic=False.
        """
        check_config(name, f"nn.{cls.FLOAT.__name__}", qconfig, cls.DTYPES)
        prefix = f"{name}." if name else ""
        names = _parameter_names(mod, cls._suffixes_of(mod))
        every = [*names["weight"], *names["bias"]]
        check_parameters({prefix + key: getattr(mod, key, None) for key in every})
        for key in names["weight"]:
            check_weight(prefix + key, getattr(mod, key))

    def __getattr__(self, name):
        shapes = self.__dict__.get("_shapes", {})
        if name in shapes:
            n, k = shapes[name]
            return int8_weight([(self._packed(name), n)], k)
        return super().__getattr__(name)

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
        # nn.Module.__getattr__ would cost 0.4 microseconds for each of these.
        buffers, parameters = self._buffers, self._parameters
        y, *states = op(
            x,
            *states,
            buffers[f"packed_ih{suffix}"],
            buffers[f"weight_ih{suffix}_scale"],
            parameters[f"bias_ih{suffix}"],
            buffers[f"packed_hh{suffix}"],
            buffers[f"weight_hh{suffix}_scale"],
            parameters[f"bias_hh{suffix}"],
            *self._more_arguments(suffix),
            batch_sizes,
            place % 2 == 1 and self.bidirectional,
            self.per_token,
            self.symmetric,
        )
        return y, states

    def _more_arguments(self, suffix):
        """What the op takes between the bias and the batch sizes."""
        return ()

    def _scheme_repr(self):
        per_row = self._is_per_channel(next(iter(self._shapes)))
        return (
            f", weight={per_channel if per_row else per_tensor}"
            f", activation={per_token if self.per_token else per_tensor}"
            f", symmetric={self.symmetric}"
        )


def _parameter_names(mod, suffixes):
    """Those of a float module's weights and of its biases, which may be None."""
    kinds = ["ih", "hh", "hr"] if getattr(mod, "proj_size", 0) else ["ih", "hh"]
    return {
        "weight": [f"weight_{kind}{suffix}" for suffix in suffixes for kind in kinds],
        "bias": [f"bias_{kind}{suffix}" for suffix in suffixes for kind in kinds[:2]],
    }
