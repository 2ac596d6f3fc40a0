"""Whole models: all-MiniLM-L6-v2 (batch x length) and recurrent layers, in milliseconds a call.

The name of a recurrent layer tells its size, the number of layers, and batch x length.
"""

from benchmarks import cases, contest, tables


def _recurrent():
    shapes = (
        ("LSTM", 256, 1, 1, 100),
        ("LSTM", 512, 2, 1, 100),
        ("LSTM", 1024, 1, 1, 50),
        ("LSTM", 512, 1, 16, 50),
        ("GRU", 512, 1, 1, 100),
        ("GRU", 512, 1, 16, 50),
    )
    for layer, size, layers, batch, length in shapes:
        name = f"{layer.lower()}-{size}-{layers}-{batch}x{length}"
        yield name, cases.recurrent(layer, size, layers, batch, length)


def _minilm():
    for batch, length in ((1, 16), (1, 128), (8, 32), (32, 64), (32, 128)):
        yield f"minilm-{batch}x{length}", cases.minilm(batch, length)


CASES = {**dict(_minilm()), **dict(_recurrent())}
# What int8 costs grows over layers and steps, and the inputs are random: engines with one scale for
# a whole weight keep 8 dB of all-MiniLM-L6-v2. That is little, but no wrong result.
LIMITS = (5, 0.5)


def run(names, options):
    return contest.run("models", {name: CASES[name] for name in names}, options, LIMITS)


def table(result, as_markdown=False):
    """Times, and below them how near the results are to the exact ones."""
    times = contest.table(result, _milliseconds, "model, ms", as_markdown)
    return f"{times}\n\n{_quality(result, as_markdown)}"


def _milliseconds(case, row):
    return f"{row['median'] * 1e3:.2f}"


def _quality(result, as_markdown):
    names = list(result["peers"])
    lines = [
        [case, *(_decibels(rows[name]) for name in names)]
        for case, rows in contest.by_case(result).items()
    ]
    return tables.of(["SNR, dB", *names], lines, as_markdown)


def _decibels(row):
    return "" if row["snr_db"] is None else f"{row['snr_db']:.1f}"
