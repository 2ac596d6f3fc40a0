"""Which kernels run: what was chosen and why, and forcing another instruction set."""

from importlib import metadata
from typing import Any

import numpy
import torch

from dynquant import _C
from dynquant.ops import cuda
from dynquant.ops.library import unsupported_isa


def set_isa(name: str) -> None:
    """Forces the CPU kernels of one instruction set, for all threads of the process.

    Args:
        name: one of ``dynquant.info()['available']``.

    Raises:
        TypeError: name is not a string.
        ValueError: the set is unknown or cannot run on this machine; nothing changes.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__}")
    if not _C.set_isa(name):
        raise ValueError(unsupported_isa(name, "set_isa: "))


def info() -> dict[str, Any]:
    """What runs here, as a dict.

    ``isa``: the instruction set in use; ``available``: those that run here, best first;
    ``declined``: the others, each with its reason; ``threads``: torch's number of threads;
    ``cuda``: the devices that CUDA kernels run on, or why there are none; ``version``,
    ``torch_version``, ``numpy_version``, ``layout_version``.
    """
    return {
        "isa": _C.current_isa(),
        "available": _C.available(),
        "declined": _C.declined(),
        "threads": torch.get_num_threads(),
        "cuda": cuda.describe(),
        "version": metadata.version("dynquant"),
        "torch_version": torch.__version__,
        "numpy_version": numpy.__version__,
        "layout_version": _C.layout_version,
    }
