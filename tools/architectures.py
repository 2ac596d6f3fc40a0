"""Every architecture of transformers that builds from a tiny configuration, quantized.

tools/architectures.py [--only TYPE ...] [--out FILE]

Each is built with random weights from its configuration with small sizes, run in float and
quantized, and sent through the round trip: saved, quantized while it is loaded, saved, loaded.
The table is docs/architectures.md. What does not build or run in float is counted, not hidden.
"""

import argparse
import math
import signal
import sys
import tempfile
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import dynquant
from dynquant.swap.floats import quantized_layers, share_in_float
from dynquant.transformers import DynquantConfig

SECONDS = 60  # for one architecture
MOST_PARAMETERS = 20_000_000
# By the end of an attribute's name, the first that fits: what it becomes where it is larger.
SIZES = (
    (("vocab_size", "vocab_size_per_layer_input"), 128),
    (("position_embeddings", "max_source_positions", "n_positions", "max_target_positions"), 128),
    (("key_value_heads", "kv_heads", "n_kv_heads", "n_groups"), 2),
    (("heads", "n_head", "num_heads"), 4),
    (("head_dim",), 16),
    (("experts", "experts_per_tok", "num_local_experts"), 4),
    (("layers", "n_layer", "num_blocks", "depth"), 2),
    (("intermediate_size", "ffn_dim", "n_inner", "d_ff", "mlp_dim", "ffn_hidden_size"), 96),
    (("hidden_size", "d_model", "n_embd", "embed_dim", "hidden_dim", "emb_dim", "dim"), 64),
    (("image_size",), 64),
    (("rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
)


class TooLarge(Exception):
    pass


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, as config.json has")
    parser.add_argument("--out", type=Path, help="a file for the table")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, _out_of_time)
    rows, not_built = [], Counter()
    for kind in options.only or sorted(CONFIG_MAPPING_NAMES):
        if kind not in MODEL_MAPPING_NAMES:
            continue
        signal.alarm(SECONDS)
        try:
            row = tried(kind)
        except Exception as error:
            row = None
            not_built[type(error).__name__] += 1
            print(f"{kind}: {_short(error)}", file=sys.stderr)
        finally:
            signal.alarm(0)
        if row:
            rows.append(row)
            print(" | ".join(row), file=sys.stderr, flush=True)
    text = table(rows, not_built)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


def _out_of_time(number, frame):
    raise TimeoutError(f"more than {SECONDS} s")


def table(rows, not_built):
    head = "| model type | quantized layers | output, dB | stays in float | round trip |"
    lines = [head, "|---|---:|---:|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    why = ", ".join(f"{count} {name}" for name, count in not_built.most_common())
    return "\n".join(
        [
            *lines,
            "",
            f"transformers {transformers.__version__}, torch {torch.__version__}. Not built or not "
            f"run in float from a tiny configuration: {sum(not_built.values())} ({why}).",
            "",
        ]
    )


def tried(kind):
    """The row of one model type. Raises what stands against building it or running it in float."""
    torch.manual_seed(0)
    config = tiny(AutoConfig.for_model(kind))
    with torch.device("meta"):
        count = sum(one.numel() for one in AutoModel.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise TooLarge(f"{count:,} parameters")
    model = AutoModel.from_config(config).eval()
    inputs = inputs_of(model)
    wanted = output(model, inputs)
    if not wanted.isfinite().all():
        raise ValueError("the float model gives NaN")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            quantized = dynquant.quantize_dynamic(model)
            given = output(quantized, inputs)
        except Exception as error:
            return kind, "", "", "", f"does not run: {_short(error)}"
        layers = quantized_layers(quantized)
        trip = round_trip(model, inputs, given) if layers else "nothing is quantized"
    ratio = f"{decibels(wanted, given):.1f}"
    return kind, str(len(layers)), ratio, share_in_float(quantized), trip


def tiny(config, seen=()):
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            tiny(value)
        elif type(value) is int:
            for ends, size in SIZES:
                if name.endswith(ends):
                    if value > size:
                        _set(config, name, size)
                    break
    for name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types"):
        value = getattr(config, name, None)
        if isinstance(value, list):
            _set(config, name, value[-2:])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value >= 128:
            _set(config, name, 1)
    return config


def _set(config, name, value):
    try:
        setattr(config, name, value)
    except Exception:  # computed of others
        return


def inputs_of(model):
    config = model.config
    ids = torch.randint(3, 100, (2, 12))
    made = {
        "input_ids": ids,
        "pixel_values": torch.randn(1, *_image(config)),
        "input_values": torch.randn(1, 4000),
        "input_features": torch.randn(1, 80, 256),
    }
    main_input = model.main_input_name
    inputs = {main_input: made[main_input]}
    if getattr(config, "is_encoder_decoder", False) and main_input != "pixel_values":
        inputs["decoder_input_ids"] = ids[:1] if main_input != "input_ids" else ids
    return inputs


def _image(config):
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 64) or 64
    width, height = size if isinstance(size, (list, tuple)) else (size, size)
    return getattr(vision, "num_channels", 3) or 3, width, height


def output(model, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        made = model(**inputs)
    return next(
        one.float()
        for one in (made.values() if hasattr(made, "values") else made)
        if isinstance(one, torch.Tensor) and one.is_floating_point()
    )


def round_trip(model, inputs, expected):
    """What became of it: "equal", or where it stopped; and whether the float model does, too."""
    with tempfile.TemporaryDirectory() as folder:
        trip = _loaded_and_saved(model, folder, inputs, expected)
        if trip != "equal":
            trip = f"{trip} ({_in_float(model, folder, inputs)})"
    return trip


def _loaded_and_saved(model, folder, inputs, expected):
    try:
        model.save_pretrained(f"{folder}/float")
        config = DynquantConfig()
        loaded = _loaded(f"{folder}/float", model, quantization_config=config)
        first = output(loaded, inputs)
        loaded.save_pretrained(f"{folder}/int8")
        again = output(_loaded(f"{folder}/int8", loaded), inputs)
    except Exception as error:
        return f"fails: {_short(error)}"
    if not torch.equal(again, first):
        return "other numbers after saving"
    return "equal" if torch.equal(first, expected) else "other numbers after loading"


def _loaded(folder, model, **arguments):
    """What AutoModel loads; with the config of `model` where a tiny one cannot be read back."""
    try:
        AutoConfig.from_pretrained(folder)
    except Exception:
        arguments["config"] = model.config
    return AutoModel.from_pretrained(folder, **arguments)


def _in_float(model, folder, inputs):
    """The control: what the float model's own round trip gives."""
    try:
        model.save_pretrained(f"{folder}/control")
        again = output(_loaded(f"{folder}/control", model), inputs)
        return (
            f"in float: {'equal' if torch.equal(again, output(model, inputs)) else 'other numbers'}"
        )
    except Exception as error:
        return f"in float: fails: {type(error).__name__}"


def decibels(wanted, given):
    noise = (given - wanted).double().square().sum().item()
    signal_energy = wanted.double().square().sum().item()
    return 10 * math.log10(signal_energy / noise) if noise and signal_energy else math.inf


def _short(error):
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 80, placeholder=' ...')}"


if __name__ == "__main__":
    main()
