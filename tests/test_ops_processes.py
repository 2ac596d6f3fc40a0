"""The ops after fork, in spawned workers, and in the workers of a DataLoader."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from children import TIMEOUT, result_of
from compare import assert_same
from torch.utils.data import DataLoader, Dataset


def result(m=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, 260, generator=generator)
    weight = torch.randint(-127, 128, (520, 260), generator=generator, dtype=torch.int8)
    packed = torch.ops.dynquant.pack_weight(weight)
    return torch.ops.dynquant.linear_dynamic(x, packed, torch.ones(520))


def with_threads(count):
    import dynquant  # noqa: F401  (a spawned child starts without it)

    torch.set_num_threads(count)
    return result()


@pytest.mark.parametrize("method, count", [("fork", 1), ("spawn", 1), ("spawn", 2)])
def test_a_child(method, count):
    expected = result()
    assert_same(torch.from_numpy(result_of(method, with_threads, count)), expected)


class Results(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return result(index + 1)


def test_workers_of_a_data_loader():
    loader = DataLoader(Results(), batch_size=None, num_workers=2, timeout=TIMEOUT)
    for index, y in enumerate(loader):
        assert_same(y, result(index + 1))


@pytest.mark.parametrize("count", ["1", "2"])
def test_a_process_whose_first_call_is_in_a_thread(count):
    code = (
        "import threading, dynquant, test_ops_processes as t\n"
        "thread = threading.Thread(target=t.result)\n"
        "thread.start(); thread.join(); print(t.result().double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": count},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(result().double().sum().item(), rel=1e-12)
