"""nn.Embedding and nn.EmbeddingBag with tables in 8 or 4 bits."""

import torch

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._checks import (
    FLOAT_DTYPES,
    check_config,
    check_finite,
    check_parameters,
    check_row_qparams,
)
from dynquant.nn._plain import PlainState
from dynquant.nn._state import Entry, check_assigned
from dynquant.nn.weight import QuantizedTable
from dynquant.qconfig import QConfig, parse_qconfig

EMBEDDING_DTYPES = (torch.quint8, torch.quint4x2)

_embedding = torch.ops.dynquant.embedding.default
_embedding_bag = torch.ops.dynquant.embedding_bag.default


class _Table(PlainState):
    """What Embedding and EmbeddingBag share: the table, and how it is made."""

    DTYPES = EMBEDDING_DTYPES
    __jit_unused_properties__ = ("weight",)  # TorchScript reads the buffer of that name

    def __init__(self, mod, rows, qparams, dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim = mod.weight.shape
        self.padding_idx = mod.padding_idx
        self.max_norm, self.norm_type = mod.max_norm, mod.norm_type
        self.bits = 8 if dtype == torch.quint8 else 4
        self._buffers["weight"] = rows  # the property of that name reads it
        self.register_buffer("weight_qparams", qparams)
        self._set_placeholder(rows, mod.weight.dtype)
        self.eval()

    @classmethod
    def from_float(cls, mod, qconfig=None, tied_to=None):
        """The quantized form of `mod`, which is not changed and shares no memory with it.

        Rows that max_norm would shorten at each lookup are shortened once. scale_grad_by_freq and
        sparse, which concern gradients alone, have no meaning here.

        Args:
            mod: the float module, with a weight in fp32, bf16 or fp16.
            qconfig: any form of a config of dtype torch.quint8 (also where it is None) or
                torch.quint4x2.
            tied_to: what from_float gave for a module with the same weight and dtype, to share
                its table.

        Raises:
            ValueError: as check_float.
        """
        qconfig = parse_qconfig(qconfig or QConfig(dtype=torch.quint8))
        cls.check_float(mod, qconfig)
        bits = 8 if qconfig.dtype == torch.quint8 else 4
        norm = (mod.max_norm, mod.norm_type)
        if tied_to is None or (tied_to.max_norm, tied_to.norm_type) != norm:
            rows, qparams = _quantized(mod.weight, bits, *norm)
        else:
            rows, qparams = tied_to._buffers["weight"], tied_to._buffers["weight_qparams"]
        return cls(mod, rows, qparams, qconfig.dtype)

    @classmethod
    def check_float(cls, mod, qconfig, name=""):
        """Raises what stands against quantizing `mod`, naming its weight after `name`.

        Raises:
            ValueError: for a weight that holds NaN or Inf or a row that spans more than fp32 can
                hold, or of another dtype than fp32, bf16 and fp16; for a dtype other than
                torch.quint8 and torch.quint4x2; for dynamic=False.
        """
        check_config(name, f"nn.{cls.__name__}", qconfig, EMBEDDING_DTYPES)
        prefix = f"{name}." if name else ""
        check_parameters({f"{prefix}weight": mod.weight})
        _check_weight(f"{prefix}weight", mod.weight)

    def __setattr__(self, name, value):
        if name == "weight":
            self._assign_weight(value)
        else:
            super().__setattr__(name, value)

    def _assign_weight(self, value):
        """Takes a table, or quantizes a float weight, as where transformers ties tables again."""
        if isinstance(value, QuantizedTable):
            if (value.bits, value.width, len(value)) == (self.bits, *self._shape()[::-1]):
                self._buffers["weight"] = value.as_subclass(torch.Tensor)
                self._buffers["weight_qparams"] = value.qparams
                return
            value = value.dequantized()
        check_assigned("weight", value, self._float_entries()["weight"])
        with torch.inference_mode(False), torch.no_grad():
            found = {"weight": value.detach()}
            self._convert(found, "weight", "")
            self._buffers.update(found)

    def _shape(self):
        return self.num_embeddings, self.embedding_dim

    @property
    def weight(self):
        """The rows as they are held, a QuantizedTable. Assigning a float weight quantizes it."""
        buffers = self._buffers
        return QuantizedTable.of(
            buffers["weight"], buffers["weight_qparams"], self.bits, self.embedding_dim
        )

    @property
    def weight_scale(self):
        """fp32 [num_embeddings]."""
        return self.weight_qparams[:, 0]

    @property
    def weight_offset(self):
        """fp32 [num_embeddings]."""
        return self.weight_qparams[:, 1]

    def _entries(self):
        return {
            "weight": Entry((torch.uint8,), (tuple(self._buffers["weight"].shape),)),
            "weight_qparams": Entry(
                (torch.float32,), ((self.num_embeddings, 2),), check_row_qparams
            ),
        }

    def _weight_names(self):
        return ["weight"]

    def _float_entries(self):
        return {"weight": Entry(FLOAT_DTYPES, (self._shape(),))}

    def _convert(self, found, name, prefix):
        _check_weight(prefix + name, found[name])
        found[name], found["weight_qparams"] = _quantized(
            found[name], self.bits, self.max_norm, self.norm_type
        )

    def _table(self):
        """The op's arguments about the table and the output's dtype."""
        buffers = self._buffers
        dtype = self._parameters["placeholder"].dtype
        return buffers["weight"], buffers["weight_qparams"], self.bits, self.embedding_dim, dtype

    def extra_repr(self):
        shape = f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{shape}{padding}"


class Embedding(_Table):
    """nn.Embedding with a table in 8 or 4 bits, each row with its own scale and offset.

    Made by from_float, which quantize_dynamic calls for dtype torch.quint8 or torch.quint4x2. The
    indices are int64 or int32 of any shape; the output has the dtype of the float weight, or that
    to which the model is cast later. torch.ops.dynquant.quantize_embedding and embedding specify
    the numbers. padding_idx concerns gradients alone.

    The state dict has weight (uint8 [V, D]; in 4 bits [V, (D + 1) // 2], two values to a byte, the
    first in the lower four bits), weight_qparams (fp32 [V, 2]: scale, offset) and version (int64).
    load_state_dict also takes what the float module has, whose weight is then quantized.

    Attributes:
        num_embeddings, embedding_dim: V and D.
        padding_idx, max_norm, norm_type: as in nn.Embedding.
        bits: 8 or 4.
        weight, weight_qparams: the table, as in the state dict; weight_scale and weight_offset are
            views of weight_qparams.
    """

    def forward(self, input):
        if torch.jit.is_scripting():
            return torch.ops.dynquant.embedding(
                input,
                self.weight,
                self.weight_qparams,
                self.bits,
                self.embedding_dim,
                self.placeholder.dtype,
            )
        return _embedding(input, *self._table())


class EmbeddingBag(_Table):
    """nn.EmbeddingBag with a table in 8 or 4 bits, each row with its own scale and offset.

    Everything that Embedding says holds; forward is called as nn.EmbeddingBag's, with all its
    modes. Sums are computed in fp32 in the order of the indices, as
    torch.ops.dynquant.embedding_bag specifies, and then rounded to the output's dtype.
    per_sample_weights get no gradient: such that ask for one are an error.

    Attributes (besides those of Embedding):
        mode: 'sum', 'mean' or 'max'.
        include_last_offset: whether offsets end with the number of indices.
        padding_idx: an index that is left out of the bags, or None.
    """

    def __init__(self, mod, rows, qparams, dtype):
        super().__init__(mod, rows, qparams, dtype)
        self.mode = mod.mode
        self.include_last_offset = mod.include_last_offset

    def forward(
        self,
        input,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ):
        asks = per_sample_weights is not None and per_sample_weights.requires_grad
        if asks and torch.is_grad_enabled():
            raise RuntimeError(
                "per_sample_weights ask for a gradient, which a quantized EmbeddingBag does not "
                "give; detach them"
            )
        mode = ["sum", "mean", "max"].index(self.mode)
        padding_idx = self.padding_idx
        left_out = -1 if padding_idx is None else padding_idx
        if torch.jit.is_scripting():
            return torch.ops.dynquant.embedding_bag(
                input,
                self.weight,
                self.weight_qparams,
                self.bits,
                self.embedding_dim,
                self.placeholder.dtype,
                offsets,
                per_sample_weights,
                mode,
                self.include_last_offset,
                left_out,
            )
        include_last_offset = self.include_last_offset
        if input.is_nested:
            offsets, include_last_offset = input.offsets(), True
            input = input.values()
            if per_sample_weights is not None:
                per_sample_weights = per_sample_weights.values()
        return _embedding_bag(
            input,
            *self._table(),
            offsets,
            per_sample_weights,
            mode,
            include_last_offset,
            left_out,
        )

    def extra_repr(self):
        return f"{super().extra_repr()}, mode={self.mode}"


def _check_weight(key, weight):
    """Raises ValueError for a float table [V, D] that cannot be quantized."""
    check_finite(key, weight)
    weight = weight.detach()
    if weight.numel() and not weight.is_meta:
        span = weight.amax(1).float() - weight.amin(1).float()
        if not span.isfinite().all():
            row = int(span.isinf().nonzero()[0])
            raise ValueError(f"{key}: row {row} spans more than fp32 can hold")


def _quantized(weight, bits, max_norm, norm_type):
    """The rows and qparams of a float table [V, D], which is not changed."""
    weight = weight.detach()
    if max_norm is not None and weight.numel() and not weight.is_meta:
        weight = weight.clone()
        every = torch.arange(len(weight), device=weight.device)
        torch.embedding_renorm_(weight, every, max_norm, norm_type)
    return torch.ops.dynquant.quantize_embedding(weight, bits)
