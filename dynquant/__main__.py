"""Exact, accurate and fast int8 dynamic quantization for PyTorch."""

import argparse
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import torch

import dynquant
from dynquant import model_files
from dynquant.nn import Embedding
from dynquant.qconfig import (
    ACTIVATION_BITS,
    ACTIVATION_SCHEMES,
    DTYPES,
    WEIGHT_SCHEMES,
    QConfig,
    per_channel,
    per_token,
)
from dynquant.swap.floats import quantized_layers, share_in_float
from dynquant.whole_files import whole

QUANTIZE = """Quantize a saved model and save it.

IN is a Hugging Face folder (its weights in safetensors), and OUT becomes one, with the tokenizer
and everything else that is not a weight; `import dynquant.transformers` before loading it. Or IN is
a module that torch.save wrote, and OUT becomes such a file: this unpickles IN, which runs whatever
code it asks for, and so needs --allow-pickle.
"""
REPORT = """What quantization costs each layer in precision, and what it saves in time and bytes.

IN is as for `quantize`. It runs on texts that its tokenizer takes, or on --inputs. The exit code is
1 where a layer falls below --fail-below.
"""
BENCH = """dynquant beside its peers: `bench ARGUMENTS` runs `python -m benchmarks ARGUMENTS`.

The harness is not part of the package: run this in a clone of the repository.
"""


def program():
    """What the command `dynquant` runs."""
    # A request to end leaves nothing unfinished behind, as an interrupt from the keyboard does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    return main()


def main(arguments=None):
    """The exit code: 0; 1 where `report` finds something below the limit; 2 for a wrong request."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    parser = _parser()
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (model_files.SavedModelError, ValueError, ImportError, OSError) as error:
        print(f"dynquant {options.command}: {error}", file=sys.stderr)
        return 2


def _info(options):
    facts = dynquant.info()
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        for key, value in facts.items():
            print(f"{key}: {value}")
    return 0


def _quantize(options):
    request = _request(options)
    if request.limits():
        request.inputs = model_files.example(options.source, options.inputs, options.text)
    model = model_files.quantize(options.source, options.target, request, options.allow_pickle)
    print(f"{options.target}: {len(quantized_layers(model))} quantized modules, ", end="")
    print(_size(options.target))
    print(f"{options.source}: {_size(options.source)}")
    print(share_in_float(model))
    return 0


def _report(options):
    for path in filter(None, (options.json, options.plot)):
        model_files.check_folder_of(path)
    model = model_files.read(options.source, options.allow_pickle)
    request = _request(options)
    inputs, named = model_files.example(options.source, options.inputs, options.text)
    request.inputs = inputs, named
    try:
        quantized = model_files.quantize_as(model, request)
        comparison = dynquant.compare(model, quantized, *inputs, **named)
    except model_files.SavedModelError:
        raise
    except Exception as error:  # whatever the model's own code raises for inputs that are not its
        raise model_files.SavedModelError(
            f"the model does not run on these inputs: {error}"
        ) from error
    print(f"{comparison}\n\n{comparison.legend}\n{share_in_float(quantized)}")
    if options.json:
        rows = [_for_json(row) for row in comparison.rows]
        text = json.dumps({"rows": rows, "total": _for_json(comparison.total)}, indent=2)
        with whole(options.json) as made:
            made.write_text(text, encoding="utf-8")
    if options.plot:
        comparison.plot(options.plot)
    checked = (*comparison.rows, {**comparison.total, "name": "the whole model"})
    below = [row["name"] for row in checked if _is_below(row, options.fail_below)]
    if below:
        print(f"\nbelow {options.fail_below} dB: {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


def _for_json(value):
    """JSON has no NaN and no infinite numbers: null stands for them."""
    if isinstance(value, dict):
        return {key: _for_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_below(row, limit):
    # A layer that the inputs do not reach has no ratio; one whose output is NaN is lost.
    reached = row["float_seconds"] > 0
    return limit is not None and reached and not row["snr_db"] >= limit


def _bench(arguments):
    if not Path("benchmarks", "__main__.py").exists():
        print(f"dynquant bench: there is no folder benchmarks here\n\n{BENCH}", file=sys.stderr)
        return 2
    return subprocess.call([sys.executable, "-m", "benchmarks", *arguments])


def _request(options):
    if options.convolutions and options.dtype != "qint8":
        raise ValueError(f"--convolutions: --dtype is {options.dtype}; allowed: qint8")
    qconfig = QConfig(
        options.weight,
        options.activation,
        options.symmetric,
        dtype=getattr(torch, options.dtype),
        activation_bits=options.activation_bits,
    )
    return model_files.Request(
        qconfig,
        options.embeddings and getattr(torch, options.embeddings),
        options.convolutions,
        options.keep_float,
        options.keep_float_below,
        options.raise_bits_below,
    )


def _size(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


def _parser():
    parser = argparse.ArgumentParser(
        prog="dynquant",
        description=dynquant.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dynquant {dynquant.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    source = _source_options()

    command = _add(commands, "info", _info, "Which kernels run here, and why.")
    command.add_argument("--json", action="store_true", help="as JSON")

    command = _add(commands, "quantize", _quantize, QUANTIZE, parents=[source])
    command.add_argument("target", metavar="OUT", type=Path, help="what does not exist yet")

    command = _add(commands, "report", _report, REPORT, parents=[source])
    command.add_argument("--plot", metavar="FILE", help="draw it (PNG, SVG or PDF)")
    command.add_argument("--json", metavar="FILE", help="save the rows; null for no number")
    command.add_argument(
        "--fail-below",
        type=_decibels,
        metavar="DB",
        help="exit code 1 where a layer's signal-to-noise ratio, or the whole model's, is lower",
    )
    _add(commands, "bench", _bench, BENCH)
    return parser


def _decibels(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of dB")
    return value


def _add(commands, name, run, text, parents=()):
    command = commands.add_parser(
        name,
        help=text.strip().splitlines()[0],
        description=text,
        parents=parents,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _names(dtypes):
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _source_options():
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("source", metavar="IN", type=Path, help="a saved float model")
    options.add_argument("--weight", choices=WEIGHT_SCHEMES, default=per_channel)
    options.add_argument("--activation", choices=ACTIVATION_SCHEMES, default=per_token)
    options.add_argument(
        "--symmetric", action="store_true", help="ranges of activations centered on zero"
    )
    options.add_argument(
        "--activation-bits",
        type=int,
        choices=ACTIVATION_BITS,
        default=8,
        help="16: where activations have outliers",
    )
    options.add_argument(
        "--dtype",
        choices=_names(DTYPES),
        default="qint8",
        help="of the weights: the last two are for embeddings, the others for linear and recurrent "
        "layers",
    )
    options.add_argument(
        "--embeddings",
        choices=_names(Embedding.DTYPES),
        help="quantize embeddings as well, in 8 or 4 bits",
    )
    options.add_argument(
        "--convolutions",
        action="store_true",
        help="quantize nn.Conv1d and nn.ConvTranspose1d as well (of dtype qint8)",
    )
    options.add_argument(
        "--keep-float",
        action="extend",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME[,NAME...]",
        help="modules that stay in float, each with its submodules; may be given again",
    )
    options.add_argument(
        "--keep-float-below",
        type=_decibels,
        metavar="DB",
        help="layers whose signal-to-noise ratio is lower, or that are not reached, stay in float: "
        "measured on --text or --inputs",
    )
    options.add_argument(
        "--raise-bits-below",
        type=_decibels,
        metavar="DB",
        help="layers whose signal-to-noise ratio is lower get activations in 16 bits; it is tried "
        "before --keep-float-below, and measured likewise",
    )
    options.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="a text for the tokenizer, in place of two that are built in; may be given again",
    )
    options.add_argument(
        "--inputs",
        metavar="FILE",
        help="the model's inputs: a tensor, a tuple or a dict of tensors that torch.save wrote",
    )
    options.add_argument(
        "--allow-pickle",
        action="store_true",
        help="unpickle IN, which runs whatever code it asks for",
    )
    return options


if __name__ == "__main__":
    sys.exit(program())
