"""``python -m benchmarks layers`` and ``rnn``: dynquant beside its peers, in one run."""

import argparse

from benchmarks import layers, rnn
from benchmarks.peers import PEERS


def _shape(text):
    try:
        m, n, k = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not of the form MxNxK") from None
    return m, n, k


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    layer = commands.add_parser("layers", help=layers.__doc__)
    layer.add_argument("shapes", nargs="*", type=_shape, default=layers.SHAPES, metavar="MxNxK")
    layer.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    layer.add_argument("--threads", type=int, default=1)
    layer.add_argument("--rounds", type=int, default=15)
    recurrent = commands.add_parser("rnn", help=rnn.__doc__)
    recurrent.add_argument("--threads", type=int, default=1)
    recurrent.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    if arguments.command == "rnn":
        return rnn.report(rnn.run(arguments.threads, arguments.rounds))
    layers.report(
        layers.run(arguments.shapes, arguments.peers, arguments.threads, arguments.rounds)
    )


if __name__ == "__main__":
    main()
