"""The error of torch.jit.script for modules that it cannot compile."""


def no_script(module, reason):
    """What __prepare_scriptable__ raises, which torch.jit.script calls first.

    Args:
        reason: what the module does that TorchScript cannot.
    """
    name = type(module).__name__
    return RuntimeError(
        f"torch.jit.script cannot compile dynquant.nn.{name}, which {reason}: use "
        "torch.jit.trace, or torch.export.export"
    )
