"""Several threads that call all ops at once while another forces instruction sets.

As a program the first calls of the process come from all threads together. With --forked they come
from those of a forked child, where ops split their work over threads of their own instead of
torch's pool: the thread sanitizer sees how those wait for each other, and not how OpenMP's do.
"""

import argparse
import ctypes
import os
import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import fuzz
import numpy as np
import torch
from compare import assert_all_same
from op_arguments import ALL_OPS, call, valid_call
from torch.utils import _pytree as pytree

import dynquant

SIZES = ({"m": (3,)}, {"m": (40,), "n": 70, "k": 130})
SPLIT = {"m": (40,), "n": 130, "k": 200}  # on scalar kernels worth threads that have to be started
ONE_HAS_THREE = (3, 1, 1, 1)  # torch's number of threads for each of the callers


def together(work, threads):
    """work(number) in several threads that start at once, while another forces sets."""
    start, over, failures = threading.Barrier(len(threads) + 1), threading.Event(), []

    def caller(number):
        try:
            torch.get_num_threads()  # else the thread's first op takes the number set last anywhere
            torch.set_num_threads(threads[number])
            start.wait()
            assert torch.get_num_threads() == threads[number]
            work(number)
        except BaseException as error:
            failures.append(error)

    def forcing():
        sets = dynquant.info()["available"]
        start.wait()
        while not over.is_set():
            for name in sets:
                for one in (name, "scalar"):  # sanitizers may watch it alone
                    dynquant.set_isa(one)
                    assert dynquant.info()["isa"] == one

    isa = dynquant.info()["isa"]
    callers = [threading.Thread(target=caller, args=(number,)) for number in range(len(threads))]
    other = threading.Thread(target=forcing)
    for thread in (*callers, other):
        thread.start()
    for thread in callers:
        thread.join()
    over.set()
    other.join()
    dynquant.set_isa(isa)
    if failures:
        raise failures[0]


def run(rounds, threads=ONE_HAS_THREE, sizes=SIZES):
    """Raises AssertionError where a call gives other bits than the same call made alone."""
    arguments = {
        (name, i): valid_call(name, **sizes[i]) for name in ALL_OPS for i in range(len(sizes))
    }
    large = torch.randn(2100, 1000)  # quantized and packed on threads of the call's own
    wide = torch.ops.dynquant.pack_weight(torch.ones(600, 8, dtype=torch.int8)), torch.ones(600)
    many_rows = torch.randn(2000, 8)  # whose results are worth huge pages
    results = []

    def all_calls():
        given = {key: call(key[0], values) for key, values in arguments.items()}
        q, own_scale = torch.ops.dynquant.quantize_weight(large)
        given["large"] = (q, own_scale, torch.ops.dynquant.pack_weight(q))
        given["many rows"] = torch.ops.dynquant.linear_dynamic(many_rows, *wide)
        return {key: pytree.tree_leaves(value) for key, value in given.items()}

    together(lambda number: results.extend(all_calls() for _ in range(rounds)), threads)
    for key, expected in all_calls().items():
        for given in results:
            assert_all_same(given[key], expected, str(key))


def run_drawn(calls, seed, threads=ONE_HAS_THREE):
    """The same for `calls` drawn calls of each thread, which are compared with the reference."""

    def work(number):
        rng = np.random.default_rng([seed, number])
        for _ in range(calls):
            fuzz.RIGHT[fuzz.one_of(rng, list(ALL_OPS))](rng)

    together(work, threads)


def run_race(library, threads):
    """Calls that race with each other: the proof that a sanitizer would see it here."""
    count = ctypes.CDLL(library).count
    together(lambda number: count(20_000_000), threads)  # long beside what the lock keeps apart


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--drawn", type=int, default=100, help="drawn calls of each thread")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads", type=int, nargs="+", default=ONE_HAS_THREE, help="of each of the callers"
    )
    parser.add_argument("--forked", action="store_true")
    parser.add_argument("--race", metavar="LIBRARY", help="that of tests/cpp/race.cpp, and no more")
    options = parser.parse_args()
    if options.forked and (child := os.fork()):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if options.race:
        run_race(options.race, options.threads)
    else:
        run(options.rounds, options.threads, (*SIZES, SPLIT) if options.forked else SIZES)
        run_drawn(options.drawn, options.seed, options.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
