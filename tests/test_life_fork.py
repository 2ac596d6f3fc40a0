"""Models in children of fork(), as gunicorn --preload or a Pool makes them.

All scenes run in a process of their own. None but the last starts a pool of threads in the thread
that forks.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import forked
from torch import nn

import dynquant

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def blocks():
    """Weights and an input that are worth two threads."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)).eval()
    return model, torch.randn(256, 768)


def tables():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5000, 512)), torch.randint(0, 5000, (64, 64))


def agree(model, x, expected):
    """Bits are compared in the child, with numpy: torch's own operators are not at issue."""
    with torch.no_grad():
        return (model(x).numpy() == expected.numpy()).all()


def of_a_thread(model, x):
    """The model's output, without a pool in the thread that forks."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as executor, torch.no_grad():
        return executor.submit(lambda: model(x).detach()).result()


def made(**arguments):
    model, x = blocks()
    quantized = dynquant.quantize_dynamic(model, **arguments)
    expected = of_a_thread(quantized, x)
    assert forked(lambda: agree(quantized, x, expected))


def made_in_place():
    made(inplace=True)


def made_in_16_bits():
    made(dtype=torch.bfloat16)


def made_tables():
    model, x = tables()
    quantized = dynquant.quantize_dynamic(model, dtype=torch.quint8)
    expected = of_a_thread(quantized, x)
    assert forked(lambda: agree(quantized, x, expected))


def loaded():
    model, x = blocks()
    quantized = dynquant.quantize_dynamic(model)
    other = dynquant.quantize_dynamic(model)
    # Without assign, torch copies large tensors on its pool, those of float models as well.
    other.load_state_dict(quantized.state_dict(), assign=True)
    expected = of_a_thread(other, x)
    assert forked(lambda: agree(other, x, expected))


def made_in_the_child():
    model, x = blocks()
    expected = of_a_thread(dynquant.quantize_dynamic(model), x)
    assert forked(lambda: agree(dynquant.quantize_dynamic(model), x, expected))


def run_before():
    """The parent's pool is running: torch's own large operators hang, dynquant's layers run."""
    model, x = blocks()
    quantized = dynquant.quantize_dynamic(model[0])
    with torch.no_grad():
        expected = quantized(x)
    assert forked(lambda: agree(quantized, x, expected))


def forked_twice():
    model, x = blocks()
    quantized = dynquant.quantize_dynamic(model)
    expected = of_a_thread(quantized, x)

    def child():
        return forked(lambda: agree(quantized, x, expected)) and agree(quantized, x, expected)

    assert forked(child)


SCENES = [
    made,
    made_in_place,
    made_in_16_bits,
    made_tables,
    loaded,
    made_in_the_child,
    forked_twice,
    run_before,
]


def main():
    torch.set_num_threads(2)
    for scene in SCENES:
        print(scene.__name__, flush=True)
        scene()


def test_fork():
    done = subprocess.run(
        [sys.executable, "-c", "import test_life_fork; test_life_fork.main()"],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"in {done.stdout.splitlines()[-1]}: {done.stderr}"
