"""What asks for a module to be called. Hooks by which outputs are captured are mostly idle."""

import sys

import torch

_CAPTURING = "transformers.utils.output_capturing"


def all_idle(module):
    """Whether no forward hook of `module` does anything during this call."""
    if module._forward_pre_hooks:
        return False
    return not module._forward_hooks or all(map(_is_idle, module._forward_hooks.values()))


def disturbed(module):
    """Whether calling the module does more than its class says: hooks, training, a replacement."""
    if module.training or "forward" in module.__dict__ or has_others_for_parameters(module):
        return True
    return not all_idle(module)


def has_others_for_parameters(module):
    """Whether its weight or bias is a plain tensor, or computed: ops look for parameters."""
    if "parametrizations" in module._modules:
        return True
    own = module.__dict__
    return isinstance(own.get("weight"), torch.Tensor) or isinstance(own.get("bias"), torch.Tensor)


def first_disturbance(named, besides=frozenset()):
    """Which of the (name, module) is disturbed first and by what, for messages; "" for none.

    Args:
        besides: ids of modules that do not count.
    """
    for name, module in named:
        # These lines say it for nearly all; a function for each would cost as much again.
        own = module.__dict__
        if not (
            module.training
            or module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in own
            or "weight" in own
            or "bias" in own
            or "parametrizations" in module._modules
        ):
            continue
        if disturbed(module) and id(module) not in besides:
            return f"{name} {_why(module)}"
    return ""


def _why(module):
    if module.training:
        return "is in training mode"
    if has_others_for_parameters(module):
        return "has something else for a parameter"
    return "has hooks" if "forward" not in module.__dict__ else "has another forward"


def _is_idle(hook):
    """True for a capturing hook, which stays once it was asked for, when nothing is captured."""
    if hook.__class__.__name__ != "function" or hook.__module__ != _CAPTURING:
        return False
    collector = getattr(sys.modules[_CAPTURING], "_active_collector", None)
    names = hook.__code__.co_freevars
    if collector is None or "key" not in names:  # of a version that does it otherwise
        return False
    collected = collector.get()
    return collected is None or hook.__closure__[names.index("key")].cell_contents not in collected
