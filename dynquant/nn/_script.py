"""What torch.jit.script is told of modules that it cannot compile."""


def no_script(module, reason):
    """The error that __prepare_scriptable__, which torch.jit.script calls first, raises.

    Args:
        reason: what the module does that TorchScript cannot.
    """
    name = type(module).__name__
    return RuntimeError(
        f"torch.jit.script cannot compile dynquant.nn.{name}, which {reason}: use "
        "torch.jit.trace, or torch.export.export"
    )
