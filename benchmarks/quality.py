"""How near a result is to the exact one."""

import numpy as np

BLOCK = 2**22
FEWEST_VALUES = 64  # the direction of fewer says little: that of one is a sign


def measure(result, exact):
    """SNR in dB over all, and the lowest cosine of a row (of the last dimension).

    Rows of few values are taken together.

    result: a numpy array. exact: the .npy file of what it should be.
    None instead of an SNR where the result is exact, and where it is not finite.
    """
    expected = np.load(exact, mmap_mode="r")
    if tuple(result.shape) != expected.shape:
        raise ValueError(f"the result has the shape {tuple(result.shape)}, not {expected.shape}")
    if not np.isfinite(result).all():
        return {"finite": False, "snr_db": None, "cosine": None}
    columns = expected.shape[-1]
    result, expected = result.reshape(-1, columns), expected.reshape(-1, columns)
    signal = noise = 0.0
    cosine = 1.0
    step = max(1, BLOCK // columns)
    for begin in range(0, len(expected), step):
        right = np.asarray(expected[begin : begin + step], dtype=np.float64)
        ours = result[begin : begin + step].astype(np.float64)
        signal += float(np.square(right).sum())
        noise += float(np.square(ours - right).sum())
        cosine = min(cosine, float(_cosines(ours, right).min()))
    snr = 10 * np.log10(signal / noise) if noise > 0 and signal > 0 else None
    return {"finite": True, "snr_db": None if snr is None else float(snr), "cosine": cosine}


def _cosines(ours, right):
    rows, columns = right.shape
    together = -(-FEWEST_VALUES // columns)
    starts = np.arange(0, max(1, rows - together + 1), together)  # the last takes what remains
    dots, ours, right = (
        np.add.reduceat(products.sum(1), starts)
        for products in (ours * right, np.square(ours), np.square(right))
    )
    lengths = np.sqrt(ours * right)
    return np.divide(dots, lengths, where=lengths > 0, out=np.ones_like(dots))


def wrong(measured, lowest_snr_db, lowest_cosine):
    """Why a result is wrong, or "" where it is right."""
    if not measured["finite"]:
        return "wrong result: not finite"
    snr, cosine = measured["snr_db"], measured["cosine"]
    if snr is not None and snr < lowest_snr_db:
        return f"wrong result: SNR {snr:.1f} dB"
    if cosine < lowest_cosine:
        return f"wrong result: lowest cosine {cosine:.3f}"
    return ""
