"""What peers make of a model before they can run it, kept for later runs.

In the folder that the environment variable DYNQUANT_BENCHMARKS_CACHE names, otherwise in
~/.cache/dynquant-benchmarks; it may be deleted at any time.
"""

import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path


def folder(model, form, packages, make):
    """The folder with a form of a model, made by make(folder) where it is not there yet.

    Args:
        model, form: names, of which the folder's is made.
        packages: whose versions count, as other versions make it otherwise.
    """
    versions = [f"{name}-{metadata.version(name)}" for name in packages]
    path = _root() / "_".join([model, form, *versions])
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(dir=path.parent)
        try:
            make(Path(made))
            os.rename(made, path)  # whole or not at all; another process may have been first
        except BaseException:
            shutil.rmtree(made)
            if not path.exists():
                raise
    return path


def _root():
    default = Path.home() / ".cache" / "dynquant-benchmarks"
    return Path(os.environ.get("DYNQUANT_BENCHMARKS_CACHE", default))
