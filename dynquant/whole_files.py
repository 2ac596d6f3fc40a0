"""Files and folders that are there whole or not at all."""

import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path):
    """A path to write to; what is there takes the place of `path` when the block has ended well.

    A device or a pipe is written to at once.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:
        made = Path(unfinished) / path.name
        yield made
        made.replace(path)
