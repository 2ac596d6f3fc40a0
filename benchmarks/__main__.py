"""dynquant beside its peers and beside what the machine gives at best."""

import argparse
import os
import sys

from benchmarks import (
    callers,
    contest,
    kernels,
    layers,
    machine,
    models,
    plots,
    race,
    results,
    shapes,
    tables,
    threads,
)
from benchmarks.peers import OF_LAYERS, OF_MODELS, PeerError, check_name

COMPARE = """What became slower from one result to a later one; exit code 1 if anything did.

Slower: the median by more than the tolerance, with quartiles that do not overlap. Lost: right
before, and now wrong, missing or failed.
"""


def main(arguments=None):
    """The exit code: 1 where `compare` finds what became slower, 2 for a wrong request."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (
        OSError,
        callers.WrongResult,
        PeerError,
        kernels.KernelsMissing,
        plots.MatplotlibMissing,
        race.NoReference,
        results.ResultError,
        shapes.ShapeError,
    ) as error:
        print(f"python -m benchmarks {options.command}: {error}", file=sys.stderr)
        return 2


def _kernels(options):
    chosen = shapes.select(options.shapes, options.set, options.m)
    _check_plot(options)
    result = kernels.run(
        chosen, options.isa, options.rounds, options.seconds, options.limit, options.quiet
    )
    return _hand_out(result, kernels.table, options)


def _layers(options):
    chosen = shapes.select(options.shapes, options.set, options.m)
    _check_plot(options)
    return _hand_out(layers.run(chosen, options), layers.table, options)


def _models(options):
    _check_plot(options)
    return _hand_out(models.run(options.cases, options), models.table, options)


def _callers(options):
    return _print_table(callers, options)


def _threads(options):
    return _print_table(threads, options)


def _print_table(measured, options):
    chosen = shapes.select(options.shapes, options.set, options.m)
    print(machine.summary(machine.facts()) + "\n")
    print(measured.table(measured.run(chosen, options.rounds), options.markdown))
    return 0


def _check_plot(options):
    for name in getattr(options, "peers", ()):
        check_name(name)
    if options.plot:
        plots.check()


def _hand_out(result, table, options):
    if not options.markdown:
        print("\n".join(contest.heading(result)) + "\n")
    print(table(result, options.markdown))
    lines = contest.notes(result)
    if lines:
        print("\n" + "\n".join(f"- {line}" if options.markdown else line for line in lines))
    if options.json:
        results.save(result, options.json)
    if options.plot:
        plots.save(result, options.plot)
    return 0


def _show(options):
    result = results.load(options.file)
    _check_plot(options)
    table = {"kernels": kernels.table, "layers": layers.table, "models": models.table}
    return _hand_out(result, table[result["kind"]], options)


def _compare(options):
    old, new = results.load(options.old), results.load(options.new)
    changes = results.compare(old, new, options.tolerance)
    header = ["case", "peer", "speed, new / old", "verdict"]
    lines = [
        [
            change["case"],
            change["peer"],
            "" if change["ratio"] is None else f"{change['ratio']:.3f}",
            change["verdict"] + (f" ({change['note']})" if change["note"] else ""),
        ]
        for change in changes
    ]
    print(tables.of(header, lines, options.markdown))
    watched = options.peers or _ours(new)
    worse = [c for c in changes if c["verdict"] in ("slower", "lost") and c["peer"] in watched]
    count = sum(change["peer"] in watched for change in changes)
    print(f"\n{len(worse)} of {count} rows of {', '.join(watched)} became slower or were lost")
    return 1 if worse else 0


def _ours(result):
    """Whose slowing down matters: dynquant, or every instruction set."""
    if result["kind"] == "kernels":
        return list(dict.fromkeys(row["peer"] for row in result["rows"]))
    return [contest.OURS]


def _python(text):
    peer, _, path = text.partition("=")
    if not peer or not os.access(path, os.X_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected PEER=PATH with the path of a Python interpreter"
        )
    return peer, path


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shaped = _shape_options()
    output = _output_options()

    add = _adder(commands)
    command = add("kernels", _kernels, kernels.__doc__, parents=[shaped, output])
    command.add_argument("--isa", nargs="+", help="instruction sets (default: all that run here)")
    command.add_argument("--rounds", type=_count, default=5)
    command.add_argument("--seconds", type=float, default=0.1, help="of each timing")
    command.add_argument(
        "--limit", type=float, default=10, help="leave out what takes more seconds a round"
    )

    add("layers", _layers, layers.__doc__, parents=[shaped, _peer_options(OF_LAYERS), output])

    peers = _peer_options({**OF_LAYERS, **OF_MODELS})
    command = add("models", _models, models.__doc__, parents=[peers, output])
    command.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(models.CASES))
    command.set_defaults(cases=[name for name in models.CASES if name != models.ENCODE])

    for name, run, measured in (("callers", _callers, callers), ("threads", _threads, threads)):
        command = add(name, run, measured.__doc__, parents=[shaped])
        command.add_argument("--rounds", type=_count, default=9)
        command.add_argument("--markdown", action="store_true", help="a table for a document")

    command = add("show", _show, "A saved result as a table or a picture.", parents=[output])
    command.add_argument("file", help="a result as --json writes it")

    command = add("compare", _compare, COMPARE)
    command.add_argument("old", help="a result as --json writes it")
    command.add_argument("new", help="a later one")
    command.add_argument(
        "--tolerance",
        type=float,
        default=0.03,
        help="a median that differs by less is the same (default 0.03); quartiles that overlap "
        "are the same too",
    )
    command.add_argument(
        "--peers", nargs="+", help="whose slowing down gives exit code 1 (default: dynquant's)"
    )
    command.add_argument("--markdown", action="store_true", help="a table for a document")
    return parser


def _adder(commands):
    def add(name, run, text, parents=()):
        command = commands.add_parser(
            name,
            help=text.strip().splitlines()[0],
            description=text,
            parents=parents,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    return add


def _shape_options():
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "shapes", nargs="*", metavar="MxNxK", help="a product, or NxK for one at every --m"
    )
    options.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="SET",
        help=f"named shapes: {', '.join(shapes.SETS)} (default: targets)",
    )
    rows = " ".join(str(m) for m in shapes.ROWS)
    options.add_argument(
        "--m", nargs="+", type=_count, help=f"the rows of layers given as NxK (default: {rows})"
    )
    return options


def _peer_options(names):
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--peers",
        nargs="+",
        default=list(names),
        metavar="PEER",
        help=f"{', '.join(names)}; also module:class "
        "for a peer of your own (see benchmarks/peers/base.py)",
    )
    options.add_argument("--threads", type=_count, default=1)
    options.add_argument("--rounds", type=_count, default=15)
    options.add_argument(
        "--cold",
        action="store_true",
        help="as in a model: inputs rotated over twice the last cache, outputs kept alive so that "
        "they lie on fresh pages",
    )
    options.add_argument(
        "--spin",
        action="store_true",
        help="threads that wait may spin, as their libraries do by default; peers that are not "
        "timed are stopped in any case",
    )
    options.add_argument(
        "--python",
        nargs="+",
        type=_python,
        metavar="PEER=PATH",
        help="run a peer in another environment that has torch, numpy and the peer",
    )
    return options


def _output_options():
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--json", metavar="FILE", help="save the result")
    options.add_argument("--plot", metavar="FILE", help="draw it (PNG, or another of Matplotlib's)")
    options.add_argument("--markdown", action="store_true", help="a table for a document")
    options.add_argument("--quiet", action="store_true", help="no progress bar")
    return options


if __name__ == "__main__":
    sys.exit(main())
