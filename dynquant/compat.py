"""Making torch's own quantize_dynamic dynquant's, for code that cannot be edited.

import dynquant.compat
dynquant.compat.install()
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from dynquant.quantize import quantize_dynamic

_PACKAGES = (
    "torch.ao.quantization.quantize",
    "torch.ao.quantization",
    "torch.quantization.quantize",
    "torch.quantization",
)
_replaced: list[tuple[ModuleType, Any]] = []  # (module, its own quantize_dynamic)


def install() -> None:
    """Makes torch.ao.quantization.quantize_dynamic and its other names dynquant's.

    Its names are those of torch.ao.quantization, torch.ao.quantization.quantize,
    torch.quantization, torch.quantization.quantize, and of every other loaded module of torch that
    has imported it. Modules outside torch that have imported the function before keep torch's: call
    install first. Calling it twice does no more than once.

    Raises:
        RuntimeError: where this torch has no torch.ao.quantization.
    """
    if _replaced:
        return
    original = _original()
    for name, module in sorted(sys.modules.items()):
        is_torch = name == "torch" or name.startswith("torch.")
        if is_torch and vars(module).get("quantize_dynamic") is original:
            _replaced.append((module, original))
            vars(module)["quantize_dynamic"] = quantize_dynamic


def uninstall() -> None:
    """Gives torch's names their own function back. Without install before, it does nothing."""
    while _replaced:
        module, original = _replaced.pop()
        vars(module)["quantize_dynamic"] = original


def installed() -> bool:
    """Whether torch's quantize_dynamic is dynquant's at present."""
    return bool(_replaced)


def _original():
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            continue  # torch removes them one after the other
    module = sys.modules.get("torch.ao.quantization")
    original = getattr(module, "quantize_dynamic", None)
    if original is None:
        raise RuntimeError(
            "this torch has no torch.ao.quantization.quantize_dynamic: call "
            "dynquant.quantize_dynamic"
        )
    return original
