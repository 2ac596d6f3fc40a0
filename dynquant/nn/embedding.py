"""nn.Embedding and nn.EmbeddingBag with tables in 8 or 4 bits."""

import torch
from torch import nn

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)
from dynquant.nn._formats import Table
from dynquant.nn._fx import TENSOR_OR_NONE, as_one_call
from dynquant.nn._module import QuantizedModule
from dynquant.nn._torch_ao import with_plain_table
from dynquant.qconfig import QConfig

_embedding = torch.ops.dynquant.embedding.default
_embedding_bag = torch.ops.dynquant.embedding_bag.default


class _EmbeddingTable(QuantizedModule):
    """What Embedding and EmbeddingBag share.

    Rows that max_norm would shorten at each lookup are shortened once. scale_grad_by_freq and
    sparse, which concern gradients alone, have no meaning here.
    """

    FORMAT = Table
    DTYPES = Table.DTYPES
    COPIED = ("padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")

    def __init__(self, mod: nn.Module, qconfig: QConfig, tied_to: nn.Module | None = None) -> None:
        super().__init__(mod, qconfig, tied_to)
        self.num_embeddings, self.embedding_dim = mod.weight.shape

    @classmethod
    def _float_parameters(cls, mod):
        return {"weight": mod.weight}, {}

    @classmethod
    def _format_of(cls, name, rows, qconfig, mod):
        return Table(name, rows, qconfig, mod.max_norm, mod.norm_type)

    def _translated(self, state_dict, prefix):
        return with_plain_table(state_dict, prefix, self.bits, self.embedding_dim)

    @property
    def weight(self) -> torch.Tensor:
        if torch.jit.is_scripting():
            every = torch.arange(self.num_embeddings, device=self.weight_uint8.device)
            return torch.ops.dynquant.embedding(every, *self._table())
        return self._weight("weight")

    @property
    def weight_scale(self) -> torch.Tensor:
        """fp32 [num_embeddings]."""
        return self.weight_qparams[:, 0]

    @property
    def weight_offset(self) -> torch.Tensor:
        """fp32 [num_embeddings]."""
        return self.weight_qparams[:, 1]

    def _table(self):
        """The op's arguments about the table and the output's dtype."""
        if torch.jit.is_scripting():
            rows, qparams, dtype = self.weight_uint8, self.weight_qparams, self.placeholder.dtype
        else:  # nn.Module.__getattr__ would cost 0.4 microseconds for each
            rows, qparams = self._buffers["weight_uint8"], self._buffers["weight_qparams"]
            dtype = self._parameters["placeholder"].dtype
        return rows, qparams, self.bits, self.embedding_dim, dtype

    def extra_repr(self) -> str:
        shape = f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{shape}{padding}"


class Embedding(_EmbeddingTable):
    """nn.Embedding with a table in 8 or 4 bits, each row with its own scale and offset.

    Made by from_float, which quantize_dynamic calls for dtype torch.quint8 or torch.quint4x2. The
    indices are int64 or int32 of any shape; the output has the dtype of the float weight, or that
    to which the model is cast later. torch.ops.dynquant.quantize_embedding and embedding specify
    the numbers. padding_idx concerns gradients alone.

    The state dict has weight_uint8 (uint8 [V, D]; in 4 bits [V, (D + 1) // 2], two values to a
    byte, the first in the lower four bits), weight_qparams (fp32 [V, 2]: scale, offset) and version
    (int64).
    load_state_dict also takes what the float module has, whose weight is then quantized, and what
    torch.ao's Embedding of as many bits saves.

    Attributes:
        num_embeddings, embedding_dim: V and D.
        padding_idx, max_norm, norm_type: as in nn.Embedding.
        bits: 8 or 4.
        weight: a QuantizedWeight, of the float module's shape and dtype. Assigning a float weight
            quantizes it.
        weight_uint8, weight_qparams: the table, as in the state dict; weight_scale and
            weight_offset are views of weight_qparams.
    """

    FLOAT = "nn.Embedding"

    def _float_module(self):
        settings = {key: getattr(self, key) for key in self.COPIED}
        return nn.Embedding(self.num_embeddings, self.embedding_dim, **settings)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.dynquant.embedding(input, *self._table())
        if not isinstance(input, torch.Tensor):
            return as_one_call(self, input)
        return _embedding(input, *self._table())


class EmbeddingBag(_EmbeddingTable):
    """nn.EmbeddingBag with a table in 8 or 4 bits, each row with its own scale and offset.

    Everything that Embedding says holds; forward is called as nn.EmbeddingBag's, with all its
    modes. Sums are computed in fp32 in the order of the indices, as
    torch.ops.dynquant.embedding_bag specifies, and then rounded to the output's dtype.
    per_sample_weights get no gradient: it is an error if they require one.

    Attributes (besides those of Embedding):
        mode: 'sum', 'mean' or 'max'.
        include_last_offset: whether offsets end with the number of indices.
        padding_idx: an index that is left out of the bags, or None.
    """

    FLOAT = "nn.EmbeddingBag"
    COPIED = (*_EmbeddingTable.COPIED, "mode", "include_last_offset")

    def _float_module(self):
        settings = {key: getattr(self, key) for key in self.COPIED}
        return nn.EmbeddingBag(self.num_embeddings, self.embedding_dim, **settings)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles conditions whole)
            if not (
                isinstance(input, torch.Tensor)
                and isinstance(offsets, TENSOR_OR_NONE)
                and isinstance(per_sample_weights, TENSOR_OR_NONE)
            ):
                return as_one_call(self, input, offsets, per_sample_weights)
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
                *self._table(),
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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode}"
