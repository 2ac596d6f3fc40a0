"""The CUDA kernels: loads them where they were built, and says why they are off."""

import ctypes
from pathlib import Path

import torch

_LIBRARY = Path(__file__).parents[1] / "libdynquant_cuda.so"
_NOT_BUILT = (
    "dynquant was installed without CUDA kernels, since nvcc was not found or DYNQUANT_CUDA=off "
    "was set; install it from source with DYNQUANT_CUDA=on"
)
_library = None


def load(library):
    """Registers the CUDA implementations of the ops; nothing touches a device.

    An op without one says so when it is given CUDA tensors.

    Args:
        library: the torch.library.Library of dynquant.
    """
    global _library
    if _LIBRARY.exists():
        torch.ops.load_library(_LIBRARY)
        _library = ctypes.CDLL(str(_LIBRARY))
        _library.dynquant_cuda_unavailable.restype = ctypes.c_char_p
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for op in torch._C._dispatch_get_all_op_names():
        if op.startswith("dynquant::") and has_kernel(op, "CPU") and not has_kernel(op, "CUDA"):
            library.impl(op.removeprefix("dynquant::"), _refusal(op), "CUDA")


def _refusal(op):
    reason = f": {_NOT_BUILT}" if _library is None else ""

    def refuse(*arguments, **keywords):
        raise NotImplementedError(f"{op} has no CUDA kernel{reason}")

    return refuse


def describe():
    """What dynquant.info()['cuda'] says: 'on: ...' or 'off: ...' with the reason."""
    if _library is None:
        return f"off: {_NOT_BUILT}"
    if torch.version.cuda is None:
        return f"off: torch {torch.__version__} has no CUDA"
    reason = _library.dynquant_cuda_unavailable()
    if reason is not None:
        return f"off: {reason.decode()}"
    if not torch.cuda.is_available():
        return "off: torch finds no CUDA device"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    if oldest < (7, 5):
        return "off: a device has the compute capability {}.{}, below 7.5".format(*oldest)
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    version = _library.dynquant_cuda_version()
    return f"on: {', '.join(sorted(names))} (CUDA {version // 1000}.{version % 1000 // 10})"
