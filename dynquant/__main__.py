"""Exact, accurate and fast int8 dynamic quantization for PyTorch."""

import argparse
import json
import math
import signal
import sys
from pathlib import Path

import dynquant
from dynquant import model_files
from dynquant.qconfig import ACTIVATION_SCHEMES, WEIGHT_SCHEMES, QConfig, per_channel, per_token
from dynquant.whole_files import whole

QUANTIZE = """Quantize a saved model and save it.

IN is a Hugging Face folder (its weights in safetensors), and OUT becomes one, with the tokenizer
and all else that is no weight; `import dynquant.transformers` before loading it. Or IN is a module
that torch.save wrote, and OUT becomes such a file: this unpickles IN, which runs whatever code it
asks for, and so needs --allow-pickle.
"""
REPORT = """What quantization costs each layer in precision, and what it saves in time and bytes.

IN is as for `quantize`. It runs on texts that its tokenizer takes, or on --inputs. The exit code is
1 where a layer falls below --fail-below.
"""
BENCH = """dynquant beside its peers: `bench ARGUMENTS` is `python -m benchmarks ARGUMENTS`.

The harness is no part of the package: run this in a clone of the repository.
"""
TEXTS = (
    "The cat sits on the mat.",
    "Dynamic quantization maps the activations of a network to eight bits while it runs.",
)

# What a model raises for inputs that are not its own.
_ERRORS_OF_A_CALL = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


def main(arguments=None):
    """The exit code: 0; 1 where `report` finds a layer below the limit; 2 for a wrong request."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (model_files.SavedModelError, ValueError, ImportError, OSError) as error:
        print(f"python -m dynquant {options.command}: {error}", file=sys.stderr)
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
    model = model_files.quantize(
        options.source, options.target, _qconfig(options), options.keep_float, options.allow_pickle
    )
    layers = sum(type(module).__module__.startswith("dynquant.nn") for module in model.modules())
    print(f"{options.target}: {layers} quantized modules, {_size(options.target)}")
    print(f"{options.source}: {_size(options.source)}")
    return 0


def _report(options):
    for path in filter(None, (options.json, options.plot)):
        model_files.check_folder_of(path)
    model = model_files.read(options.source, options.allow_pickle)
    if options.inputs:
        inputs, named = model_files.read_inputs(options.inputs)
    else:
        inputs, named = (), model_files.tokenized(options.source, options.text)
    quantized = model_files.quantize_as(model, _qconfig(options), options.keep_float)
    try:
        comparison = dynquant.compare(model, quantized, *inputs, **named)
    except _ERRORS_OF_A_CALL as error:
        raise model_files.SavedModelError(
            f"the model does not run on these inputs: {error}"
        ) from error
    print(comparison)
    if options.json:
        rows = [_for_json(row) for row in comparison.rows]
        text = json.dumps({"rows": rows, "total": _for_json(comparison.total)}, indent=2)
        with whole(options.json) as made:
            made.write_text(text, encoding="utf-8")
    if options.plot:
        comparison.plot(options.plot)
    below = [row["name"] for row in comparison.rows if _is_below(row, options.fail_below)]
    if below:
        print(f"\nbelow {options.fail_below} dB: {', '.join(below)}", file=sys.stderr)
    return 1 if below else 0


def _for_json(row):
    """JSON has no NaN and no infinite numbers: null stands for them."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _is_below(row, limit):
    # A layer that the inputs do not reach has no ratio; one whose output is NaN is lost.
    reached = row["float_seconds"] > 0
    return limit is not None and reached and not row["snr_db"] >= limit


def _bench(arguments):
    try:
        from benchmarks.__main__ import main as run
    except ImportError as error:
        print(f"python -m dynquant bench: {error}\n\n{BENCH}", file=sys.stderr)
        return 2
    return run(arguments)


def _qconfig(options):
    return QConfig(options.weight, options.activation, options.symmetric)


def _size(path):
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB"


def _parser():
    parser = argparse.ArgumentParser(prog="python -m dynquant", description=dynquant.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    source = _source_options()

    command = _add(commands, "info", _info, "Which kernels run here, and why.")
    command.add_argument("--json", action="store_true", help="as JSON")

    command = _add(commands, "quantize", _quantize, QUANTIZE, parents=[source])
    command.add_argument("target", metavar="OUT", type=Path, help="what does not exist yet")

    command = _add(commands, "report", _report, REPORT, parents=[source])
    command.add_argument("--text", nargs="+", default=TEXTS, help="texts for the tokenizer")
    command.add_argument(
        "--inputs",
        metavar="FILE",
        help="the model's inputs: a tensor, a tuple or a dict of tensors that torch.save wrote",
    )
    command.add_argument("--plot", metavar="FILE", help="draw it (PNG, SVG or PDF)")
    command.add_argument("--json", metavar="FILE", help="save the rows; null for no number")
    command.add_argument(
        "--fail-below",
        type=_decibels,
        metavar="DB",
        help="exit code 1 where a layer's signal-to-noise ratio is lower",
    )
    _add(commands, "bench", _bench, BENCH)
    return parser


def _decibels(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of dB")
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


def _source_options():
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("source", metavar="IN", type=Path, help="a saved float model")
    options.add_argument("--weight", choices=WEIGHT_SCHEMES, default=per_channel)
    options.add_argument("--activation", choices=ACTIVATION_SCHEMES, default=per_token)
    options.add_argument(
        "--symmetric", action="store_true", help="ranges of activations centered on zero"
    )
    options.add_argument(
        "--keep-float",
        nargs="+",
        default=[],
        metavar="NAME",
        help="modules that stay in float, each with its submodules",
    )
    options.add_argument(
        "--allow-pickle",
        action="store_true",
        help="unpickle IN, which runs whatever code it asks for",
    )
    return options


if __name__ == "__main__":
    # A request to end leaves nothing unfinished behind, as an interrupt from the keyboard does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
