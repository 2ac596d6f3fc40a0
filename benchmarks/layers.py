"""One linear layer: dynquant against its peers, shape by shape."""

from benchmarks.peers import PEERS
from benchmarks.workers import Worker

SHAPES = ((1, 768, 768), (8, 768, 768), (32, 768, 3072), (128, 768, 768), (512, 4096, 1024))
LOWEST_SNR_DB = 20  # int8 gives 30 and more on Gaussian data; a wrong result gives none


def run(shapes=SHAPES, peers=tuple(PEERS), threads=1, rounds=15):
    """Yields, for each shape, {peer: (GOP/s or None, SNR in dB or why there is none)}."""
    workers = [Worker(name, threads) for name in peers]
    for m, n, k in shapes:
        snr = {worker.name: worker.prepare(m, n, k) for worker in workers}
        for _ in range(rounds):
            for worker in workers:
                worker.time()
        rows = {}
        for worker in workers:
            if worker.failed is not None:
                rows[worker.name] = (None, worker.failed)
            elif snr[worker.name] < LOWEST_SNR_DB:
                rows[worker.name] = (None, f"wrong result: {snr[worker.name]:.1f} dB")
            else:
                gops = 2 * m * n * k / worker.median() / 1e9
                rows[worker.name] = (gops, f"{snr[worker.name]:.1f} dB")
        yield (m, n, k), rows
    for worker in workers:
        worker.stop()


def report(results):
    for (m, n, k), rows in results:
        print(f"\n{m}x{n}x{k} (MxNxK)")
        best = max(
            (gops for name, (gops, _) in rows.items() if gops and name != "dynquant"), default=None
        )
        for name, (gops, note) in rows.items():
            speed = "" if gops is None else f"{gops:8.1f} GOP/s"
            ratio = f"{gops / best:.2f} of the best peer" if name == "dynquant" and best else ""
            print(f"  {name:10} {speed:15} {note:24} {ratio}")
