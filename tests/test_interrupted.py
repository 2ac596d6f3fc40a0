"""What is interrupted leaves the model as it was, and no file half-written."""

import copy
import os
import signal
import subprocess
import sys

import pytest
import torch
from compare import assert_same_state
from torch import nn

import dynquant
from dynquant.__main__ import main
from dynquant.whole_files import whole

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Interrupting(nn.Module):
    """The identity, interrupted at its call number `at`, counted over all its copies."""

    calls = 0

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        Interrupting.calls += 1
        if Interrupting.calls == self.at:
            raise KeyboardInterrupt
        return x


def net(at):
    Interrupting.calls = 0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), Interrupting(at), nn.Linear(16, 4))
    model[0].register_forward_hook(lambda module, args, output: None)
    return model


def hooks(model):
    return [
        (len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()
    ]


def assert_untouched(model, before):
    assert [*map(type, model.modules())] == [*map(type, before.modules())]
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert hooks(model) == hooks(before)
    assert_same_state(model, before)


@pytest.mark.parametrize("inplace", [False, True])
def test_keep_float_below(inplace):
    model = net(1)
    before, layers = copy.deepcopy(model), list(model)
    with pytest.raises(KeyboardInterrupt):
        dynquant.quantize_dynamic(model, inplace=inplace, keep_float_below=20, example_inputs=X)
    assert_untouched(model, before)
    assert all(one is other for one, other in zip(model, layers, strict=True))


@pytest.mark.parametrize("at", [1, 2, 3, 9])
def test_compare(at):
    model = net(at)
    quantized = dynquant.quantize_dynamic(model)
    before, quantized_before = copy.deepcopy(model), copy.deepcopy(quantized)
    with pytest.raises(KeyboardInterrupt):
        dynquant.compare(model, quantized, X)
    assert_untouched(model, before)
    assert_untouched(quantized, quantized_before)


class TestFiles:
    def test_a_file_that_was_there_stays(self, tmp_path):
        (tmp_path / "rows.json").write_text("as it was")
        with pytest.raises(KeyboardInterrupt), whole(tmp_path / "rows.json") as made:
            made.write_text("half")
            raise KeyboardInterrupt
        assert (tmp_path / "rows.json").read_text() == "as it was"
        assert os.listdir(tmp_path) == ["rows.json"]

    def test_a_file_is_replaced(self, tmp_path):
        (tmp_path / "rows.json").write_text("as it was")
        (tmp_path / "link").symlink_to("rows.json")
        with whole(tmp_path / "link") as made:
            made.write_text("new")
        assert (tmp_path / "rows.json").read_text() == "new"
        assert (tmp_path / "link").is_symlink() and len(os.listdir(tmp_path)) == 2

    def test_a_device(self):
        with whole("/dev/null") as made:
            made.write_text("nothing")

    @pytest.mark.parametrize("command", ["quantize", "report"])
    def test_the_command_line(self, command, tmp_path, monkeypatch):
        torch.save(nn.Sequential(nn.Linear(8, 4)), tmp_path / "m.pt")
        torch.save(X, tmp_path / "x.pt")
        arguments = {
            "quantize": ["quantize", "m.pt", "int8.pt"],
            "report": ["report", "m.pt", "--inputs", "x.pt", "--json", "rows.json"],
        }[command]

        def half_written(*args):
            path = next(arg for arg in args if isinstance(arg, os.PathLike))
            with open(path, "wb") as file:
                file.write(b"half")
            raise KeyboardInterrupt

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("torch.save", half_written)
        monkeypatch.setattr("pathlib.Path.write_text", lambda path, *_, **__: half_written(path))
        with pytest.raises(KeyboardInterrupt):
            main([*arguments, "--allow-pickle"])
        assert sorted(os.listdir(tmp_path)) == ["m.pt", "x.pt"]

    def test_a_request_to_end(self, tmp_path):
        torch.save(nn.Sequential(nn.Linear(8, 4)), tmp_path / "m.pt")
        code = """
import os, runpy, signal, torch

def half_written(model, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGTERM)

torch.save = half_written
runpy.run_module("dynquant", run_name="__main__")
"""
        run = [sys.executable, "-c", code, "quantize", "m.pt", "int8.pt", "--allow-pickle"]
        done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 128 + signal.SIGTERM, done.stderr
        assert os.listdir(tmp_path) == ["m.pt"]
