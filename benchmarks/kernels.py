"""Every entry of the kernel table by shape, against what the machine gives at best.

One thread, fp32 in and out, quantization and epilogue included, no torch: GOP/s beside the
instruction set's own peak (its product on registers alone), and bytes of packed weight a second
beside the rate of reading a buffer of that size. Peaks are measured in the same rounds.
"""

from benchmarks import contest, machine, results, tables
from benchmarks.shapes import format_shape

BATCHES = 9  # of a timing in _C, at least one call each


class KernelsMissing(RuntimeError):
    """dynquant is not installed here, or an instruction set cannot run."""


def _compiled():
    try:
        from dynquant import _C
    except ImportError as error:
        raise KernelsMissing(f"dynquant's kernels cannot be imported: {error}") from error
    return _C


def run(shapes, sets, rounds, seconds, limit, quiet=False):
    """The result (see results.make). Rates are 1/s: operations and bytes.

    sets: names of instruction sets, or None for all. seconds: of each timing. limit: a shape that
    would take a set longer than so many seconds is left out, and named.
    """
    c = _compiled()
    available = c.available()
    unknown = [name for name in sets or () if name not in available]
    if unknown:
        raise KernelsMissing(f"instruction set {unknown[0]}: available are {', '.join(available)}")
    roofs = _roofs(c, sets or available, rounds, seconds)
    rows, pairs = [], []
    for name in sets or available:
        peak = roofs[name]["peak"]
        for shape in shapes:
            row = _row(c, name, shape)
            estimate = BATCHES * row["operations"] / peak
            if estimate > limit:
                row["status"] = "skipped"
                row["note"] = f"would take {estimate:.0f} s a round; --limit is {limit:g}"
            else:
                pairs.append((row, name, shape))
            rows.append(row)
    steps = [pair for _ in range(rounds) for pair in pairs]
    for row, name, (m, n, k) in contest.progress("kernels", quiet)(steps):
        row["seconds"].append(c.linear_seconds(name, m, n, k, seconds))
        row["peak"].append(2 * c.peak_rate(name, seconds / 4))
        row["read"].append(c.read_rate(name, row["bytes"], seconds / 4))
        roofs[name]["peak"] = max(roofs[name]["peak"], row["peak"][-1])
    settings = {"rounds": rounds, "seconds": seconds, "threads": 1}
    return results.make("kernels", machine.facts(), settings, rows, roofs=roofs)


def _row(c, name, shape):
    m, n, k = shape
    size = c.packed_bytes(n, k)
    return {
        "case": format_shape(shape),
        "peer": name,
        "status": "ok",
        "note": "",
        "operations": 2 * m * n * k,
        "bytes": size,
        "level": machine.level_of(size),
        "seconds": [],
        "peak": [],
        "read": [],
    }


def _roofs(c, names, rounds, seconds):
    """{set: {"peak": operations a second, "read": {level: bytes a second}}}: the best of rounds."""
    sizes = {name: size // 2 for name, size in machine.caches().items()}
    sizes["memory"] = 4 * machine.last_cache_bytes()
    return {
        name: {
            "peak": max(2 * c.peak_rate(name, seconds / 4) for _ in range(rounds)),
            "read": {
                level: max(c.read_rate(name, size, seconds / 4) for _ in range(rounds))
                for level, size in sizes.items()
            },
        }
        for name in names
    }


def rates(row):
    """(operations a second, share of the peak, bytes a second, share of the read rate)."""
    operations = row["operations"] / row["median"]
    bytes_ = row["bytes"] / row["median"]
    return (
        operations,
        operations / results.spread(row["peak"])["median"],
        bytes_,
        bytes_ / results.spread(row["read"])["median"],
    )


def table(result, as_markdown=False):
    header = ["MxNxK", "set", "GOP/s", "of peak", "weights GB/s", "of read", "from", "microseconds"]
    lines = []
    for row in result["rows"]:
        if "median" not in row:
            lines.append([row["case"], row["peer"], row["status"], "", "", "", row["level"], ""])
            continue
        operations, of_peak, bytes_, of_read = rates(row)
        lower, upper = row["quartiles"]
        lines.append(
            [
                row["case"],
                row["peer"],
                f"{operations / 1e9:.1f}",
                f"{of_peak:.0%}",
                f"{bytes_ / 1e9:.1f}",
                f"{of_read:.0%}",
                row["level"],
                f"{row['median'] * 1e6:.1f} ±{50 * (upper - lower) / row['median']:.0f}%",
            ]
        )
    return tables.of(header, lines, as_markdown)
