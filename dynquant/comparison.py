"""What quantization costs each layer in precision, and what it saves in time and bytes."""

import copy
import math
import os
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from dynquant.nn import DeQuantize, Quantize
from dynquant.qconfig import EIGHT_BITS
from dynquant.swap.registry import Forms
from dynquant.whole_files import whole

if TYPE_CHECKING:
    import pandas

REPETITIONS = 5  # of the timed runs, after one that is not timed

# Heading, key of the row, how its value is written, and what it is.
_COLUMNS = (
    ("layer", "name", lambda value: value or "(model)", "its name"),
    (
        "type",
        "type",
        str,
        "of the quantized layer; a product's line has the product alone quantized",
    ),
    ("bits", "bits", str, "of its activations"),
    (
        "SNR dB",
        "snr_db",
        "{:.1f}".format,
        "signal-to-noise ratio of its output, given the float layer's input: 20 dB more is an "
        "error a tenth as large; nan where the inputs do not reach it",
    ),
    ("in model", "model_snr_db", "{:.1f}".format, "the same with the quantized model's input"),
    ("time", "time_share", "{:.1%}".format, "its part of the quantized model's time"),
    ("ms", "seconds", lambda value: f"{1e3 * value:.3f}", "milliseconds of one run"),
    (
        "ms float",
        "float_seconds",
        lambda value: f"{1e3 * value:.3f}",
        "milliseconds of the float layer",
    ),
    ("bytes", "bytes_after", "{:,}".format, "of its parameters and buffers"),
    ("bytes float", "bytes_before", "{:,}".format, "of the float layer's"),
)


class Comparison:
    """What compare gives; str() of it is a table.

    Attributes:
        rows: a dict for each quantized layer, in the order of the model:
            name, type: of the layer;
            bits: of its activations: "8", "16", "float" (weights in 16 bits), or "mixed";
            products: for each product of a recurrent layer or an attention a dict with its name,
                type, bits, and snr_db, of the layer's output where nothing else is quantized;
            snr_db: signal-to-noise ratio of its output for the input that the float layer has;
            model_snr_db: the same with the input that it has in the quantized model;
            seconds, float_seconds: median time of its calls in one run of either model;
            time_share: its part of the quantized model's time, 0 to 1;
            bytes_after, bytes_before: of its parameters and buffers, and of the float layer's.
            A layer that the inputs do not reach has NaN for ratios and 0 for times.
        total: the same for the whole model; its snr_db is that of the model's output.
    """

    def __init__(self, rows: list[dict[str, Any]], total: dict[str, Any]) -> None:
        self.rows = rows
        self.total = total

    def __str__(self) -> str:
        lines = [[heading for heading, *_ in _COLUMNS]]
        rows = [one for row in self.rows for one in (row, *row["products"])]
        for row in (*rows, {**self.total, "name": "total"}):
            lines.append([write(row[key]) if key in row else "" for _, key, write, _ in _COLUMNS])
        widths = [max(len(line[place]) for line in lines) for place in range(len(_COLUMNS))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    __repr__ = __str__

    @property
    def legend(self) -> str:
        """What the columns of the table are, a line each."""
        return "\n".join(f"{heading}: {meaning}" for heading, _, _, meaning in _COLUMNS)

    def to_dataframe(self) -> "pandas.DataFrame":
        """The rows as a pandas.DataFrame.

        Raises:
            ImportError: where pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe needs pandas (pip install pandas)") from error
        return pandas.DataFrame(self.rows)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture of every layer's signal-to-noise ratio and share of time.

        Args:
            path: of the file; its suffix gives the format (.png, .svg, .pdf).

        Raises:
            ImportError: where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plot needs matplotlib (pip install matplotlib)") from error
        names = [row["name"] or "(model)" for row in self.rows]
        places = range(len(names))
        figure = Figure(figsize=(10, 1.5 + 0.22 * len(names)), layout="constrained")
        precision, shares = figure.subplots(1, 2, sharey=True)
        for key, label, marker in (
            ("snr_db", "same input", "o"),
            ("model_snr_db", "in the model", "x"),
        ):
            values = [row[key] if math.isfinite(row[key]) else math.nan for row in self.rows]
            precision.plot(values, places, marker, label=label)
        precision.set_xlabel("signal-to-noise ratio, dB")
        precision.legend()
        precision.grid(axis="x", alpha=0.3)
        precision.set_yticks(places, names, fontsize=7)
        precision.invert_yaxis()
        shares.barh(places, [100 * row["time_share"] for row in self.rows])
        shares.set_xlabel("share of time, %")
        with whole(path) as made:
            figure.savefig(made, dpi=120)


def compare(
    float_model: nn.Module, quantized_model: nn.Module, *inputs: Any, **kwargs: Any
) -> Comparison:
    """Compares every quantized layer with the float layer that it came from.

    Both models run on the inputs in eval mode and without gradients, as copies that share their
    parameters: neither is changed.

    Args:
        float_model: what quantize_dynamic was given.
        quantized_model: what it gave.
        *inputs, **kwargs: what either model is called with.

    Returns:
        a Comparison.

    Raises:
        TypeError: for a model that is not an nn.Module.
        ValueError: where quantized_model has no quantized layer, or one whose name float_model
            does not have.
    """
    for name, model in (("float_model", float_model), ("quantized_model", quantized_model)):
        if not isinstance(model, nn.Module):
            raise TypeError(f"{name} is of type {type(model).__name__}; expected an nn.Module")
    before, after = _twin(float_model), _twin(quantized_model)
    names = _quantized_names(before, after)
    layers = {name: after.get_submodule(name) for name in names}
    kept: dict[str, list] = {}  # outputs of the float layers
    with torch.no_grad():
        every = {name: (name, layer) for name, layer in layers.items()}
        every |= _products_alone(before, layers)
        ratios, wanted = _ratios(before, every, inputs, kwargs, kept)
        in_model, total_ratio = _ratios_in_model(after, layers, inputs, kwargs, kept, wanted)
        float_seconds, float_total = _times(before, names, inputs, kwargs)
        seconds, total = _times(after, names, inputs, kwargs)
    rows = [
        {
            "name": name,
            "type": type(layers[name]).__name__,
            "bits": _bits(layers[name], before.get_submodule(name)),
            "products": _products(name, layers[name], before, ratios),
            "snr_db": ratios[name].db(),
            "model_snr_db": in_model[name].db(),
            "time_share": seconds[name] / total,
            "seconds": seconds[name],
            "float_seconds": float_seconds[name],
            "bytes_before": _bytes(before.get_submodule(name)),
            "bytes_after": _bytes(layers[name]),
        }
        for name in names
    ]
    return Comparison(
        rows,
        {
            "name": "",
            "type": type(quantized_model).__name__,
            "bits": "",
            "products": [],
            "snr_db": total_ratio.db(),
            "model_snr_db": total_ratio.db(),
            "time_share": 1.0,
            "seconds": total,
            "float_seconds": float_total,
            "bytes_before": _bytes(before),
            "bytes_after": _bytes(after),
        },
    )


def _configs_of_products(layer, mod):
    """By name, where a quantized layer distinguishes the products of the float one, `mod`."""
    if not getattr(layer, "MIXED", None):
        return {}
    return {product: layer.config_of(product) for product in layer.products_of(mod)}


def _products_alone(before, layers):
    """Forms of the layers in which one product alone is quantized, as _ratios takes them."""
    alone = {}
    for name, layer in layers.items():
        mod = before.get_submodule(name)
        configs = _configs_of_products(layer, mod)
        for product, config in configs.items():
            if config is not None:
                products = {**dict.fromkeys(configs), product: config}
                alone[name, product] = (name, layer.from_float(mod, config, products=products))
    return alone


def _products(name, layer, before, ratios):
    """What a row has of the layer's products."""
    rows = []
    for product, config in _configs_of_products(layer, before.get_submodule(name)).items():
        ratio = ratios.get((name, product))
        rows.append(
            {
                "name": ".".join(filter(None, (name, product))),
                "type": "product",
                "bits": _bits_of(config),
                "snr_db": math.inf if ratio is None else ratio.db(),
            }
        )
    return rows


def _bits_of(config):
    eight = config is not None and config.dtype in EIGHT_BITS
    return str(config.activation_bits) if eight else "float"


def _bits(layer, mod):
    configs = _configs_of_products(layer, mod).values()
    found = {_bits_of(config) for config in configs}
    if not found:
        return str(getattr(layer, "activation_bits", "float"))
    return found.pop() if len(found) == 1 else "mixed"


def losses(model, forms, inputs, kwargs):
    """The signal-to-noise ratio, in dB, of quantized layers for what they get in the float model.

    Args:
        model: the float model, which is not changed.
        forms: for each key the layer's name and a quantized form of it.
        inputs, kwargs: what the model is called with.

    Returns:
        dB by key; NaN for a layer that was not called.
    """
    with torch.no_grad():
        ratios, _ = _ratios(_twin(model), forms, inputs, kwargs)
    return {name: ratio.db() for name, ratio in ratios.items()}


class _Ratio:
    """Energy of a signal and of the noise on it, over any number of outputs."""

    def __init__(self):
        self.signal = self.noise = 0.0
        self.calls = 0

    def add(self, wanted, given):
        self.calls += 1
        for one, other in zip(_floats(wanted), _floats(given), strict=True):
            one = one.double()
            self.signal += one.square().sum().item()
            self.noise += (other.double() - one).square().sum().item()

    def db(self):
        if not self.calls:
            return math.nan
        if self.noise == 0:
            return math.inf
        if self.signal == 0 or self.noise == math.inf:
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


def _floats(output):
    """The float tensors in an output, nested ones in parts."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            yield from leaf.unbind() if leaf.is_nested else (leaf,)


def _ratios(model, forms, inputs, kwargs, kept=None):
    """Runs the float model, and `forms` on what its layers get: a _Ratio by key, the output.

    forms: for each key the layer's name and a form of it.
    kept: receives the layers' outputs, a list of them for each key.
    """
    ratios = {key: _Ratio() for key in forms}

    def watching(key, form):
        def hook(module, args, kwargs, output):
            ratios[key].add(output, form(*args, **kwargs))
            if kept is not None:
                # What comes after the layer may change its output in place.
                kept.setdefault(key, []).append(_cloned(output))

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(watching(key, form), with_kwargs=True)
        for key, (name, form) in forms.items()
    ]
    inputs, kwargs = _cloned((inputs, kwargs))
    output = model(*inputs, **kwargs)
    for handle in handles:
        handle.remove()
    return ratios, output


def _ratios_in_model(model, layers, inputs, kwargs, kept, wanted):
    """Runs the quantized model: each layer's _Ratio against `kept`, and that of the output."""
    ratios = {name: _Ratio() for name in layers}

    def watching(name):
        def hook(module, args, output):
            if kept.get(name):
                ratios[name].add(kept[name].pop(0), output)

        return hook

    handles = [layer.register_forward_hook(watching(name)) for name, layer in layers.items()]
    total = _Ratio()
    inputs, kwargs = _cloned((inputs, kwargs))
    total.add(wanted, model(*inputs, **kwargs))
    for handle in handles:
        handle.remove()
    return ratios, total


def _times(model, names, inputs, kwargs):
    """Median seconds in one run of the model, of each layer's calls and of everything."""
    spent = {name: [] for name in names}
    started = {}
    handles = []
    for name in names:
        layer = model.get_submodule(name)

        def start(module, args, name=name):
            started[name] = _now()

        def stop(module, args, output, name=name):
            spent[name][-1] += _now() - started[name]

        handles += [layer.register_forward_pre_hook(start), layer.register_forward_hook(stop)]
    totals = []
    for _ in range(REPETITIONS):
        for times in spent.values():
            times.append(0.0)
        arguments, named = _cloned((inputs, kwargs))
        begin = _now()
        model(*arguments, **named)
        totals.append(_now() - begin)
    for handle in handles:
        handle.remove()
    return {name: median(times) for name, times in spent.items()}, median(totals)


def _cloned(value):
    """Every tensor copied: a model may change what it is called with."""
    return tree_map_only(torch.Tensor, torch.clone, value)


def _now():
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def _quantized_names(before, after):
    """The names of the quantized layers, those within another left out."""
    forms = Forms(None)
    floats = dict(before.named_modules())
    names = []
    for name, module in after.named_modules():
        if any(outer == "" or name.startswith(f"{outer}.") for outer in names):
            continue
        if not forms.is_quantized(type(module)) or isinstance(module, (Quantize, DeQuantize)):
            continue
        if name not in floats:
            raise ValueError(f"float_model has no module {name!r}, which is quantized in the other")
        if not forms.is_quantized(type(floats[name])):
            names.append(name)
    if not names:
        raise ValueError("quantized_model has no quantized layer that is float in float_model")
    return names


def _twin(model):
    """A copy of the model, in eval mode, that shares what a run does not change.

    Buffers of float modules are copied: an Observer writes to its own.
    """
    forms = Forms(None)
    shared = list(model.parameters())
    for module in model.modules():
        if forms.is_quantized(type(module)):
            shared += module.buffers()
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared}).eval()


def _bytes(module):
    tensors = [*module.parameters(), *module.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
    return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())
