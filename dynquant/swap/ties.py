"""Ties of weights that transformers makes again, and that quantization has parted."""

from torch import nn

from dynquant.nn._module import QuantizedModule
from dynquant.nn.embedding import Embedding, EmbeddingBag


def part_from_tables(model):
    """Makes transformers leave float modules alone that were tied to a quantized embedding.

    Such a module keeps its float weight, which has no other owner now. A model of transformers
    names its ties in _tied_weights_keys and all_tied_weights_keys, {target: source}; tie_weights()
    would assign the embedding's integers to the target. Quantized targets take them rightly.
    """
    for module in model.modules():
        for key in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, key, None)
            if not isinstance(ties, dict):
                continue
            kept = {
                target: source
                for target, source in ties.items()
                if not (_is_of(module, source, _TABLES) and _is_float(module, target))
            }
            if len(kept) < len(ties):
                setattr(module, key, kept)


_TABLES = (Embedding, EmbeddingBag)


def _owner(module, name):
    """The submodule that has the parameter, or None, as where the name is a pattern."""
    try:
        return module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None


def _is_of(module, name, types):
    return isinstance(_owner(module, name), types)


def _is_float(module, name):
    owner = _owner(module, name)
    return isinstance(owner, nn.Module) and not isinstance(owner, QuantizedModule)
