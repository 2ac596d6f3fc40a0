"""What is interrupted leaves the model as it was, and no file half-written."""

import contextlib
import copy
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from compare import assert_same_state
from torch import nn

import dynquant
from dynquant.__main__ import main
from dynquant.whole_files import whole


@pytest.fixture(autouse=True)
def one_thread():
    """So that all of it runs in the caller's thread, but where a test says otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


class Tied(nn.Module):
    """Modules that are held twice, observed, hooked, in lists, and of the user's own type."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = self.first
        self.stub = dynquant.QuantStub()
        self.held = [self.first, {"own": nn.Linear(8, 8)}]
        self.lstm = nn.LSTM(8, 8)
        self.own = Own(8, 8)
        self.first.register_forward_hook(lambda module, args, output: None)
        self.eval()
        self.lstm.train()
        self.stub.train()

    def forward(self, x):
        return self.own(self.lstm(self.again(self.first(self.stub(x))))[0])


class Own(nn.Linear):
    pass


class OwnForm(dynquant.nn.Linear):
    """The user's own, which takes what it finds, and fails when it is told to."""

    failing = None

    @classmethod
    def from_float(cls, mod, qconfig=None):
        mod.bias, mod.seen = None, True
        if cls.failing is not None:
            raise cls.failing
        return super().from_float(mod, qconfig)


def tied_model():
    torch.manual_seed(0)
    return Tied()


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


def quantized_encoder():
    return dynquant.quantize_dynamic(encoder())


def prepared_model():
    return dynquant.prepare(tied_model(), inplace=True)


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
    )
    pytest.importorskip("dynquant.transformers")
    return transformers.BertModel(config).train()


def plain(value):
    """What does not change while the value does not."""
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return id(value)


def picture(model):
    """Which objects a model is made of, in which order, with which attributes."""
    parts = [
        (name, id(module), type(module), plain(vars(module)))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    config = getattr(model, "config", None)
    return parts, None if config is None else config.to_dict()


MAPPING = {"mapping": {Own: OwnForm}}
CALLS = {
    "quantize_dynamic": (tied_model, dynquant.quantize_dynamic, MAPPING),
    "keep_float_below": (
        tied_model,
        dynquant.quantize_dynamic,
        {"keep_float_below": 200, "example_inputs": X, **MAPPING},
    ),
    "raise_bits_below": (
        tied_model,
        dynquant.quantize_dynamic,
        {"raise_bits_below": 200, "example_inputs": X, **MAPPING},
    ),
    "transformers": (bert, dynquant.quantize_dynamic, {}),
    "fuse=True": (encoder, dynquant.quantize_dynamic, {"fuse": True}),
    "prepare": (tied_model, dynquant.prepare, {}),
    "convert": (prepared_model, dynquant.convert, MAPPING),
    "fuse": (quantized_encoder, dynquant.fuse, {}),
}
OURS = os.path.dirname(dynquant.__file__)


def lines_run(function, last=None):
    """The number of dynquant's lines that the function runs; interrupted at the line `last`."""
    count = 0

    def of_lines(frame, event, arg):
        nonlocal count
        if event == "line":
            count += 1
            if count == last:
                sys.settrace(None)
                raise KeyboardInterrupt
        return of_lines

    def of_calls(frame, event, arg):
        return of_lines if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(of_calls)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_in_place_at_any_line(name):
    """At lines all over the call and at most of the last ones, where the model is changed."""
    make, function, arguments = CALLS[name]

    def call(model):
        function(model, inplace=True, **arguments)

    call(make())  # what is done once a process
    done = make()
    count = lines_run(lambda: call(done))
    changed = [*map(type, done.modules())]
    late = np.geomspace(1, count, 60).astype(int)
    model = None
    for last in sorted({*range(1, count, count // 30), *(count + 1 - late).tolist()}):
        if model is None:
            model = make()
            before, state = picture(model), copy.deepcopy(model.state_dict())
        with contextlib.suppress(KeyboardInterrupt):
            lines_run(partial(call, model), last)
        if picture(model) == before:
            assert_same_state(model, state)
        else:  # the interrupt came after the last change
            assert count - last < 30 and [*map(type, model.modules())] == changed
            model = None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("name", ["quantize_dynamic", "keep_float_below", "convert"])
def test_a_conversion_that_fails(name, inplace, threads, monkeypatch):
    make, function, arguments = CALLS[name]
    model = make()
    before, state = picture(model), copy.deepcopy(model.state_dict())
    torch.set_num_threads(threads)
    for error in (KeyboardInterrupt(), MemoryError("no memory"), ValueError("of the user's")):
        monkeypatch.setattr(OwnForm, "failing", error)
        with pytest.raises(type(error)):
            function(model, inplace=inplace, **arguments)
        assert picture(model) == before
        assert_same_state(model, state)


@pytest.mark.parametrize("at", range(4))
def test_a_failure_at_each_conversion(at, monkeypatch):
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)]).train()
    before, state = picture(model), copy.deepcopy(model.state_dict())
    whole, made = dynquant.nn.Linear.from_float.__func__, []

    def failing(cls, mod, qconfig=None, tied_to=None):
        if len(made) == at:
            raise MemoryError
        made.append(mod)
        return whole(cls, mod, qconfig, tied_to)

    monkeypatch.setattr(dynquant.nn.Linear, "from_float", classmethod(failing))
    with pytest.raises(MemoryError):
        dynquant.quantize_dynamic(model, inplace=True)
    assert len(made) == at and picture(model) == before
    assert_same_state(model, state)


@pytest.fixture
def interrupts_arrive():
    """Also where a shell started the tests in the background, which ignores interrupts there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts_arrive")
def test_an_interrupt_ends_the_other_thread_soon(monkeypatch):
    """The caller waits while weights are quantized in a thread that sees no interrupt itself."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(9)])
    whole, made = dynquant.nn.Linear.from_float.__func__, []

    def interrupting(cls, mod, qconfig=None, tied_to=None):
        made.append(mod)
        if len(made) == 2:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.5)
        return whole(cls, mod, qconfig, tied_to)

    monkeypatch.setattr(dynquant.nn.Linear, "from_float", classmethod(interrupting))
    torch.set_num_threads(2)
    before = picture(model)
    with pytest.raises(KeyboardInterrupt):
        dynquant.quantize_dynamic(model, inplace=True)
    assert len(made) == 2 and picture(model) == before


def test_a_warning_that_is_an_error():
    model = quantized_encoder().train()
    model.layers[0].linear1 = nn.Linear(16, 32)  # a block that cannot be fused
    before = picture(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="left as it is"):
            dynquant.fuse(model, inplace=True)
    assert picture(model) == before


def test_a_product_of_a_layer_in_prepare():
    model = nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8))
    before = picture(model)
    spec = {nn.Linear: dynquant.QConfig(), "1.weight_ih_l0": dynquant.QConfig()}
    with pytest.raises(ValueError, match="prepare takes no config"):
        dynquant.prepare(model, spec, inplace=True)
    assert picture(model) == before


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
