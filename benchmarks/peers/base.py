"""What a peer must offer."""

from importlib import metadata

import torch


class Unsupported(Exception):
    """The peer does not do this: no error of it, and none of ours."""


class Peer:
    """One way to compute a module, in a process of its own.

    packages: what pip installs for it; their versions are noted.
    modules: the imports whose absence means that it is not installed.
    """

    packages = ("torch",)
    modules = ()

    def __init__(self, threads, spin=False):
        """threads: how many a call may use. spin: whether waiting ones may spin."""
        torch.set_num_threads(threads)
        self.threads, self.spin = threads, spin
        self.note = ""  # of the last conversion: what a reader of its figures should know

    def convert(self, module, inputs):
        """A callable of what `prepare` returns; its result is not overwritten by the next call.

        module: in eval mode and the caller's: a peer that changes it copies it first.
        inputs: a tuple of tensors. The callable is only used with their shapes and dtypes.
        """
        raise NotImplementedError

    def prepare(self, inputs):
        """A tuple of inputs in the form that the callable takes; not timed."""
        return inputs

    def array(self, output):
        """The callable's result as a float32 or float64 numpy array."""
        return output.float().numpy()

    def facts(self):
        """Plain data for the results."""
        return {"versions": {name: _version(name) for name in self.packages}}


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
