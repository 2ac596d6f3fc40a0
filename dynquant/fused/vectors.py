"""Projections of the vectors of distances, which hardly any call has anew."""

from typing import NamedTuple

import torch

from dynquant.fused.arguments import Distances
from dynquant.nn.linear import outputs_of

# Of more vectors, the memory counts, and the time that is spared hardly does beside the rest.
_MOST = 128


class _Kept(NamedTuple):
    """What was projected, by what, and the results.

    Attributes:
        values: copies of the vectors, and of the scales and biases of the layers: code of models
            writes to those past torch's count of writes.
        weights: (packed weight, torch's count of writes to it) of each layer.
        results: one for each layer.
    """

    values: list[torch.Tensor]
    weights: list[tuple[torch.Tensor, int]]
    results: list[torch.Tensor]

    def is_of(self, values, weights):
        if len(values) != len(self.values):
            return False
        same = all(
            one is other and count == before
            for (one, count), (other, before) in zip(weights, self.weights, strict=True)
        )
        return same and all(map(_are_equal, values, self.values))


def _are_equal(one, other):
    return one.dtype == other.dtype and torch.equal(one, other)


def projections_of(relative, distances: Distances):
    """[1, vectors, features] by the key projection and by that of queries, of those there are."""
    return outputs_of(_layers(relative), distances.rows)


def kept_projections_of(parts, distances: Distances):
    """The same, kept in the Parts from call to call; by their linear layers without hooks."""
    layers, rows = _layers(parts.attention.relative), distances.rows
    if rows.shape[1] > _MOST or any(one._buffers["packed"].is_inference() for one in layers):
        return projections_of(parts.attention.relative, distances)
    weights = [(one._buffers["packed"], one._buffers["packed"]._version) for one in layers]
    beside = [(one._buffers["weight_scale"], one._parameters["bias"]) for one in layers]
    values = [rows, *(one for pair in beside for one in pair if one is not None)]
    kept = parts.kept_vectors
    if kept is None or not kept.is_of(values, weights):
        copies = [one.detach().clone() for one in values]
        kept = _Kept(copies, weights, projections_of(parts.attention.relative, distances))
        parts.kept_vectors = kept
    return kept.results


def _layers(relative):
    return [one for one in (relative.key, relative.query) if one is not None]
