"""Peers for tests/test_benchmarks.py, which loads them by "module:class"."""

import os

from benchmarks.peers.base import Peer, Unsupported
from benchmarks.peers.eager import Float32


class Wrong(Float32):
    """Fast, and wrong."""

    def convert(self, module, inputs):
        return lambda x: super(Wrong, self).convert(module, inputs)(x).neg()


class NotFinite(Float32):
    def convert(self, module, inputs):
        return lambda x: module(x).fill_(float("nan"))


class Missing(Peer):
    packages = ("torch", "fast-int8")
    modules = ("fast_int8_that_does_not_exist",)

    def __init__(self, threads, spin=False):
        import fast_int8_that_does_not_exist  # noqa: F401


class Failing(Peer):
    def convert(self, module, inputs):
        raise ValueError("no such kernel\nand more about it")


class Once(Float32):
    """One case is all that its process takes."""

    taken = False

    def convert(self, module, inputs):
        if self.taken:
            raise Unsupported("a second case in one process")
        self.taken = True
        return super().convert(module, inputs)


class Dying(Float32):
    """Its process ends."""

    def convert(self, module, inputs):
        print("not an answer")
        os.abort()


class OnOneCore(Float32):
    def convert(self, module, inputs):
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else {0}
        if len(cores) != 1:
            raise Unsupported(f"on {len(cores)} cores")
        return super().convert(module, inputs)


class Refusing(Peer):
    def convert(self, module, inputs):
        raise Unsupported("not for this shape")
