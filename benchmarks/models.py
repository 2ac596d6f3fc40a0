"""Whole models: encoders (batch x length) and recurrent layers, in milliseconds a call.

minilm is all-MiniLM-L6-v2; bert-base has random weights, and so have deberta, of the shape of
DeBERTa-v3-base, and qwen3-8 and gemma3-8, decoders that embed texts: eight layers of the shapes of
Qwen3-Embedding-0.6B and EmbeddingGemma. Texts of 32x8..128 have lengths of 8 to 128 tokens and are
padded. The name of a recurrent layer tells its size, the number of layers, and batch x length.
wav2vec2-1x500 is the transformer of wav2vec2-base for ten seconds of speech, and qwen2-8-16+128
sixteen tokens, one after another, behind 128 others, by eight layers of the shape of Qwen2-0.5B;
whisper-6-16+32 the same of a transcript, behind 32, by the decoder of whisper-base for 30 seconds
of speech, and whisper-6-96+4 the whole of one. wav2vec2-1x80000 is all of wav2vec2-base for five
seconds, moonshine-1x80000 the encoder of moonshine-base, features-1x80000 what the former has in
front of its transformer, and vocoder-1x100 the HiFi-GAN of SpeechT5 for 1.6: there dynquant and
torch.ao are asked for convolutions. Of the eight layers of qwen3.5-8, granite4h-8 and lfm2-8 most
have the gated delta rule, Mamba 2 or short convolutions; 16+128 is sixteen tokens behind a prompt
of 128, and so it is of ernie4.5-8, by the shape of ERNIE-4.5-0.3B. These have random weights.
encode-500 is run where it is named: the `encode` of sentence-transformers for 500 texts of 3 to 100
words.
"""

import statistics

from benchmarks import cases, contest, hybrids, tables
from benchmarks.peers import CALIBRATED


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


def _encoders():
    shapes = (
        ("minilm", ((1, 16), (1, 128), (8, 32), (32, 64), (32, 128))),
        ("bert-base", ((1, 32), (8, 128))),
        ("deberta", ((1, 32), (8, 128), (1, 512))),
        ("qwen3-8", ((1, 128), (8, 32), (1, 512))),
        ("gemma3-8", ((1, 128), (8, 32), (1, 512))),
        ("ernie4.5-8", ((1, 128), (1, 512))),
        *((model, ((1, 128), (1, 512))) for model in hybrids.MODELS),
    )
    for model, sizes in shapes:
        for batch, length in sizes:
            yield f"{model}-{batch}x{length}", cases.encoder(model, batch, length)
    yield "minilm-32x8..128", cases.encoder("minilm", 32, 128, 8)


ENCODE = "encode-500"
CASES = {
    **dict(_encoders()),
    **dict(_recurrent()),
    "wav2vec2-1x500": cases.speech(500),
    "wav2vec2-1x80000": cases.convolutions("wav2vec2", 80000),
    "moonshine-1x80000": cases.convolutions("moonshine", 80000),
    "features-1x80000": cases.convolutions("features", 80000),
    "vocoder-1x100": cases.convolutions("vocoder", 100),
    "qwen2-8-16+128": cases.tokens(8, 16, 128),
    "qwen2-8-16+2000": cases.tokens(8, 16, 2000),
    "whisper-6-16+32": cases.transcript(6, 16, 32, 1500),
    "whisper-6-96+4": cases.transcript(6, 96, 4, 1500),
    **{
        f"{model}-16+128": cases.continued(model, 16, 128)
        for model in ("ernie4.5-8", *hybrids.MODELS)
    },
    ENCODE: cases.encode(500),
}
# What int8 costs grows over layers and steps, and the inputs are random: engines with one scale for
# a whole weight keep 8 dB of all-MiniLM-L6-v2. That is little, but no wrong result.
LIMITS = (5, 0.5)


def run(names, options):
    return contest.run("models", {name: CASES[name] for name in names}, options, LIMITS, fresh=True)


def table(result, as_markdown=False):
    """Times; below them texts a second, and how near the results are to the exact ones."""
    parts = [contest.table(result, _milliseconds, "model, ms", as_markdown)]
    if any(_texts(case) for case in result["cases"].values()):
        parts.append(_rates(result, as_markdown))
    parts.append(_quality(result, as_markdown))
    return "\n\n".join([*parts, *_means(result)])


def _means(result):
    """A line for each kind of peer: how many times as fast dynquant is over the encoders."""
    cases = contest.by_case(result)
    encoders = [
        rows for title, rows in cases.items() if result["cases"][title]["kind"] == "encoder"
    ]
    against = {"the best peer without calibration": contest.best_peer}
    against.update((name, lambda rows, name=name: rows.get(name)) for name in CALIBRATED)
    for name, other in against.items():
        ratios = [contest.ratio(rows, other(rows)) for rows in encoders]
        ratios = [float(ratio) for ratio in ratios if ratio]
        if ratios:
            mean = statistics.geometric_mean(ratios)
            least = min(ratios)
            yield f"encoders, times as fast as {name}: {mean:.2f} in the mean, {least:.2f} at least"


def _rates(result, as_markdown):
    names = list(result["peers"])
    lines = [
        [title, *(_rate(result["cases"][title], rows[name]) for name in names)]
        for title, rows in contest.by_case(result).items()
    ]
    return tables.of(["texts/s", *names], lines, as_markdown)


def _rate(case, row):
    return f"{_texts(case) / row['median']:.0f}" if "median" in row and _texts(case) else ""


def _texts(case):
    return case.get("texts", case.get("batch"))


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
