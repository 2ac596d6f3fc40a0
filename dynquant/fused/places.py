"""What a module has under a name with dots."""


def part_of(module, name, missing=None):
    """What a module has under a name with dots, "" for itself."""
    for step in name.split(".") if name else ():
        module = getattr(module, step, missing)
    return module


def place_of(module, name):
    """The holder of an attribute, and its own name."""
    holder, _, own = name.rpartition(".")
    return part_of(module, holder), own
