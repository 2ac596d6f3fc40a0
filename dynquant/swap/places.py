"""Where a model holds its modules: as submodules, and in plain attributes beside them."""


def replace_modules(model, replacements):
    """Puts other modules in the places of some.

    A model may hold a module in a plain list, tuple, dict or attribute as well, and call it there.

    Args:
        model: is changed, its module types are not.
        replacements: a mapping from modules to what takes their places.
    """
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child in replacements:
                parent._modules[key] = replacements[child]
        for key, value in vars(parent).items():
            if key not in _OF_TORCH:
                parent.__dict__[key] = _replaced(value, replacements)


_OF_TORCH = ("_modules", "_parameters", "_buffers")


def _replaced(value, replacements):
    """The value with modules replaced: containers that can be are changed in place."""
    if type(value) is list:
        value[:] = [_replaced(one, replacements) for one in value]
    elif type(value) is dict:
        value.update({key: _replaced(one, replacements) for key, one in value.items()})
    elif type(value) is tuple:
        return tuple(_replaced(one, replacements) for one in value)
    elif hasattr(value, "_modules"):
        return replacements.get(value, value)
    return value
