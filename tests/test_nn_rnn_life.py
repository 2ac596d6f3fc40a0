"""LSTM, GRU, RNN and their cells with int8 and 16-bit weights: state, copies, moves, tracing."""

from typing import NamedTuple

import pytest
import torch
from children import result_of
from compare import assert_all_same, assert_same
from recurrent import (
    MODULES,
    another,
    assert_equal_modules,
    decibels,
    every_module,
    halved,
    quantized,
    tensors,
)
from round_trips import COPIES, FORMATS, traced_and_saved
from torch import nn

from dynquant import QConfig

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")


class Kind(NamedTuple):
    """The same weights in two forms.

    decibels: how close gradients are to those of the float module.
    needs_version: whether a state dict without a version is not a float module's.
    """

    form: object
    other_form: object
    decibels: float
    needs_version: bool


KINDS = {
    "int8": Kind(quantized, lambda mod: quantized(mod, QConfig("per_tensor")), 25, True),
    "16 bits": Kind(halved, lambda mod: halved(mod, torch.bfloat16), 55, False),
}


@pytest.fixture(params=MODULES)
def mod(request):
    return every_module()[request.param]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def form(kind, mod):
    return kind.form(mod)


class TestStateDict:
    @pytest.mark.parametrize("assign", [False, True])
    def test_loads(self, form, kind, mod, assign):
        other = kind.other_form(another(mod))
        result = other.load_state_dict(form.state_dict(), assign=assign)
        assert not result.missing_keys and not result.unexpected_keys
        assert_equal_modules(other, form)

    @pytest.mark.parametrize("saved", FORMATS.values(), ids=FORMATS)
    def test_formats(self, form, kind, mod, saved):
        other = kind.form(another(mod))
        other.load_state_dict(saved(form.state_dict()))
        assert_equal_modules(other, form)

    def test_strict_errors_name_the_keys(self, kind, form):
        model = nn.ModuleDict({"a": form})
        for key in model.state_dict():
            state = model.state_dict()
            del state[key]
            if key != "a.version" or kind.needs_version:
                with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
                    model.load_state_dict(state)
            wrong = {**model.state_dict(), key: torch.zeros(3, 3, dtype=torch.complex64)}
            with pytest.raises(RuntimeError, match=f"{key}: expected"):
                model.load_state_dict(wrong)
        for key in ("a.other", "a.packed_ih_l0"):
            with pytest.raises(RuntimeError, match=f'Unexpected key.*"{key}"'):
                model.load_state_dict({**model.state_dict(), key: torch.zeros(1)})


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies(form, copied):
    other = copied(form)
    assert_equal_modules(other, form)
    assert next(other.buffers()).data_ptr() != next(form.buffers()).data_ptr()


class TestMoves:
    def test_casts_leave_weights_and_scales(self, kind, mod):
        form = kind.other_form(mod)
        held = {key: (value.dtype, value.clone()) for key, value in form._buffers.items()}
        form.half()
        for key, (dtype, value) in held.items():
            assert form._buffers[key].dtype == dtype
            assert_same(form._buffers[key], value)
        assert {one.dtype for one in form.parameters()} == {torch.float16}
        assert all(one.dtype == torch.float16 for one in tensors(form(torch.randn(4, 5).half())))

    def test_meta_and_back(self, kind, mod, form):
        expected = kind.form(mod)
        form.to("meta")
        assert all(tensor.is_meta for tensor in form.state_dict().values() if tensor.dim())
        assert tensors(form(torch.randn(4, 5, device="meta")))[0].is_meta
        with pytest.warns(UserWarning, match="weight_ih.* is on the meta device.*assign=True"):
            form.load_state_dict(expected.state_dict())
        form.load_state_dict(expected.state_dict(), assign=True)
        assert_equal_modules(form, expected)
        form.to("meta").to_empty(device="cpu").load_state_dict(expected.state_dict())
        assert_equal_modules(form, expected)

    def test_shared_memory(self, kind, mod, form):
        assert all(tensor.is_shared() for tensor in form.share_memory().buffers())
        assert_equal_modules(form, kind.form(mod))


def run(form, x):
    return form(x)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_goes_to_another_process(kind):
    form, x = KINDS[kind].form(nn.GRU(5, 7)), torch.randn(4, 2, 5)
    assert_same(torch.from_numpy(result_of("spawn", run, form, x)), run(form, x))


def test_inference_mode_and_autocast(form):
    x = torch.randn(4, 5)
    expected = tensors(form(x))
    with torch.inference_mode():
        assert_all_same(tensors(form(x)), expected)
    with torch.autocast("cpu", torch.bfloat16):
        results = tensors(form(x))
    assert_all_same(results, tensors(form(x.bfloat16())))


def test_gradient_of_the_input(kind, mod, form):
    grads = []
    for one in (form, mod):
        x = torch.linspace(-1, 1, 20).view(4, 5).requires_grad_()
        sum(result.square().sum() for result in tensors(one(x))).backward()
        grads.append(x.grad)
    assert decibels(*grads) > kind.decibels
    assert all(parameter.grad is None for parameter in form.parameters())


class TestTracing:
    def test_compile(self, form):
        x = torch.randn(4, 5)
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph

        compiled = torch.compile(form, fullgraph=True, backend=backend)
        assert_all_same(tensors(compiled(x)), tensors(form(x)))
        calls = [str(node.target) for node in graphs[0].graph.nodes]
        ops = [one for one in calls if one.startswith("dynquant.")]
        assert len(ops) == len(form._suffixes) and all(one.endswith(".inference") for one in ops)

    def test_compile_with_dynamic_lengths(self, mod, form):
        torch._dynamo.reset()  # it counts how often the forward of all these modules is compiled
        compiled = torch.compile(form, fullgraph=True, dynamic=True, backend="aot_eager")
        lead = (2,) if isinstance(mod, nn.RNNBase) else ()
        for rows in (4, 6, 3):
            x = torch.randn(rows, *lead, 5)
            assert_all_same(tensors(compiled(x)), tensors(form(x)))

    def test_export(self, form):
        x = torch.randn(4, 5)
        program = torch.export.export(form, (x,))
        assert_all_same(tensors(program.module()(x)), tensors(form(x)))

    def test_trace(self, form):
        x = torch.randn(4, 5)
        assert_all_same(tensors(traced_and_saved(form, x)(x)), tensors(form(x)))
