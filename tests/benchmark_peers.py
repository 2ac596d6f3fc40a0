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
    """Timed on one core, and converted with all that there are."""

    def convert(self, module, inputs):
        self.call, self.cores = super().convert(module, inputs), _cores()
        self.calls = 0
        return self.called

    def called(self, x):
        self.calls += 1  # the first is the one of the comparison
        if self.calls > 1 and _cores() > 1:
            raise RuntimeError("timed on several cores")
        if self.cores != len(os.sched_getaffinity(os.getppid())):
            raise RuntimeError(f"converted on {self.cores} cores")
        return self.call(x)


def _cores():
    return len(os.sched_getaffinity(0))


class Refusing(Peer):
    def convert(self, module, inputs):
        raise Unsupported("not for this shape")
