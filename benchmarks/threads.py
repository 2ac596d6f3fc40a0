"""What torch's number of threads adds to calls that need few: microseconds of one call.

The way of splitting a product is searched for at each call, among more candidates the more threads
there are.
"""

import statistics

from benchmarks import cases, tables, timing
from benchmarks.shapes import format_shape

COUNTS = (1, 2, 8, 128)


def run(shapes, rounds):
    """{shape: {number of threads: median seconds of a call}}."""
    import torch

    import dynquant

    results = {}
    for shape in shapes:
        module, (x,) = cases.build(cases.linear(*shape))
        layer = dynquant.quantize_dynamic(module)
        times = {count: [] for count in COUNTS}
        with torch.inference_mode():
            for _ in range(rounds):
                for count in COUNTS:
                    torch.set_num_threads(count)
                    times[count].append(timing.warm(layer, (x,)))
        results[format_shape(shape)] = {
            count: statistics.median(values) for count, values in times.items()
        }
    return results


def table(results, as_markdown=False):
    header = ["MxNxK, microseconds", *(f"{count} threads" for count in COUNTS)]
    lines = [
        [shape, *(f"{1e6 * seconds:.1f}" for seconds in times.values())]
        for shape, times in results.items()
    ]
    return tables.of(header, lines, as_markdown)
