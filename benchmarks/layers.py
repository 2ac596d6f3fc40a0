"""One linear layer, shape by shape: dynquant and its peers in GOP/s (2MNK / time of a call)."""

from benchmarks import cases, contest
from benchmarks.shapes import format_shape

# int8 gives 30 dB and more on Gaussian data. A cosine of a row tells a few wrong rows.
LIMITS = (20, 0.95)


def run(shapes, options):
    described = {format_shape(shape): cases.linear(*shape) for shape in shapes}
    return contest.run("layers", described, options, LIMITS)


def gops(case, row):
    m, n, k = (int(size) for size in case.split("x"))
    return 2 * m * n * k / row["median"] / 1e9


def table(result, as_markdown=False):
    return contest.table(result, _cell, "MxNxK, GOP/s", as_markdown)


def _cell(case, row):
    value = gops(case, row)
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
