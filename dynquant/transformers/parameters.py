"""num_parameters() of a quantized model of transformers: what it says of the float one."""

import functools
from math import prod

from transformers import PreTrainedModel

from dynquant.nn import Embedding
from dynquant.nn._module import QuantizedModule
from dynquant.swap.ties import shared_groups


def count_quantized():
    """Has num_parameters() of every model count quantized weights, which are buffers, as well."""
    counts = PreTrainedModel.num_parameters
    if hasattr(counts, "_counts_quantized"):
        return

    @functools.wraps(counts)
    def num_parameters(self, only_trainable=False, exclude_embeddings=False):
        found = counts(self, only_trainable, exclude_embeddings)
        return found if only_trainable else found + _quantized(self, exclude_embeddings)

    num_parameters._counts_quantized = True
    PreTrainedModel.num_parameters = num_parameters


def _quantized(model, exclude_embeddings):
    """The number of values in quantized weights, shared ones once: with a float one, or here."""
    modules = {
        f"{name}.{key}".lstrip("."): module
        for name, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for key in module._formats
    }
    for names in shared_groups(model):
        ours = sorted(
            (name for name in names if name in modules),
            key=lambda name: not isinstance(modules[name], Embedding),
        )
        for name in ours if len(ours) < len(names) else ours[1:]:
            modules.pop(name)
    return sum(
        prod(module._formats[name.rpartition(".")[2]].float_shape)
        for name, module in modules.items()
        if not (exclude_embeddings and isinstance(module, Embedding))
    )
