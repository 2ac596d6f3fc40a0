"""Peers asked in turn, round by round: each in a process of its own that rests meanwhile."""

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import quality
from benchmarks.peers import check_name

ROOT = Path(__file__).resolve().parent.parent
SECONDS_TO_ANSWER = 600  # a compiler may be at work
# Waiting threads sleep instead of spinning.
SLEEPING = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0", "GOMP_SPINCOUNT": "0"}
# A compiler gets no processes of its own, and nothing reaches for the network.
ENVIRONMENT = {
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "OPENVINO_TELEMETRY_CONSENT": "0",
    "ORT_DISABLE_TELEMETRY": "1",
}
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class NoReference(RuntimeError):
    """The exact result of a case cannot be had."""


@dataclass
class Row:
    """What one peer did with one case.

    status: ok, wrong, unsupported, missing or failed; only the first has seconds.
    """

    case: str
    peer: str
    status: str = "ok"
    note: str = ""
    snr_db: float = None
    cosine: float = None
    seconds: list = field(default_factory=list)


class Worker:
    """A peer's process. One that ends or does not answer is started anew for the next case."""

    def __init__(self, name, threads, spin=False, python=sys.executable):
        self.name, self.python = check_name(name), python
        self.arguments = [name, str(threads), *(["spin"] if spin else [])]
        self.environment = {
            **os.environ,
            **ENVIRONMENT,
            **({} if spin else SLEEPING),
            **dict.fromkeys(THREAD_VARIABLES, str(threads)),
            "PYTHONPATH": _python_path(),
        }
        self.process = None
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        self.facts = None

    def start(self):
        """Starts the process; `greet` must follow."""
        try:
            self.process = subprocess.Popen(
                [self.python, "-m", "benchmarks.worker", *self.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.log,
                env=self.environment,
            )
        except OSError as error:
            self.facts = {"status": "failed", "note": f"{self.python}: {error.strerror}"}

    def greet(self):
        """Waits for the process's first answer, which is kept in `facts`; True where it is "ok"."""
        if self.process is not None:
            self.facts = self._receive()
        ready = self.facts["status"] == "ok"
        self._signal("SIGSTOP") if ready else self.stop()
        return ready

    def ask(self, do, **arguments):
        """The answer to a request; the process runs only meanwhile."""
        if self.process is None:
            self.start()
            if not self.greet():
                return self.facts
        self._signal("SIGCONT")
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return self._ended()
        answer = self._receive()
        self._signal("SIGSTOP")
        return answer

    def _receive(self):
        ready, _, _ = select.select([self.process.stdout], [], [], SECONDS_TO_ANSWER)
        if not ready:
            self.stop()
            return {"status": "failed", "note": f"no answer within {SECONDS_TO_ANSWER} s"}
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else self._ended()

    def _ended(self):
        code = self.process.wait()
        self.stop()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.log.seek(0)
        last = self.log.read().decode(errors="replace").strip().splitlines()[-1:]
        return {"status": "failed", "note": ": ".join([f"its process ended with {how}", *last])}

    def _signal(self, name):
        if self.process is not None and hasattr(signal, name):
            self.process.send_signal(getattr(signal, name))

    def stop(self):
        if self.process is not None:
            self._signal("SIGCONT")
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def _python_path():
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


@contextmanager
def workers(names, threads, spin=False, pythons=None):
    """Processes of all peers by name. pythons: {peer: another interpreter} for some."""
    started = {
        name: Worker(name, threads, spin, (pythons or {}).get(name, sys.executable))
        for name in names
    }
    with ExitStack() as stack:
        for worker in started.values():
            stack.callback(worker.stop)
            worker.start()
        for worker in started.values():
            worker.greet()
        yield started


def run(
    cases,
    racers,
    exact,
    rounds,
    limits,
    cache_bytes=None,
    progress=lambda steps: steps,
    fresh=False,
):
    """Rows of every case and peer.

    cases: {title: plain description}. racers: {name: Worker}. exact: the Worker of the reference.
    limits: (lowest SNR in dB, lowest cosine) of a right result. cache_bytes: None to time with warm
    caches, else what the rotated inputs must exceed. progress: wraps the list of steps, one for
    each case and round. fresh: each case has new processes, where what a case leaves behind in them
    would outgrow the memory.
    """
    rows = []
    steps = iter(progress([(title, turn) for title in cases for turn in range(rounds)]))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "exact.npy")
        for title, case in cases.items():
            reference = exact.ask("exact", case=case, path=path)
            if reference["status"] != "ok":
                raise NoReference(f"{title}: no reference to compare with: {reference['note']}")
            entries = {}
            for name, worker in racers.items():
                entries[name] = _prepare(title, case, worker, path, limits, cache_bytes)
            for _ in range(rounds):
                next(steps, None)
                for name, worker in racers.items():
                    _time(entries[name], worker)
            rows.extend(entries.values())
            if fresh:
                for worker in (exact, *racers.values()):
                    worker.stop()
    next(steps, None)
    return rows


def _prepare(title, case, worker, path, limits, cache_bytes):
    row = Row(title, worker.name)
    if worker.facts["status"] != "ok":
        row.status, row.note = worker.facts["status"], worker.facts["note"]
        return row
    answer = worker.ask("prepare", case=case, exact=path, cache_bytes=cache_bytes)
    row.status, row.note = answer["status"], answer["note"]
    if row.status == "ok":
        row.snr_db, row.cosine = answer["snr_db"], answer["cosine"]
        reason = quality.wrong(answer, *limits)
        if reason:
            row.status, row.note = "wrong", reason
    return row


def _time(row, worker):
    if row.status != "ok":
        return
    answer = worker.ask("time")
    if answer["status"] == "ok":
        row.seconds.append(answer["seconds"])
    else:
        row.status, row.note, row.seconds = answer["status"], answer["note"], []
