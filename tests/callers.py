"""Several threads that call all ops at once while another forces instruction sets.

As a program the first calls of the process come from all threads together.
"""

import sys
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

import torch
from compare import assert_all_same
from op_arguments import ALL_OPS, call, valid_call
from torch.utils import _pytree as pytree

import dynquant

CALLERS = 4
SIZES = ({"m": (3,)}, {"m": (40,), "n": 70, "k": 130})


def run(rounds):
    """Raises AssertionError where a call gives other bits than the same call made alone."""
    arguments = {(name, i): valid_call(name, **SIZES[i]) for name in ALL_OPS for i in (0, 1)}
    large = torch.randn(600, 300)  # quantized and packed on threads of the call's own
    start, over = threading.Barrier(CALLERS + 1), threading.Event()
    results, failures = [], []

    def all_calls():
        given = {key: call(key[0], values) for key, values in arguments.items()}
        q, scale = torch.ops.dynquant.quantize_weight(large)
        given["large"] = (q, scale, torch.ops.dynquant.pack_weight(q))
        return {key: pytree.tree_leaves(value) for key, value in given.items()}

    def caller(number):
        torch.set_num_threads(1 + 2 * (number == 0))  # each thread has its own number
        try:
            start.wait()
            for _ in range(rounds):
                results.append(all_calls())
        except Exception as error:
            failures.append(error)

    def forcing():
        sets = dynquant.info()["available"]
        start.wait()
        while not over.is_set():
            for name in sets:
                dynquant.set_isa(name)

    isa = dynquant.info()["isa"]
    callers = [threading.Thread(target=caller, args=(number,)) for number in range(CALLERS)]
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
    for key, expected in all_calls().items():
        for given in results:
            assert_all_same(given[key], expected, str(key))


if __name__ == "__main__":
    run(rounds=20)
