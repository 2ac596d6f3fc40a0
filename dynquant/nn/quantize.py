"""Quantize and DeQuantize, and the quantized form that a tensor may remember."""

import weakref
from collections import OrderedDict
from functools import partial

import torch
from torch import nn
from torch.fx import Proxy
from typing_extensions import Self

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import check_scale
from dynquant.nn._fx import as_one_call
from dynquant.nn._move import moved
from dynquant.nn._script import no_script
from dynquant.nn._state import Entry, errors_in
from dynquant.qconfig import (
    EIGHT_BITS,
    ConfigLike,
    QConfig,
    bits_repr,
    one_of,
    parse_qconfig,
    per_token,
)
from dynquant.stubs import DeQuantStub, QuantStub

# Of the state dict, where there is a calibration.
_ENTRIES = {
    "scale": Entry((torch.float32,), ((1,),), check_scale),
    "zero_point": Entry((torch.int32,), ((1,),)),
}
_REMEMBERS = "makes tensors remember their quantized form"


class QuantizedForm:
    """The integers that a float tensor stands for: float = (q - zero_point) * scale.

    q is uint8, int8 or uint16 of the tensor's shape; scale (fp32) and zero_point (int32) have the
    shape x.shape[:-1] or [1].
    """

    __slots__ = ("q", "scale", "zero_point", "_tensor", "_version", "_address")

    def __init__(self, q, scale, zero_point, tensor):
        self.q = q
        self.scale = scale
        self.zero_point = zero_point
        self._tensor = weakref.ref(tensor)
        self._version = tensor._version
        self._address = tensor.data_ptr()

    def holds_for(self, tensor):
        """False for a copy, and once the tensor was changed in place or given other data."""
        return (
            self._tensor() is tensor
            and tensor._version == self._version
            and tensor.data_ptr() == self._address
        )

    def __reduce__(self):
        # Pickling and torch.save keep a tensor's attributes. What stands in for this one is a
        # type that torch.load(weights_only=True) knows.
        return OrderedDict, ()


def remembered(tensor):
    """The QuantizedForm that `tensor` remembers and that still holds for it, or None."""
    form = getattr(tensor, "_dynquant_form", None)
    if form is None or torch.compiler.is_compiling():
        return None
    return form if isinstance(form, QuantizedForm) and form.holds_for(tensor) else None


def _can_remember(tensor):
    # Fake and meta tensors have no address.
    plain = type(tensor) is torch.Tensor and not tensor.is_meta
    return plain and not torch.compiler.is_compiling()


class _StraightThrough(torch.autograd.Function):
    """Gives `rounded`, as if it were x."""

    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class Quantize(nn.Module):
    """Rounds a float tensor to 8 or 16 bits; quantized linears that take it share the integers.

    The result is an ordinary float tensor of x's shape and dtype, (q - zero_point) * scale, which
    any module or operator takes. It also remembers q, scale and zero_point, and dynquant.nn.Linear
    uses those instead of quantizing again. It forgets them once it is changed in place, in
    inference mode too; what autograd does not notice either (a write through .data or .numpy(), or
    from another process) goes unnoticed. Copies, views and results of operators
    remember nothing. Under torch.compile and torch.export there is the float tensor alone.

    With scale and zero_point (a calibrated QuantStub's) every x is quantized by them, and a row
    with NaN gives NaN; without, each x gives its own. The gradient passes through unchanged.

    Args:
        qconfig: its activation scheme, symmetry, activation_bits and `dynamic` count.
        scale, zero_point: fp32 [1] and int32 [1], or None.
    """

    def __init__(
        self,
        qconfig: ConfigLike | None = None,
        scale: torch.Tensor | None = None,
        zero_point: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.qconfig = QConfig() if qconfig is None else parse_qconfig(qconfig)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.eval()

    @classmethod
    def from_float(cls, mod: nn.Module, qconfig: ConfigLike | None = None) -> Self:
        """What a dynquant.QuantStub becomes; the stub's own qconfig comes before `qconfig`.

        A stub that has seen data gives its statistics, unless the config says 'dynamic': True.
        """
        qconfig = mod.qconfig or (QConfig() if qconfig is None else parse_qconfig(qconfig))
        if qconfig.dynamic is True or mod.observer is None or not mod.observer.has_data:
            return cls(qconfig)
        scale, zero_point = mod.observer.calculate_qparams(
            qconfig.symmetric, qconfig.activation_bits
        )
        return cls(qconfig, scale.reshape(1), zero_point.reshape(1))

    def to_float(self) -> nn.Module:
        """A dynquant.QuantStub with the same config; one that is to see data where this one has."""
        stub = QuantStub()
        if self.scale is None:
            stub.qconfig = self.qconfig
        else:
            stub.observe(self.qconfig)
        return stub.train(self.training)

    @classmethod
    def check_float(cls, mod: nn.Module, qconfig: QConfig, name: str = "") -> None:
        """Raises ValueError, naming the stub, where from_float cannot give its form."""
        if mod.qconfig is None:
            one_of(f"{name}: a QuantStub's dtype", qconfig.dtype, EIGHT_BITS)
        try:
            cls.from_float(mod, qconfig)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def __prepare_scriptable__(self):
        raise no_script(self, _REMEMBERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: fp32, bf16 or fp16 [..., K] -> the same shape and dtype."""
        if not isinstance(x, torch.Tensor):
            return as_one_call(self, x)
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return self._round(x)
        # A tensor made in inference mode does not count its changes; one made outside does so
        # inside too.
        with torch.inference_mode(False), torch.no_grad():
            return self._round(x)

    def _round(self, x):
        with torch.no_grad():
            q, scale, zero_point = self._quantize(x)
            result = self._dequantize(q, scale, zero_point).to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            result = _StraightThrough.apply(x, result)
        if _can_remember(result):
            result._dynquant_form = QuantizedForm(q, scale, zero_point, result)
        return result

    def _quantize(self, x):
        qconfig = self.qconfig
        if self.scale is None:
            return torch.ops.dynquant.quantize_activation(
                x, qconfig.activation == per_token, qconfig.symmetric, qconfig.activation_bits
            )
        q = torch.ops.dynquant.quantize_with(
            x, self.scale, self.zero_point, qconfig.symmetric, qconfig.activation_bits
        )
        scale = torch.where(x.isnan().any(-1), torch.nan, self.scale.squeeze(0))
        return q, scale, self.zero_point.squeeze(0).expand(scale.shape)

    def _dequantize(self, q, scale, zero_point):
        if self.scale is not None or self.qconfig.activation == per_token:
            scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
        return (q.to(torch.int32) - zero_point).to(torch.float32) * scale

    def _apply(self, fn, recurse=True):
        return super()._apply(partial(moved, fn), recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        found = {key: state_dict[prefix + key] for key in _ENTRIES if prefix + key in state_dict}
        errors = errors_in(found, _ENTRIES, prefix)
        if self.scale is not None and len(found) == 1:
            errors.append(f"{prefix}{', '.join(found)} alone: scale and zero_point come together")
        if errors:
            args[-1].extend(errors)
            return
        if self.scale is None and self.qconfig.dynamic is not True and len(found) == 2:
            for key, value in found.items():
                self._buffers[key] = torch.empty_like(value)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        when = "dynamic" if self.scale is None else "calibrated"
        symmetry = "symmetric" if self.qconfig.symmetric else "asymmetric"
        return f"{self.qconfig.activation}, {symmetry}, {when}{bits_repr(self.qconfig)}"


class DeQuantize(nn.Module):
    """Gives a tensor that remembers no quantized form: itself, unless it came from Quantize."""

    def __init__(self) -> None:
        super().__init__()
        self.eval()

    @classmethod
    def from_float(cls, mod: nn.Module) -> Self:
        """What a dynquant.DeQuantStub becomes."""
        return cls()

    def to_float(self) -> nn.Module:
        """A dynquant.DeQuantStub."""
        return DeQuantStub().train(self.training)

    def __prepare_scriptable__(self):
        raise no_script(self, _REMEMBERS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if isinstance(x, Proxy):
            return as_one_call(self, x)
        return x if remembered(x) is None else x.view_as(x)
