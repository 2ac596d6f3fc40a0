"""nn.Sequential: linear layers as one op with the activation and the norm beside them."""

import copy
import pickle
import warnings

import pytest
import torch
from compare import assert_same, assert_same_state
from fused import ELSEWHERE, decibels, fused, randomized
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynquant


class Called(TorchDispatchMode):
    """The names of dynquant's ops that are called within."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "dynquant":
            self.names.append(op.name().partition("::")[2].partition(".")[0])
        return op(*args, **(kwargs or {}))


def floats(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


X = floats(3, 24)


OPS = ["linear_block", "linear_block", "feed_forward"]  # of tower


def tower():
    return nn.Sequential(
        *(nn.Linear(24, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 70), nn.GELU()),
        *(nn.LayerNorm(70), nn.Linear(70, 16), nn.Identity(), nn.Sigmoid(), nn.Linear(16, 2)),
    )


@torch.no_grad()
def run(model, x=X):
    return model(x)


@torch.no_grad()
def ops_of(model, x=X):
    with Called() as called:
        model(x)
    return called.names


@pytest.fixture
def made():
    return fused(tower())


class TestRuns:
    def test_each_is_one_op(self, made):
        quantized, model = made
        assert dynquant.fused_blocks(model) == {"": ""}
        assert ops_of(model) == OPS
        assert decibels(run(model), run(quantized)) > 35

    def test_a_hook_changes_no_bit(self, made):
        _, model = made
        expected, seen = run(model), []
        handle = model[0].register_forward_hook(lambda *given: seen.append(given[0]))
        assert dynquant.fused_blocks(model) == {"": "0 has hooks"}
        assert_same(run(model), expected)
        assert seen == [model[0]]
        assert ops_of(model) == ["linear_dynamic", "activation", *OPS[1:]]
        for module in model:
            module.register_forward_hook(lambda *given: None)
        assert not set(ops_of(model)) & set(OPS)
        assert_same(run(model), expected)
        handle.remove()

    @pytest.mark.parametrize(
        "function",
        [nn.ReLU(True), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Tanh(), nn.Sigmoid()],
        ids=repr,
    )
    def test_activations(self, function):
        quantized, model = fused(nn.Sequential(nn.Linear(24, 40), function))
        assert ops_of(model) == ["linear_block"]
        assert decibels(run(model), run(quantized)) > 60

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_norms(self, norm):
        for layers in (
            (norm(24), nn.Linear(24, 40)),
            (nn.Linear(24, 40), norm(40)),
            (norm(24), nn.Linear(24, 40), nn.SiLU(), norm(40)),
        ):
            quantized, model = fused(nn.Sequential(*layers))
            assert ops_of(model) == ["linear_block"]
            assert decibels(run(model), run(quantized)) > 35

    def test_two_linear_layers(self):
        def layers(*after):
            return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 24), *after)

        for module, ops in (
            (layers(), ["feed_forward"]),
            (layers(nn.Dropout(), nn.LayerNorm(24)), ["feed_forward"]),
            (layers(nn.LayerNorm(24), nn.ReLU()), ["feed_forward"]),
            (layers(nn.Identity(), nn.Tanh()), ["linear_block", "linear_block"]),
            (layers(*layers()), ["feed_forward", "feed_forward"]),
        ):
            quantized, model = fused(module)
            assert ops_of(model) == ops
            found = run(model)
            assert decibels(found, run(quantized)) > 35
            for child in model:
                child.register_forward_hook(lambda *given: None)
            assert_same(run(model), found)
        spec = {"0": dynquant.QConfig(), "2": dynquant.QConfig(activation_bits=16)}
        model = dynquant.fuse(dynquant.quantize_dynamic(layers(), spec))
        assert ops_of(model) == ["linear_block", "linear_dynamic"]

    def test_what_is_not_known_is_called(self):
        class Doubled(nn.Module):
            def forward(self, x):
                return 2 * x

        layers = (nn.Linear(24, 40), Doubled(), nn.Linear(40, 40), nn.Tanh(), nn.Mish())
        quantized, model = fused(nn.Sequential(*layers, nn.Flatten(0), nn.ReLU()))
        assert ops_of(model) == ["linear_dynamic", "linear_block"]
        assert decibels(run(model), run(quantized)) > 35

    def test_inner_ones(self):
        inner = nn.Sequential(nn.Linear(24, 24), nn.ReLU())
        _, model = fused(nn.Sequential(inner, nn.Linear(24, 4)))
        assert dynquant.fused_blocks(model) == {"0": ""}
        assert ops_of(model) == ["linear_block", "linear_dynamic"]

    @pytest.mark.parametrize("layers", [(nn.Linear(4, 4),), (nn.Linear(4, 4), nn.Mish())])
    def test_without_anything_to_run_as_one(self, layers):
        quantized = dynquant.quantize_dynamic(nn.Sequential(*layers))
        with pytest.warns(UserWarning, match="no block of the model is known"):
            model = dynquant.fuse(quantized)
        assert type(model) is nn.Sequential

    def test_other_kinds_of_linear_layers(self):
        spec = {"0": dynquant.QConfig(activation_bits=16), "3": dynquant.QConfig(symmetric=True)}
        spec |= {"6": dynquant.QConfig(dtype=torch.float16)}
        quantized = dynquant.quantize_dynamic(randomized(tower()), spec)
        model = dynquant.fuse(quantized)
        assert ops_of(model) == ["linear_block"] * 2 + ["linear_half"]
        assert decibels(run(model), run(quantized)) > 35

    def test_a_subclass_that_keeps_its_forward(self):
        class Tower(nn.Sequential):
            pass

        class Other(nn.Sequential):
            def forward(self, x):
                return -super().forward(x)

        layers = nn.Linear(24, 24), nn.ReLU()
        _, model = fused(nn.Sequential(Tower(*layers), Other(*copy.deepcopy(layers))))
        assert dynquant.fused_blocks(model) == {"0": ""}
        assert isinstance(model[0], Tower) and type(model[1]) is Other

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_an_rms_norm_without_an_epsilon(self, dtype):
        """Torch takes that of fp32 then, for whatever dtype: in time, a cast changes nothing."""
        x = (1e-4 * X).to(dtype)
        given = randomized(nn.Sequential(nn.Linear(24, 40, bias=False), nn.RMSNorm(40)))
        cast = fused(copy.deepcopy(given).to(dtype))
        late = fused(given)
        run(late[1])
        for quantized, model in (cast, [one.to(dtype) for one in late]):
            assert ops_of(model, x) == ["linear_block"]
            assert decibels(run(model, x), run(quantized, x)) > 40

    @pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
    def test_a_norm_with_another_dtype_is_left_alone(self, norm):
        quantized = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(24, 40), norm(40).double()))
        with pytest.warns(UserWarning, match="no block of the model is known"):
            assert type(dynquant.fuse(quantized)) is nn.Sequential

    def test_a_norm_of_another_width_is_left_alone(self):
        quantized = dynquant.quantize_dynamic(nn.Sequential(nn.Linear(24, 40), nn.LayerNorm(8)))
        with pytest.warns(UserWarning, match="the model: could not be compared"):
            assert type(dynquant.fuse(quantized)) is nn.Sequential


class TestUnfusedForACall:
    def test_gradients(self, made):
        for learns in (X.clone().requires_grad_(), X):
            outputs = [copy.deepcopy(one)(learns) for one in made]
            assert outputs[0].requires_grad == outputs[1].requires_grad
            if learns.requires_grad:
                assert_same(*outputs)
                outputs[1].sum().backward()
                assert learns.grad.abs().sum() > 0

    def test_training(self, made):
        outputs = []
        for one in map(copy.deepcopy, made):
            one.train()
            torch.manual_seed(0)
            outputs.append(one(X))
        assert_same(*outputs)

    def test_autocast(self, made):
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(*map(run, made))

    def test_global_hook(self, made):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(type(module).__name__)
        )
        try:
            made[1](X)
        finally:
            handle.remove()
        assert seen.count("Linear") == 4

    def test_changed_modules(self, made):
        _, model = made
        with torch.no_grad():
            before = model(X)
            model.append(nn.Tanh())
            assert_same(model(X), torch.tanh(before))  # torch's own, as long as it is not fused
            assert ops_of(model) == OPS
            assert ops_of(dynquant.fuse(model)) == ["linear_block"] * 4
            model[1] = nn.Identity().eval()
            assert ops_of(model)[:2] == ["linear_dynamic", "linear_block"]
            model[0] = nn.Linear(24, 40)
            assert ops_of(model)[0] == "linear_block"
            del model[:]
            assert "no linear layer" in dynquant.fused_blocks(model)[""]
            assert_same(model(X), X)

    def test_slices(self, made):
        _, model = made
        assert_same(run(model[5:], run(model[:5])), run(model))


@pytest.mark.parametrize("change", ELSEWHERE, ids=lambda change: change.__name__)
def test_a_norm_whose_parameters_are_elsewhere(made, change):
    quantized, model = made
    before = run(model)
    for one in (model, quantized):
        one[5].bias.data.fill_(0.5)
        change(one[5])
    found = run(model)
    assert decibels(found, before) < 40 and decibels(found, run(quantized)) > 60


class TestState:
    def test_copies_and_state_dict(self, made):
        quantized, model = made
        expected = run(model)
        assert_same_state(quantized, model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model) and "_parts" not in vars(copy.deepcopy(other))
            assert dynquant.fused_blocks(other) == {"": ""}
            assert_same(run(other), expected)

    def test_fusing_twice_changes_nothing(self, made):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = dynquant.fuse(made[1])
        assert dynquant.fused_blocks(again) == {"": ""}
        assert_same(run(again), run(made[1]))

    def test_dequantize(self, made):
        floats = dynquant.dequantize(made[1])
        assert type(floats) is nn.Sequential and type(floats[1]) is nn.ReLU

    def test_16_bits(self, made):
        model = copy.deepcopy(made[1]).bfloat16()
        x = X.bfloat16()
        assert ops_of(model, x) == OPS
        y = run(model, x)
        for module in model:
            module.register_forward_hook(lambda *given: None)
        assert_same(run(model, x), y)


class TestCompilers:
    def test_compile_without_a_break(self, made):
        _, model = made
        expected, graphs = run(model), []

        def backend(graph, inputs):
            graphs.append(graph.graph)
            return graph

        torch._dynamo.reset()
        with torch.no_grad():
            compiled = torch.compile(model, fullgraph=True, backend=backend)
            assert_same(compiled(X), expected)
        names = [str(node.target) for node in graphs[0].nodes]
        assert [name.split(".")[1] for name in names if "dynquant" in name] == OPS

    def test_export_and_trace(self, made):
        _, model = made
        with torch.no_grad():
            program = torch.export.export(model, (X,))
            assert_same(program.module()(X), model(X))
            assert_same(torch.jit.trace(model, (X,))(X), model(X))
        names = [str(node.target) for node in program.graph.nodes]
        assert [name.split(".")[1] for name in names if "dynquant" in name] == OPS

    def test_symbolic_trace_sees_the_modules(self, made):
        _, model = made
        traced = torch.fx.symbolic_trace(model)
        assert_same(run(traced), run(model))
