"""Whole models: all-MiniLM-L6-v2 (batch x length) and LSTMs, in milliseconds a call."""

from benchmarks import cases, contest

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
# What int8 costs grows over layers and steps: 10 dB, and no output vector that points elsewhere.
LIMITS = (10, 0.9)


def run(names, options):
    return contest.run("models", {name: CASES[name] for name in names}, options, LIMITS)


def table(result, as_markdown=False):
    return contest.table(result, _cell, "model, ms", as_markdown)


def _cell(case, row):
    return f"{row['median'] * 1e3:.2f}"
