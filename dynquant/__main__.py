"""``python -m dynquant info`` prints which kernels run here."""

import argparse

import dynquant


def main():
    parser = argparse.ArgumentParser(prog="python -m dynquant", description=dynquant.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="print which kernels run here, and why")
    parser.parse_args()
    for key, value in dynquant.info().items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
