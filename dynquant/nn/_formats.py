"""Weight formats: how one float weight of a module is held, saved and multiplied with.

A module has a format object for each of its weights, beside the buffers that hold the tensors. A
format knows the weight's name and shape, and nothing of the module. It distinguishes three forms:

    rows     the float weight [N, K], one row for each output
    entries  what a state dict has of it, a dict by key
    held     what the ops take, a tuple of tensors: the module's buffers `buffers`, in this order
"""

import copy
import warnings

import torch

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import FLOAT_DTYPES, check_finite, check_row_qparams, check_scale
from dynquant.nn._state import Entry, is_float
from dynquant.ops.library import HALF_DTYPES
from dynquant.qconfig import bits_repr, per_channel, per_tensor, per_token

MAX_IN_FEATURES = 65536  # beyond it a sum could leave int32


class Format:
    """How the weight `name` is held.

    Args:
        name: of the float module's parameter.
        rows: the float weight [N, K].
        qconfig: a QConfig; None where the weight stays in float.

    Attributes:
        n, k: N and K.
        shape: that of the rows.
        keys: those of the entries.
        buffers: the names of the tensors that are held.
        float_shape: that of the float module's parameter.
        DTYPES: the dtypes of a config that select this format.
    """

    DTYPES = ()

    def __init__(self, name, rows, qconfig):
        self.name = name
        self.qconfig = qconfig
        self.n, self.k = rows.shape
        self.float_shape = tuple(rows.shape)
        self.keys = self.keys_of(name)
        self.buffers = self.buffers_of(name)

    @property
    def shape(self):
        return self.n, self.k

    @staticmethod
    def keys_of(name):
        raise NotImplementedError

    @staticmethod
    def buffers_of(name):
        raise NotImplementedError

    @staticmethod
    def settings(qconfig):
        """The attributes that a module with such weights has, by name."""
        return {}

    @staticmethod
    def check(key, rows):
        """Raises ValueError, naming the weight `key`, for rows that have no such form."""
        check_finite(key, rows)

    def holds_like(self, other):
        """Whether both hold rows of one shape as the same tensors."""
        raise NotImplementedError

    def quantized(self, rows, key):
        """The entries of float rows that `check` accepts. key: what a warning calls the weight."""
        raise NotImplementedError

    def expected(self):
        """The Entry of each key."""
        raise NotImplementedError

    def is_own(self, state_dict, prefix):
        """Whether a state dict has entries of this format, rather than the float weight."""
        return any(prefix + key in state_dict for key in self.keys)

    def held_of(self, entries, device):
        """What is held for `entries`, on the device."""
        return tuple(entries[key].to(device) for key in self.keys)

    def entries(self, held):
        return dict(zip(self.keys, held, strict=True))

    def values(self, held):
        """The rows, dequantized, in fp32 [rows, K]."""
        raise NotImplementedError

    def zeros(self, held):
        """What is held for rows of zeros, where `held` has the shapes but no values."""
        return tuple(torch.zeros_like(tensor) for tensor in held)

    def integers(self, held):
        """The integers that stand for the values, [rows, K]."""
        raise TypeError(f"{self.name} is held in {held[0].dtype}: it has no integers")

    def steps(self, held):
        """How far apart neighbouring values are, [rows, 1] or [1, 1]."""
        raise NotImplementedError

    def chunks(self, held):
        """The weight in parts of a few thousand rows, each a format and what it holds."""
        for first in range(0, self.n, _CHUNK):
            yield self.part(held, first, first + _CHUNK)

    def scaled(self, held, scaled):
        """What is held for the rows times a number, by which `scaled` multiplies a tensor."""
        return (*held[:-1], scaled(held[-1]))

    def part(self, held, first, last):
        """The format of the rows from `first` to before `last` alone, and what it holds."""
        one = copy.copy(self)
        one.n = max(0, min(last, self.n) - first)
        return one, self._held_part(held, first, last)

    def _held_part(self, held, first, last):
        return tuple(tensor[first:last] for tensor in held)

    def linear(self, x, held, bias):
        """x @ rows.T + bias, as a layer with this weight computes it."""
        raise NotImplementedError

    # How x is quantized: per_token, symmetric and activation_bits. It says nothing for float ones.
    scheme = (True, False, 8)

    def mixed(self, held):
        """The weight and its scale, or None, as the ops take them that mix formats."""
        return (*held, None)


class Int8(Format):
    """int8 [N, K], and fp32 scales [N] or [1]; packed for the kernels."""

    DTYPES = (torch.qint8,)

    def __init__(self, name, rows, qconfig):
        super().__init__(name, rows, qconfig)
        self.per_channel = qconfig.weight == per_channel
        self.per_token = qconfig.activation == per_token
        self.symmetric = qconfig.symmetric
        self.activation_bits = qconfig.activation_bits

    @property
    def scheme(self):
        return self.per_token, self.symmetric, self.activation_bits

    def mixed(self, held):
        return held

    @staticmethod
    def keys_of(name):
        return (f"{name}_int8", f"{name}_scale")

    @staticmethod
    def buffers_of(name):
        return (name.replace("weight", "packed", 1), f"{name}_scale")

    @staticmethod
    def settings(qconfig):
        return {
            "per_token": qconfig.activation == per_token,
            "symmetric": qconfig.symmetric,
            "activation_bits": qconfig.activation_bits,
        }

    @staticmethod
    def check(key, rows):
        if rows.shape[-1] > MAX_IN_FEATURES:
            raise ValueError(
                f"{key} has {rows.shape[-1]} columns; at most {MAX_IN_FEATURES} can be quantized "
                "exactly"
            )
        check_finite(key, rows)

    def holds_like(self, other):
        return type(other) is type(self) and other.per_channel == self.per_channel

    def quantized(self, rows, key):
        pair = torch.ops.dynquant.quantize_weight(rows, self.per_channel)
        return dict(zip(self.keys, pair, strict=True))

    def expected(self):
        integers = Entry((torch.int8,), (self.shape,))
        *lead, n, _ = self.shape
        scales = Entry((torch.float32,), ((*lead, n), (*lead, 1)), check_scale)
        return dict(zip(self.keys, (integers, scales), strict=True))

    def held_of(self, entries, device):
        integers, scale = super().held_of(entries, device)
        self.per_channel = scale.shape[-1] == self.n
        return self._packed(integers), scale

    def _packed(self, integers):
        return torch.ops.dynquant.pack_weight(integers)

    def entries(self, held):
        return dict(zip(self.keys, (self.integers(held), held[1]), strict=True))

    def values(self, held):
        return self.integers(held).to(torch.float32) * held[1][..., None]

    def integers(self, held):
        return torch.ops.dynquant.unpack_weight(held[0], self.n, self.k)

    def zeros(self, held):
        integers = torch.zeros(self.shape, dtype=torch.int8, device=held[0].device)
        return self._packed(integers), torch.zeros_like(held[1])

    def steps(self, held):
        return held[1][:, None]

    def _held_part(self, held, first, last):
        scale = held[1] if held[1].numel() == 1 else held[1][first:last]
        integers = self.integers(held)[first:last].contiguous()
        return torch.ops.dynquant.pack_weight(integers), scale

    def linear(self, x, held, bias):
        return torch.ops.dynquant.linear_dynamic(x, *held, bias, *self.scheme)

    def __str__(self):
        weight = per_channel if self.per_channel else per_tensor
        activation = per_token if self.per_token else per_tensor
        scheme = f"weight={weight}, activation={activation}, symmetric={self.symmetric}"
        return f"{scheme}{bits_repr(self)}"


class _FloatValues(Format):
    """The values themselves, under the name of the float module's parameter.

    HELD: the dtypes that they may have.
    """

    HELD = ()

    @staticmethod
    def keys_of(name):
        return (name,)

    def expected(self):
        return {self.name: Entry(self.HELD, (self.shape,))}

    def is_own(self, state_dict, prefix):
        return f"{prefix}version" in state_dict

    def values(self, held):
        return held[0].to(torch.float32)

    def steps(self, held):
        return 2 * torch.finfo(held[0].dtype).eps * self.values(held).abs()


class Bits16(_FloatValues):
    """fp16 or bf16 [N, K]."""

    DTYPES = HELD = HALF_DTYPES

    def __init__(self, name, rows, qconfig):
        super().__init__(name, rows, qconfig)
        self.dtype = qconfig.dtype

    @staticmethod
    def buffers_of(name):
        return (f"{name}_16bit",)

    def holds_like(self, other):
        return isinstance(other, Bits16) and other.dtype == self.dtype

    def quantized(self, rows, key):
        return {self.name: in_16_bits(rows, self.dtype, key)}

    def held_of(self, entries, device):
        (weight,) = super().held_of(entries, device)
        self.dtype = weight.dtype
        return (weight,)

    def linear(self, x, held, bias):
        return torch.ops.dynquant.linear_half(x, *held, bias)

    def __str__(self):
        return f"dtype={self.dtype}"


class Float(_FloatValues):
    """fp32, bf16 or fp16 [N, K], as in the float module."""

    HELD = FLOAT_DTYPES

    @staticmethod
    def buffers_of(name):
        return (f"{name}_float",)

    def holds_like(self, other):
        return isinstance(other, Float)

    def quantized(self, rows, key):
        return {self.name: rows.detach().clone(memory_format=torch.contiguous_format)}

    def linear(self, x, held, bias):
        bias = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, held[0].to(x.dtype), bias)

    def __str__(self):
        return "float"


def format_of(qconfig):
    """The class of the format that a config asks for; None asks for the float weight."""
    if qconfig is None:
        return Float
    return Bits16 if qconfig.dtype in Bits16.DTYPES else Int8


class Table(Format):
    """uint8 [V, D], or two values to a byte, and fp32 [V, 2]: scale and offset of each row.

    max_norm, norm_type: to what rows are shortened before they are quantized, as in nn.Embedding.
    """

    DTYPES = (torch.quint8, torch.quint4x2)

    def __init__(self, name, rows, qconfig, max_norm=None, norm_type=2.0):
        super().__init__(name, rows, qconfig)
        self.bits = 8 if qconfig.dtype == torch.quint8 else 4
        self.max_norm, self.norm_type = max_norm, norm_type

    @staticmethod
    def keys_of(name):
        return (f"{name}_uint8", f"{name}_qparams")

    buffers_of = keys_of

    @staticmethod
    def settings(qconfig):
        return {"bits": 8 if qconfig.dtype == torch.quint8 else 4}

    @staticmethod
    def check(key, rows):
        check_finite(key, rows)
        rows = rows.detach()
        if rows.numel() and not rows.is_meta:
            span = rows.amax(1).float() - rows.amin(1).float()
            if not span.isfinite().all():
                row = int(span.isinf().nonzero()[0])
                raise ValueError(f"{key}: row {row} spans more than fp32 can hold")

    def holds_like(self, other):
        norm = (self.bits, self.max_norm, self.norm_type)
        return isinstance(other, Table) and (other.bits, other.max_norm, other.norm_type) == norm

    def quantized(self, rows, key):
        if self.max_norm is not None and rows.numel() and not rows.is_meta:
            rows = rows.clone()
            every = torch.arange(len(rows), device=rows.device)
            torch.embedding_renorm_(rows, every, self.max_norm, self.norm_type)
        pair = torch.ops.dynquant.quantize_embedding(rows, self.bits)
        return dict(zip(self.keys, pair, strict=True))

    def expected(self):
        columns = self.k if self.bits == 8 else (self.k + 1) // 2
        rows = Entry((torch.uint8,), ((self.n, columns),))
        qparams = Entry((torch.float32,), ((self.n, 2),), check_row_qparams)
        return dict(zip(self.keys, (rows, qparams), strict=True))

    def values(self, held):
        every = torch.arange(len(held[0]), device=held[0].device)
        return torch.ops.dynquant.embedding(every, *held, self.bits, self.k, torch.float32)

    def integers(self, held):
        if self.bits == 8:
            return held[0]
        both = torch.stack([held[0] & 15, held[0] >> 4], -1)
        return both.flatten(1)[:, : self.k]

    def steps(self, held):
        return held[1][:, :1]

    def linear(self, x, held, bias):
        """With the dequantized values, of some rows after others: a table may be large."""
        parts, first = [], 0
        for part, rows in self.chunks(held):
            piece = None if bias is None else bias[first : first + part.n]
            parts.append(torch.nn.functional.linear(x, part.values(rows).to(x.dtype), piece))
            first += part.n
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def __str__(self):
        return f"bits={self.bits}"


_CHUNK = 4096  # rows that are dequantized at once


def are_alike(one, held, other, held_by_other):
    """Whether two formats can hold one float weight [N, K], each within its rounding.

    held, held_by_other: what they hold.
    """
    if one.shape != other.shape or held[0].is_meta or held_by_other[0].is_meta:
        return False
    eps = torch.finfo(torch.float32).eps
    parts = zip(one.chunks(held), other.chunks(held_by_other), strict=True)
    for (mine, rows), (theirs, others) in parts:
        values, other_values = mine.values(rows), theirs.values(others)
        # Half a step each, and what fp32 rounds off.
        bound = 0.501 * (mine.steps(rows) + theirs.steps(others)) + 2 * eps * values.abs()
        if not ((values - other_values).abs() <= bound).all():
            return False
    return True


def renamed_from_version_1(state_dict, prefix, formats):
    """`state_dict` with the integers of version 1, which had the float weight's name, renamed."""
    renamed = {}
    for one in formats:
        value = state_dict.get(prefix + one.name)
        is_old = isinstance(value, torch.Tensor) and not is_float(value)
        if is_old and one.keys[0] != one.name and prefix + one.keys[0] not in state_dict:
            renamed[prefix + one.name] = prefix + one.keys[0]
    if not renamed:
        return state_dict
    return {renamed.get(key, key): value for key, value in state_dict.items()}


def in_16_bits(weight, dtype, key="a weight"):
    """A copy of the finite float `weight` in the dtype, whose range it does not leave.

    Args:
        key: what the warning calls it.

    Warns:
        UserWarning: where values are beyond the range, which become the nearest finite ones.
    """
    largest = torch.finfo(dtype).max
    half = weight.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
    if not weight.is_meta and not half.isfinite().all():
        warnings.warn(
            f"{key} reaches {weight.abs().max():.4g}; {dtype} ends at {largest:.4g}, which "
            "stands for what is beyond (torch.bfloat16 has the range of fp32)",
            stacklevel=2,
        )
        half = half.clamp(-largest, largest)
    return half
