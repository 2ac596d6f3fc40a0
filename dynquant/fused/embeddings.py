"""The sum of word, type and position embeddings with its norm, in as few calls as it takes."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused import calls
from dynquant.fused.adapters import name_of
from dynquant.fused.classes import Swapped
from dynquant.fused.functions import FusedNorm, Norm, norm_of, runs_as_op
from dynquant.fused.hooks import disturbed


class _Names(NamedTuple):
    """The parameters of forward, and what the tables are called. Positions count from 0."""

    arguments: tuple[str, ...]
    types: str | None = "token_type_embeddings"
    words: str = "word_embeddings"
    positions: str = "position_embeddings"
    norm: str = "LayerNorm"


_BERT = _Names(("input_ids", "token_type_ids", "position_ids", "inputs_embeds", "cache_length"))
_KNOWN = {
    "transformers.models.bert.modeling_bert.BertEmbeddings": _BERT,
    "transformers.models.electra.modeling_electra.ElectraEmbeddings": _BERT,
    "transformers.models.distilbert.modeling_distilbert.Embeddings": _Names(
        ("input_ids", "inputs_embeds", "position_ids"), types=None
    ),
}


def sum_names(module):
    """The names of a sum of embeddings that is known and not fused yet, or None."""
    names = _KNOWN.get(name_of(type(module)))
    if names is None or isinstance(module, Swapped) or not _as_named(module, names):
        return None
    return names if norm_of(getattr(module, names.norm, None)) == "layer" else None


def _as_named(module, names):
    tables = (names.words, names.types, names.positions)
    found = [module._modules.get(name) for name in tables if name]
    return all(type(table) is nn.Embedding and table.max_norm is None for table in found)


class FusedEmbeddings(Swapped):
    """Runs as ops for ids at the positions 0, 1, 2, ..., by the same sums. Its setting: _Names."""

    def forward(self, *args, **kwargs):
        (names,) = self._settings
        given = {**dict(zip(names.arguments, args, strict=False)), **kwargs}
        given = {name: value for name, value in given.items() if not _says_nothing(value)}
        ids, types = given.pop("input_ids", None), given.pop("token_type_ids", None)
        arguments = self._arguments(names) if not given and self._fits(ids, names) else None
        if arguments is None or not calls.can_sum(arguments, ids, types):
            return super().forward(*args, **kwargs)
        return calls.embedding_sum(arguments, ids, types)

    def watch(self, watched):
        """What calls.embedding_sum takes while what is watched holds; None where nothing fits."""
        (names,) = self._settings
        if not self._is_as_named(names):
            return None
        for name, child in self._modules.items():
            watched.child(self, name, child)
            watched.entries(child._parameters, child._parameters)
            watched.attributes(child, "max_norm", "eps", "variance_epsilon")
        return self._arguments(names)

    def _arguments(self, names):
        norm = Norm("layer", self._modules[names.norm])
        kinds = self._table(names.types) if names.types else None
        return calls.embedding_sum_arguments(
            self._table(names.words), kinds, self._table(names.positions), norm
        )

    def _is_as_named(self, names):
        norm = self._modules[names.norm]
        is_op = isinstance(norm, FusedNorm) and norm_of(norm) == "layer"
        return is_op and _as_named(self, names)

    def _fits(self, ids, names):
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or self.training:
            return False
        if _has_any_global_hook() or any(map(disturbed, self._modules.values())):
            return False
        if not self._is_as_named(names):
            return False
        return runs_as_op(self._table(names.words), self.parameters)

    def _table(self, name):
        return self._modules[name]._parameters["weight"]


def _says_nothing(value):
    return value is None or (type(value) is int and value == 0)
