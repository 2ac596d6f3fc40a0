"""Checkpoints of compressed-tensors (llm-compressor, vLLM): int8 weights and activations, W8A8.

The layout is that of https://github.com/vllm-project/compressed-tensors: `<layer>.weight` int8
[N, K], `<layer>.weight_scale` [N, 1] or [1], and in config.json the schemes of groups of layers.
"""

import regex

from dynquant.foreign_layers import ForeignLayer, check, check_layers, refuse
from dynquant.qconfig import QConfig, per_channel, per_tensor, per_token

_FORMATS = ("int-quantized", "naive-quantized")  # of the same layout
_PATTERN_SECONDS = 10
_EMPTY: tuple = (None, {}, [])
_WEIGHT_SCHEMES = {"channel": per_channel, "tensor": per_tensor}
_ACTIVATION_SCHEMES = {"token": per_token, "tensor": per_tensor}
# Entries of layers that are quantized in a way that dynquant does not have.
_REFUSED = {
    "weight_packed": "a weight packed into int32",
    "weight_global_scale": "a scale of scales",
    "weight_g_idx": "columns in another order",
    "input_scale": "a static scale of activations",
    "input_zero_point": "a static zero point of activations",
    "input_global_scale": "a scale of scales",
    "output_scale": "a scale of outputs",
    "k_scale": "a scale of cached keys",
    "v_scale": "a scale of cached values",
}


def layers_of(headers, config):
    """The quantized layers of a checkpoint by their names in it, as ForeignLayers.

    Args:
        headers: its Headers.
        config: its quantization_config, a dict.

    Raises:
        ValueError: for what dynquant has no form for, with the name of a layer that has it.
    """
    names = _quantized(headers)
    some = names[0] if names else "the checkpoint"
    for key in ("kv_cache_scheme", "transform_config"):
        check(some, key, config.get(key), _EMPTY)
    if (sparsity := config.get("sparsity_config")) not in _EMPTY:
        check(some, "sparsity_config's format", sparsity.get("format"), ("dense",))
    groups = config.get("config_groups") or {}
    layers = {}
    for name in names:
        group = _group_of(name, groups)
        keys = {"weight": f"{name}.weight", "weight_scale": f"{name}.weight_scale"}
        optional = {"zero_point": f"{name}.weight_zero_point", "bias": f"{name}.bias"}
        keys.update({entry: key for entry, key in optional.items() if key in headers})
        layers[name] = ForeignLayer(_qconfig_of(name, group, config.get("format")), keys)
    for key in headers:
        outer, _, entry = key.rpartition(".")
        if entry in _REFUSED:
            refuse(outer, f"the checkpoint's {entry}", _REFUSED[entry], "int8 weights and scales")
    check_layers(layers, headers)
    return layers


def _quantized(headers):
    """The names of all quantized layers."""
    ends = (".weight_scale", ".weight_packed")
    names = {key.removesuffix(end) for key in headers for end in ends if key.endswith(end)}
    for key, (dtype, _) in headers.of(key for key in headers if key.endswith(".weight")).items():
        if dtype == "I8" and key.removesuffix(".weight") not in names:
            raise ValueError(f"{key} is int8 without a scale")
    return sorted(names)


def _group_of(name, groups):
    """The settings of the group that a layer belongs to: by name, pattern, or type, in this order.

    A checkpoint with one group has no layer of another.
    """
    for group, settings in groups.items():
        if not isinstance(settings, dict):
            refuse(name, f"the group {group}", repr(settings), "a dict of settings")
    if len(groups) == 1:
        return next(iter(groups.values()))

    def by_pattern(target):
        return target.startswith("re:") and _fits(target.removeprefix("re:"), name)

    for is_target in (name.__eq__, by_pattern, "Linear".__eq__):
        for settings in groups.values():
            if any(map(is_target, settings.get("targets") or ())):
                return settings
    refuse(name, "its group of config_groups", "missing", "one whose targets have the layer")


def _qconfig_of(name, group, default_format):
    check(name, "format", group.get("format") or default_format, _FORMATS)
    weights, inputs = group.get("weights"), group.get("input_activations")
    if inputs is None:
        refuse(name, "input_activations", "None: activations in float", "dynamic in 8 bits")
    check(name, "output_activations", group.get("output_activations"), _EMPTY)
    for what, args in (("weights", weights), ("input_activations", inputs)):
        check(name, f"{what}.type", args.get("type", "int"), ("int",))
        check(name, f"{what}.num_bits", args.get("num_bits", 8), (8,))
    check(name, "weights.symmetric", weights.get("symmetric", True), (True,))
    check(name, "weights.strategy", _strategy(weights), tuple(_WEIGHT_SCHEMES))
    check(name, "input_activations.dynamic", inputs.get("dynamic", False), (True,))
    check(name, "input_activations.strategy", _strategy(inputs), tuple(_ACTIVATION_SCHEMES))
    symmetric = inputs.get("symmetric", True)
    check(name, "input_activations.symmetric", symmetric, (True, False))
    return QConfig(
        _WEIGHT_SCHEMES[_strategy(weights)], _ACTIVATION_SCHEMES[_strategy(inputs)], symmetric
    )


def _strategy(args):
    """What a scale is for; compressed-tensors infers it of group_size where it is not said."""
    size = args.get("group_size")
    inferred = {None: "tensor", -1: "channel"}.get(size, "group")
    return args.get("strategy") or inferred


def _fits(pattern, name):
    """Whether a regular expression that somebody else wrote fits the beginning of the name."""
    try:
        return regex.match(pattern, name, timeout=_PATTERN_SECONDS) is not None
    except (TimeoutError, regex.error) as error:
        raise ValueError(f"the pattern {pattern!r} cannot be used: {error}") from error
