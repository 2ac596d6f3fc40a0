"""torch.fx: a quantized module is one call of the graph, as torch's own modules are."""

from torch.fx import Proxy
from torch.utils._pytree import tree_leaves


def as_one_call(module, *args, **kwargs):
    """The call of `module` in the graph that is being traced, where an argument is a Proxy.

    Raises:
        RuntimeError: where the module is itself what is traced.
    """
    tracer = next(one.tracer for one in tree_leaves((args, kwargs)) if isinstance(one, Proxy))
    if module is tracer.root:
        raise RuntimeError(
            f"a {type(module).__name__} alone has no graph: trace the model that it belongs to"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, kwargs)
