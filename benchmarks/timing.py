"""Seconds of one call, warm and as in a model."""

import ctypes
import math
import time
from itertools import cycle, islice

CHUNK_SECONDS = 0.02
KEPT_BYTES = 512 * 2**20


def warm(call, inputs):
    """The mean over a chunk long enough for the clock, after two calls that warm the caches."""
    call(*inputs)
    begin = time.perf_counter()
    call(*inputs)
    calls = max(1, int(CHUNK_SECONDS / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        call(*inputs)
    return (time.perf_counter() - begin) / calls


def copies_beyond(cache_bytes, input_bytes):
    """How many inputs exceed the cache twice over; at least two."""
    return max(2, math.ceil(2 * cache_bytes / max(1, input_bytes)))


def cold(call, rotation, output_bytes):
    """The mean over a chunk in which every call has another input, and every output stays alive.

    rotation: tuples of inputs, together larger than the last cache.
    output_bytes: of one call; they bound how many calls a chunk has.

    Between chunks the free memory goes back to the system, so that outputs lie on fresh pages
    unless the peer's own allocator keeps them.
    """
    inputs = cycle(rotation)
    begin = time.perf_counter()
    call(*next(inputs))
    once = time.perf_counter() - begin
    calls = max(1, min(int(CHUNK_SECONDS / once), KEPT_BYTES // max(1, output_bytes)))
    _trim()
    kept = []
    begin = time.perf_counter()
    for x in islice(inputs, calls):
        kept.append(call(*x))
    return (time.perf_counter() - begin) / calls


def _trim():
    """Gives free memory back, where the C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
