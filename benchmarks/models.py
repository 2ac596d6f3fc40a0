"""Whole models: all-MiniLM-L6-v2 (batch x length) and LSTMs, in milliseconds a call."""

from benchmarks import cases, contest, tables

CASES = {
    "minilm-1x16": cases.minilm(1, 16),
    "minilm-1x128": cases.minilm(1, 128),
    "minilm-8x32": cases.minilm(8, 32),
    "minilm-32x64": cases.minilm(32, 64),
    "minilm-32x128": cases.minilm(32, 128),
    "lstm-512-512-2-1x100": cases.lstm(1, 100, 512, 512, 2),
    "lstm-512-512-2-8x100": cases.lstm(8, 100, 512, 512, 2),
    "lstm-1024-1024-1-1x50": cases.lstm(1, 50, 1024, 1024, 1),
}
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
