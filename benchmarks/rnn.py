"""Recurrent layers: dynquant beside fp32 and torch's x86 engine, each in a process of its own."""

import multiprocessing
import statistics
import time
import warnings
from typing import NamedTuple

PEERS = ("fp32", "x86", "dynquant")
CHUNK_SECONDS = 0.03
PAUSE_SECONDS = 0.02  # in which the threads of the last peer stop spinning


class Case(NamedTuple):
    """A layer of that type, with as many inputs as hidden units."""

    layer: str
    size: int
    layers: int
    batch: int
    steps: int

    def __str__(self):
        layers = f", {self.layers} layers" if self.layers > 1 else ""
        return (
            f"{self.layer} {self.size}-{self.size}{layers}, batch {self.batch}, {self.steps} steps"
        )


CASES = (
    Case("LSTM", 256, 1, 1, 100),
    Case("LSTM", 512, 2, 1, 100),
    Case("LSTM", 1024, 1, 1, 50),
    Case("LSTM", 512, 1, 16, 50),
    Case("GRU", 512, 1, 1, 100),
    Case("GRU", 512, 1, 16, 50),
)


def _converted(peer, layer):
    import torch

    if peer == "fp32":
        return layer
    if peer == "dynquant":
        import dynquant

        return dynquant.quantize_dynamic(layer)
    torch.backends.quantized.engine = peer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its own removal
        model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), {type(layer)})
    return model[0]


def _prepared(peer, case):
    """The peer's layer, its input, and how close it comes to the exact output, in dB."""
    import torch

    torch.manual_seed(0)
    layer = getattr(torch.nn, case.layer)(case.size, case.size, case.layers).eval()
    x = torch.randn(case.steps, case.batch, case.size)
    exact = layer.double()(x.double())[0]
    call = _converted(peer, layer.float())
    noise = (call(x)[0].double() - exact).square().mean()
    return call, x, float(10 * (exact.square().mean() / noise).log10())


def _seconds_per_call(call, x):
    call(x)
    begin = time.perf_counter()
    calls = 0
    while time.perf_counter() - begin < CHUNK_SECONDS:
        call(x)
        calls += 1
    return (time.perf_counter() - begin) / calls


def _serve(peer, threads, pipe):
    import torch

    torch.set_num_threads(threads)
    with torch.inference_mode():
        while (case := pipe.recv()) is not None:
            call, x, snr = _prepared(peer, Case(*case))
            pipe.send(snr)
            while pipe.recv():
                pipe.send(_seconds_per_call(call, x))


def run(threads=1, rounds=15, cases=CASES):
    """Yields, for each case, {peer: (seconds a call, SNR in dB)}; the peers take turns."""
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for peer in PEERS:
        pipes[peer], theirs = context.Pipe()
        context.Process(target=_serve, args=(peer, threads, theirs), daemon=True).start()
    for case in cases:
        snr, seconds = {}, {peer: [] for peer in PEERS}
        for peer, pipe in pipes.items():
            pipe.send(case)
            snr[peer] = pipe.recv()
        for _ in range(rounds):
            for peer, pipe in pipes.items():
                time.sleep(PAUSE_SECONDS)
                pipe.send(True)
                seconds[peer].append(pipe.recv())
        for pipe in pipes.values():
            pipe.send(False)
        yield case, {peer: (statistics.median(seconds[peer]), snr[peer]) for peer in PEERS}
    for pipe in pipes.values():
        pipe.send(None)


def report(results):
    """Prints milliseconds a call and SNR of each peer, and dynquant's time over x86's."""
    print(f"{'':40}" + "".join(f"{peer:>20}" for peer in PEERS) + f"{'dynquant / x86':>17}")
    for case, rows in results:
        cells = (f"{1e3 * seconds:.2f} ms {snr:5.1f} dB" for seconds, snr in rows.values())
        ratio = rows["dynquant"][0] / rows["x86"][0]
        print(f"{case!s:40}" + "".join(f"{cell:>20}" for cell in cells) + f"{ratio:17.2f}")
