"""How one module is quantized: QConfig, and the forms in which users write one."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

per_channel = "per_channel"
per_token = "per_token"
per_tensor = "per_tensor"

WEIGHT_SCHEMES = (per_channel, per_tensor)
ACTIVATION_SCHEMES = (per_token, per_tensor)
ACTIVATION_BITS = (8, 16)

EIGHT_BITS = (torch.qint8, torch.quint8)
# Each dtype of a weight, with the dtypes that the activation beside it may name.
_ACTIVATION_DTYPES = {
    torch.qint8: EIGHT_BITS,
    torch.float16: (torch.float16, torch.float32),
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.quint8: (*EIGHT_BITS, torch.float32),
    torch.quint4x2: (torch.float32,),
}
DTYPES = tuple(_ACTIVATION_DTYPES)


@dataclass(frozen=True)
class QConfig:
    """How a module's weight and activation are quantized.

    Args:
        weight: 'per_channel' (one scale for each output) or 'per_tensor' (one scale).
        activation: 'per_token' (a range for each row, at each call) or 'per_tensor'.
        symmetric: whether the activation's range is centered on zero.
        dtype: torch.qint8; torch.float16, torch.bfloat16 (16-bit weights); torch.quint8,
            torch.quint4x2 (embeddings).
        dynamic: True quantizes at run time, also in a stub that has seen data; False asks for
            statistics, which a stub alone has; None leaves it to the module.
        activation_bits: 8, or 16 where 8 lose too much (outliers): asymmetric, exact, for int8
            weights.

    Raises:
        TypeError, ValueError: for an argument that is none of these.
    """

    weight: str = per_channel
    activation: str = per_token
    symmetric: bool = False
    dtype: torch.dtype = torch.qint8
    dynamic: bool | None = None
    activation_bits: int = 8

    def __post_init__(self):
        one_of("weight", self.weight, WEIGHT_SCHEMES)
        one_of("activation", self.activation, ACTIVATION_SCHEMES)
        one_of("dtype", self.dtype, DTYPES)
        if not isinstance(self.symmetric, bool):
            raise TypeError(f"symmetric must be a bool, not {self.symmetric!r}")
        if self.dynamic is not None and not isinstance(self.dynamic, bool):
            raise TypeError(f"dynamic must be a bool or None, not {self.dynamic!r}")
        if isinstance(self.activation_bits, bool) or not isinstance(self.activation_bits, int):
            raise TypeError(f"activation_bits must be 8 or 16, not {self.activation_bits!r}")
        one_of("activation_bits", self.activation_bits, ACTIVATION_BITS)
        if self.activation_bits != 8 and self.symmetric:
            raise ValueError("activation_bits is 16, but symmetric activations have 8 bits")
        if self.activation_bits != 8 and self.dtype != torch.qint8:
            raise ValueError(
                f"activation_bits is 16, but beside weights of {self.dtype} activations stay float"
            )


ConfigLike: TypeAlias = (
    QConfig | str | torch.dtype | Mapping[str, Any] | tuple[Any, Any] | type[nn.Module]
)
"""What parse_qconfig takes (a tuple is torch's QConfig), and the class QuantStub in a spec."""


def bits_repr(config: Any) -> str:
    """What extra_repr adds for activations in other than 8 bits; of a QConfig or a module."""
    bits = config.activation_bits
    return "" if bits == 8 else f", activation_bits={bits}"


def one_of(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    # Comparing a tensor or an array with a string does not give a plain bool.
    if not any(
        value is item or (isinstance(value, (str, int)) and value == item) for item in allowed
    ):
        listed = ", ".join(str(item) for item in allowed)
        raise ValueError(f"{name} is {value!r}; allowed: {listed}")


def parse_qconfig(
    config: ConfigLike, dtype: torch.dtype = torch.qint8, name: str = "qconfig"
) -> QConfig:
    """The QConfig that `config` means.

    Args:
        config: a QConfig; one of the constants per_channel, per_token, per_tensor; a dtype; a
            dict; or one of torch's own QConfig objects.
        dtype: what holds where `config` names no dtype.
        name: what messages call `config`.

    Raises:
        TypeError: for another type.
        ValueError: for an unknown key, scheme or dtype, or settings that contradict each other.
    """
    if isinstance(config, QConfig):
        return config
    if isinstance(config, str):
        one_of(name, config, (per_channel, per_token, per_tensor))
        if config == per_token:
            return QConfig(activation=config, dtype=dtype)
        return QConfig(weight=config, dtype=dtype)
    if isinstance(config, torch.dtype):
        one_of(name, config, DTYPES)
        return QConfig(dtype=config)
    if isinstance(config, Mapping):
        return _from_dict(config, dtype, name)
    if is_of_torch(config):
        return _from_dict(_observed(config, name), dtype, name)
    raise TypeError(
        f"{name} is {config!r}; expected a dynquant.QConfig, dynquant.per_channel, per_token or "
        "per_tensor, a dtype, a dict, or a torch QConfig"
    )


def is_of_torch(value: Any) -> bool:
    """Whether the value is a QConfig of torch's."""
    return isinstance(value, tuple) and getattr(value, "_fields", None) == ("activation", "weight")


def _from_dict(config, dtype, name):
    _known_keys(config, ("activation", "weight", "qscheme", "dtype", "dynamic"), name)
    weight = _part(config, "weight", name)
    activation = _part(config, "activation", name)
    weight_dtype = weight.get("dtype", config.get("dtype", dtype))
    one_of(f"{name}: the weight's dtype", weight_dtype, DTYPES)
    if "dtype" in activation:
        one_of(
            f"{name}['activation']['dtype'] (beside a weight of {weight_dtype})",
            activation["dtype"],
            _ACTIVATION_DTYPES[weight_dtype],
        )
    activation_scheme, symmetric = _activation_scheme(activation, f"{name}['activation']")
    return QConfig(
        weight=_weight_scheme(weight, config, weight_dtype, name),
        activation=activation_scheme,
        symmetric=symmetric,
        dtype=weight_dtype,
        dynamic=config.get("dynamic"),
        activation_bits=activation.get("bits", 8),
    )


def _known_keys(config, allowed, name):
    for key in config:
        if key not in allowed:
            raise ValueError(f"{name} has the key {key!r}; allowed: {', '.join(allowed)}")


def _part(config, key, name):
    part = config.get(key, {})
    if not isinstance(part, Mapping):
        raise TypeError(f"{name}[{key!r}] is {part!r}; expected a dict")
    allowed = ("dtype", "qscheme", "bits") if key == "activation" else ("dtype", "qscheme")
    _known_keys(part, allowed, f"{name}[{key!r}]")
    return part


def scheme(qscheme, name):
    """The granularity that `qscheme` names, and whether it is 'symmetric' or '..affine..'.

    The constants of dynquant name a granularity alone: their symmetry is ''.
    """
    if isinstance(qscheme, torch.qscheme):
        text = str(qscheme).removeprefix("torch.")
        granularity = "_".join(text.split("_")[:2])
        return granularity, text.removeprefix(f"{granularity}_")
    if qscheme not in (per_channel, per_token, per_tensor):
        raise ValueError(
            f"{name} is {qscheme!r}; allowed: dynquant.per_channel, per_token, per_tensor "
            "and torch's qschemes"
        )
    return qscheme, ""


def _weight_scheme(weight, config, dtype, name):
    part = "['weight']" if "qscheme" in weight else ""
    name = f"{name}{part}['qscheme']"
    qscheme = weight.get("qscheme", config.get("qscheme", per_channel))
    granularity, symmetry = scheme(qscheme, name)
    # The rows of a quantized embedding have an offset; every other weight has none.
    if symmetry.startswith("affine") and dtype not in (torch.quint8, torch.quint4x2):
        raise ValueError(f"{name} is {qscheme}, but weights are symmetric")
    one_of(f"{name} of a weight", granularity, WEIGHT_SCHEMES)
    return granularity


def _activation_scheme(activation, name):
    granularity, symmetry = scheme(activation.get("qscheme", per_token), f"{name}['qscheme']")
    one_of(f"{name}['qscheme'] of an activation", granularity, ACTIVATION_SCHEMES)
    return granularity, symmetry == "symmetric"


def _observed(config, name):
    """The dict that says what the observers of torch's QConfig say."""
    weight = _observer_settings(config.weight, f"{name}.weight")
    activation = _observer_settings(config.activation, f"{name}.activation")
    if weight is None:
        raise ValueError(f"{name}.weight is {config.weight!r}, which quantizes no weight")
    settings = {"weight": weight}
    if activation is not None:
        # Static observers are torch's default and say nothing about what is wanted.
        if activation.pop("is_dynamic"):
            settings["dynamic"] = True
        settings["activation"] = activation
    weight.pop("is_dynamic")
    return settings


def _observer_settings(factory, name):
    """dtype, qscheme and is_dynamic of the observer that `factory` makes; None for nn.Identity."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's observers warn of settings of torch's own
        observer = factory()
    if isinstance(observer, torch.nn.Identity):
        return None
    if not hasattr(observer, "dtype"):
        raise TypeError(f"{name} gives {observer!r}, which has no dtype: not an observer")
    settings = {"dtype": observer.dtype, "is_dynamic": getattr(observer, "is_dynamic", False)}
    if observer.dtype not in EIGHT_BITS:
        return settings
    low, high = getattr(observer, "quant_min", None), getattr(observer, "quant_max", None)
    # torch takes 7 bits where its kernels saturate (reduce_range); 8 bits do no harm there.
    if None not in (low, high) and high - low < 127:
        raise ValueError(f"{name} asks for the range {low} to {high}; 8 bits are available")
    if getattr(observer, "qscheme", None) is not None:
        settings["qscheme"] = observer.qscheme
    return settings
