"""`python -m benchmarks.worker PEER THREADS [spin]`: one peer, asked and answering in lines.

One JSON object a line on stdin and on stdout, so that a peer can live in another environment: any
Python with torch, numpy and the peer will do. Requests: {"do": "prepare", "case": ...,
"cache_bytes": null or those that inputs must exceed, "exact": path of the .npy to compare with},
{"do": "exact", "case": ..., "path": where to write it}, {"do": "time"}. Answers: {"status": "ok" |
"missing" | "unsupported" | "failed", ...}. The first answer comes unasked.
"""

import ctypes
import json
import os
import signal
import sys
from contextlib import contextmanager, nullcontext, suppress

PR_SET_PDEATHSIG = 1


def _message(error):
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _missing(error, modules):
    """Whether the error is that one of those modules is not installed."""
    return isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in modules


class Server:
    def __init__(self, name, threads, spin):
        self.name, self.threads, self.spin = name, threads, spin
        self.peer = self.call = self.rotation = None

    def start(self):
        from benchmarks.peers import load

        kind = load(self.name)
        try:
            self.peer = kind(self.threads, self.spin)
        except ImportError as error:
            if not _missing(error, kind.modules):
                raise
            packages = " ".join(name for name in kind.packages if name != "torch")
            return {"status": "missing", "note": f"pip install {packages}"}
        return {"status": "ok", **self.peer.facts()}

    def exact(self, case, path):
        import numpy as np

        np.save(path, self._convert(case))
        return {"status": "ok"}

    def prepare(self, case, exact, cache_bytes):
        from benchmarks import quality

        y = self._convert(case, cache_bytes)
        return {"status": "ok", "note": self.peer.note, **quality.measure(y, exact)}

    def _convert(self, case, cache_bytes=None):
        """Makes self.call and self.rotation of a case; returns its result."""
        from benchmarks import cases, timing

        self.call = self.rotation = None  # the last case's memory is free before this one's is made
        self.peer.note = ""
        module, inputs = cases.build(case)
        self.call = self.peer.convert(module, inputs)
        first = self.peer.prepare(inputs)
        self.rotation = [first]
        result = self.peer.array(self.call(*first))
        self.output_bytes = result.nbytes
        rows = cases.seen(module, inputs)
        if cache_bytes is not None:
            copies = timing.copies_beyond(cache_bytes, sum(x.nbytes for x in inputs))
            self.rotation += [
                self.peer.prepare(tuple(x.clone() for x in inputs)) for _ in range(copies - 1)
            ]
        return result if rows is None else result[rows]

    def time(self):
        with _on_one_core() if self.threads == 1 else nullcontext():
            return {"status": "ok", "seconds": self._seconds()}

    def _seconds(self):
        from benchmarks import timing

        if len(self.rotation) == 1:
            return timing.warm(self.call, self.rotation[0])
        return timing.cold(self.call, self.rotation, self.output_bytes)

    def answer(self, do, **arguments):
        import torch

        from benchmarks.peers.base import Unsupported

        try:
            with torch.inference_mode():
                return getattr(self, do)(**arguments)
        except Unsupported as reason:
            return {"status": "unsupported", "note": str(reason)}
        except Exception as error:
            return {"status": "failed", "note": _message(error)}


def _end_with_parent():
    """A stopped process would not see that nobody asks any more."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _on_one_core():
    """The same for every peer: neighbours slow a machine's cores apart, up to three times.

    While it is timed only: ONNX Runtime does without AMX when it starts on a single core.
    """
    if sys.platform != "linux":
        yield
        return
    cores = os.sched_getaffinity(0)
    _stay_on({min(cores)})
    try:
        yield
    finally:
        _stay_on(cores)


def _stay_on(cores):
    """All threads of this process."""
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), cores)


def main():
    _end_with_parent()
    name, threads = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the libraries print must not come between the answers
    server = Server(name, threads, spin="spin" in sys.argv[3:])
    try:
        first = server.answer("start")
    except Exception as error:  # no torch
        first = {"status": "failed", "note": _message(error)}
    print(json.dumps(first), file=answers)
    for line in sys.stdin:
        print(json.dumps(server.answer(**json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
