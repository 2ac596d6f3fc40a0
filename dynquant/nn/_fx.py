"""Arguments that are not tensors: of torch.fx, for which a module is one call, or mistaken ones."""

import inspect

import torch
from torch.fx import Proxy
from torch.utils._pytree import tree_leaves

TENSOR_OR_NONE = (torch.Tensor, type(None))


def as_one_call(module, *args):
    """The call of `module` in the graph that is being traced, where an argument is a Proxy.

    Args:
        args: those of forward, in its order. What must be a tensor has no default value there, or
            the annotation torch.Tensor | None.

    Raises:
        RuntimeError: where the module is itself what is traced.
        TypeError: where no argument is a Proxy, for the one that is not a tensor.
    """
    proxies = [one for one in tree_leaves(args) if isinstance(one, Proxy)]
    if not proxies:
        raise _no_tensor(module, args)
    tracer = proxies[0].tracer
    if module is tracer.root:
        raise RuntimeError(
            f"a {type(module).__name__} alone has no graph: trace the model that it belongs to"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})


def _no_tensor(module, args):
    parameters = inspect.signature(module.forward).parameters.values()
    for parameter, value in zip(parameters, args, strict=False):
        is_needed = parameter.default is parameter.empty
        is_wanted = is_needed or (parameter.annotation == torch.Tensor | None and value is not None)
        if is_wanted and not isinstance(value, torch.Tensor):
            found = type(value)
            hint = "; torch.from_numpy makes one of an array" if _is_numpy(found) else ""
            return TypeError(
                f"{type(module).__name__}: {parameter.name} must be a torch.Tensor, "
                f"got {found.__module__}.{found.__qualname__}{hint}"
            )
    return TypeError(f"{type(module).__name__}: an argument is not a torch.Tensor")


def _is_numpy(found):
    return found.__module__ == "numpy" and found.__qualname__ == "ndarray"
