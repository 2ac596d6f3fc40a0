"""Named shapes: data, and the parser of those given on the command line."""

# What a linear layer of these models multiplies by, (N, K); each is asked at every M.
LAYERS = {
    "bert-base": {
        "attention": (768, 768),
        "intermediate": (3072, 768),
        "output": (768, 3072),
    },
    "minilm": {
        "attention": (384, 384),
        "intermediate": (1536, 384),
        "output": (384, 1536),
    },
    "llama-3-8b": {
        "query and output": (4096, 4096),
        "key and value": (1024, 4096),
        "gate and up": (14336, 4096),
        "down": (4096, 14336),
    },
    "whisper-small": {
        "attention": (768, 768),
        "fc1": (3072, 768),
        "fc2": (768, 3072),
    },
}
ROWS = (1, 4, 8, 16, 32, 128, 512, 1024)

# Whole products, (M, N, K).
PRODUCTS = {
    "targets": (
        (1, 768, 768),
        (1, 3072, 768),
        (1, 4096, 4096),
        (1, 14336, 4096),
        (8, 768, 768),
        (16, 3072, 768),
        (32, 768, 3072),
        (128, 768, 768),
        (128, 3072, 768),
        (512, 4096, 1024),
        (1024, 4096, 4096),
    ),
    "odd": tuple((m, 1000, 320) for m in (1, 3, 7, 11, 17, 50))
    + tuple((m, 768, 768) for m in (3, 7, 11, 17, 50)),
    "encoder": ((4096, 1536, 384), (4096, 384, 384), (4096, 384, 1536)),
}
SETS = (*LAYERS, *PRODUCTS)


class ShapeError(ValueError):
    """A shape or a set that cannot be read; the message says what was given and what is allowed."""


def parse(text):
    """(M, N, K) of "MxNxK", or (N, K) of "NxK"."""
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ShapeError(
            f"shape {text!r}: expected MxNxK (rows, output and input features) or NxK, all at "
            f"least 1, as in 32x768x3072"
        )
    return tuple(int(part) for part in parts)


def format_shape(shape):
    return "x".join(str(size) for size in shape)


def select(texts=(), sets=(), rows=None):
    """The (M, N, K) of the given shapes and sets, each once, in order; "targets" without any.

    rows: the M of shapes that have none of their own (default ROWS); a ShapeError where no shape
    takes it.
    """
    for name in sets:
        if name not in SETS:
            raise ShapeError(f"set {name!r}: expected one of {', '.join(SETS)}")
    if not texts and not sets:
        sets = ("targets",)
    shapes = [parse(text) for text in texts]
    for name in sets:
        shapes.extend(LAYERS[name].values() if name in LAYERS else PRODUCTS[name])
    if rows is not None and all(len(shape) == 3 for shape in shapes):
        raise ShapeError("--m: every shape that was asked for has an M of its own")
    products = []
    for shape in shapes:
        products.extend([shape] if len(shape) == 3 else [(m, *shape) for m in rows or ROWS])
    return list(dict.fromkeys(products))
