"""Several Python threads that call one layer at once: calls a second, and whether all are right.

Each calls with one torch thread, as the workers of a server do.
"""

import statistics
import threading
import time

from benchmarks import cases, machine, tables
from benchmarks.shapes import format_shape

CHUNK_SECONDS = 0.2


class WrongResult(RuntimeError):
    """A call's result is not that of the same call made alone."""


def run(shapes, rounds):
    """{shape: {number of callers: (median calls a second of all together, ratio to one)}}."""
    import torch

    import dynquant

    counts = sorted({1, 2, machine.facts()["cores_allowed"]})
    torch.set_num_threads(1)
    results = {}
    for shape in shapes:
        module, (x,) = cases.build(cases.linear(*shape))
        layer = dynquant.quantize_dynamic(module)
        with torch.inference_mode():
            expected = layer(x)
        rates = {count: [] for count in counts}
        for _ in range(rounds):
            for count in counts:
                rates[count].append(_together(layer, x, expected, count))
        medians = {count: statistics.median(rates[count]) for count in counts}
        results[format_shape(shape)] = {
            count: (median, median / medians[1]) for count, median in medians.items()
        }
    return results


def _together(layer, x, expected, count):
    """Calls a second of `count` threads that start at once."""
    import torch

    start = threading.Barrier(count + 1)
    calls, wrong = [0] * count, []

    def caller(i):
        torch.set_num_threads(1)  # each thread has its own number
        with torch.inference_mode():
            y = layer(x.clone())
            start.wait()
            end = time.perf_counter() + CHUNK_SECONDS
            while time.perf_counter() < end:
                y = layer(x)
                calls[i] += 1
        if not torch.equal(y, expected):
            wrong.append(i)

    threads = [threading.Thread(target=caller, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    start.wait()
    begin = time.perf_counter()
    for thread in threads:
        thread.join()
    if wrong:
        raise WrongResult(f"{len(wrong)} of {count} threads got another result than one alone")
    return sum(calls) / (time.perf_counter() - begin)


def table(results, as_markdown=False):
    counts = list(next(iter(results.values())))
    header = ["MxNxK, calls/s", *(f"{count} at once" for count in counts)]
    lines = [
        [shape, *(f"{rate:.0f} ({ratio:.2f}x)" for rate, ratio in rates.values())]
        for shape, rates in results.items()
    ]
    return tables.of(header, lines, as_markdown)
