"""Files and folders that are there whole or not at all."""

import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path):
    """A path to write to; it replaces `path` when the block has ended without an error.

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
