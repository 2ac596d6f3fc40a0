"""Blocks of known architectures as single ops, and the adapters that tell what their parts are."""

from dynquant.fused import architectures  # noqa: F401 (registers them)
from dynquant.fused.adapters import (
    Adapter,
    Attention,
    FeedForward,
    LinearBlock,
    Relative,
    SharedKeys,
    Stretch,
    Sublayers,
    register,
)
from dynquant.fused.fuse import fuse, fused_blocks

__all__ = [
    "Adapter",
    "Attention",
    "FeedForward",
    "LinearBlock",
    "Relative",
    "SharedKeys",
    "Stretch",
    "Sublayers",
    "fuse",
    "fused_blocks",
    "register",
]
