"""One process for each peer, asked in turn: nothing of one peer runs while another is timed."""

import multiprocessing
import os
import statistics
import time

CHUNK_SECONDS = 0.02


def _snr_db(y, exact):
    noise = (y.double() - exact).square().mean()
    return float(10 * (exact.square().mean() / noise).log10()) if noise > 0 else float("inf")


def _serve(name, threads, pipe):
    import torch

    from benchmarks.peers import PEERS

    torch.set_num_threads(threads)
    call = x = None
    with torch.inference_mode():
        while True:
            command, *arguments = pipe.recv()
            try:
                if command == "prepare":
                    m, n, k = arguments
                    generator = torch.Generator().manual_seed(0)
                    linear = torch.nn.Linear(k, n).eval()
                    for parameter in linear.parameters():
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) / k**0.5)
                    x = torch.randn(m, k, generator=generator)
                    exact = torch.nn.functional.linear(
                        x.double(), linear.weight.double(), linear.bias.double()
                    )
                    call = PEERS[name](linear)
                    pipe.send(("ok", _snr_db(call(x), exact)))
                elif command == "time":
                    pipe.send(("ok", _seconds_per_call(call, x)))
                else:
                    return
            except Exception as error:
                pipe.send(("error", f"{type(error).__name__}: {error}".splitlines()[0]))


def _seconds_per_call(call, x):
    """The mean over a chunk long enough for the clock, after two calls that warm the caches."""
    call(x)
    begin = time.perf_counter()
    call(x)
    calls = max(1, int(CHUNK_SECONDS / (time.perf_counter() - begin)))
    begin = time.perf_counter()
    for _ in range(calls):
        call(x)
    return (time.perf_counter() - begin) / calls


class Worker:
    """A peer's process. An error of the peer is kept in `failed`, and ends its part in the race."""

    def __init__(self, name, threads):
        # Idle threads sleep: spinning ones would slow the peer that is timed.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(name, threads, theirs), daemon=True)
        self.process.start()
        self.failed = None
        self.seconds = []

    def ask(self, *command):
        self.pipe.send(command)
        status, value = self.pipe.recv()
        if status == "error":
            self.failed = value
            return None
        return value

    def prepare(self, m, n, k):
        self.failed, self.seconds = None, []
        return self.ask("prepare", m, n, k)

    def time(self):
        if self.failed is None:
            self.seconds.append(self.ask("time"))

    def median(self):
        return statistics.median(self.seconds)

    def stop(self):
        self.pipe.send(("stop",))
        self.process.join(timeout=10)
