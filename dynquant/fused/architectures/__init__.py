"""The architectures that are known: nn.TransformerEncoderLayer, and those of transformers.

A block that transformers copies from model to model stands here once: classes that run its code
are known by it (known.py). Names are those of transformers 5.24 and torch 2.10 to 2.13; an older or
newer version whose blocks have other parts, or call them otherwise, is found out when a block is
fused, and left alone.
"""

from dynquant.fused.architectures import (  # noqa: F401 (each registers its own)
    decoder_attentions,
    decoders,
    feed_forward,
    sequences,
    text,
    torch_layers,
    vision,
)
