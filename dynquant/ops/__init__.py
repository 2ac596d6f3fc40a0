"""torch.ops.dynquant: the compiled ops, and what tracing and training need of them.

The schemas and the implementations are in csrc/ops.
"""

from dynquant.ops import (
    attention,
    blocks,
    cached,
    convolution,
    embedding,
    encoder,
    experts,
    flops,
    grouped,
    half,
    linear,
    mixers,
    recurrent,
)

__all__ = [
    "attention",
    "blocks",
    "cached",
    "convolution",
    "embedding",
    "encoder",
    "experts",
    "flops",
    "grouped",
    "half",
    "linear",
    "mixers",
    "recurrent",
]
