"""Ties of weights that transformers makes again, and that quantization has parted."""

from dynquant.nn._module import QuantizedModule


def part_from_quantized(model):
    """Makes transformers forget the ties to weights of quantized modules.

    A model of transformers names its ties in _tied_weights_keys and all_tied_weights_keys, {target:
    source}; tie_weights() would look for the source among parameters and buffers, and not find it.
    Both sides have what they need: a target keeps the weight that it has, quantized or float.
    """
    for module in model.modules():
        for key in ("_tied_weights_keys", "all_tied_weights_keys"):
            ties = getattr(module, key, None)
            if not isinstance(ties, dict):
                continue
            kept = {
                target: source
                for target, source in ties.items()
                if not isinstance(_owner(module, source), QuantizedModule)
            }
            if len(kept) < len(ties):
                setattr(module, key, kept)


def _owner(module, name):
    """The submodule that has the parameter, or None, as where the name is a pattern."""
    try:
        return module.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
