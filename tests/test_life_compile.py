"""torch.compile by its default backend, torch.export, torch.jit: the ops in the graph, the bits."""

import warnings

import pytest
import torch
from compare import assert_same
from round_trips import jit_saved
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._pytree import tree_leaves

import dynquant


class Block(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.first = nn.Linear(16, 32, bias=bias)
        self.second = nn.Linear(32, 16, bias=bias)

    def forward(self, x):
        return x + self.second(nn.functional.gelu(self.first(self.norm(x))) * 0.5)


@pytest.fixture
def block():
    torch.manual_seed(0)
    return dynquant.quantize_dynamic(Block())


def dynquant_ops(graph):
    return [str(node.target) for node in graph.nodes if "dynquant" in str(node.target)]


ONE_FOR_EACH = ["dynquant.linear_dynamic.inference"] * 2


class TestCompile:
    @pytest.mark.parametrize("bias", [False, True])
    def test_graph_holds_one_op_for_each_linear(self, bias):
        model, graphs = dynquant.quantize_dynamic(Block(bias)), []

        def backend(graph, inputs):
            graphs.append(graph.graph)
            return graph

        with torch.no_grad():
            torch.compile(model, fullgraph=True, backend=backend)(torch.randn(3, 16))
        assert len(graphs) == 1 and dynquant_ops(graphs[0]) == ONE_FOR_EACH

    def test_default_backend_with_dynamic_rows(self, block):
        """One graph for all sizes; the compiler fuses what is around the ops."""
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, dynamic=True)
        x = torch.randn(4, 16)
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
            _, (code, *rest) = run_and_get_code(compiled, x)
            for rows in (4, 7, 33):
                x = torch.randn(rows, 16)
                torch.testing.assert_close(compiled(x), block(x), rtol=0, atol=2e-2)
        assert not rest
        assert code.count("torch.ops.dynquant.linear_dynamic.inference(") == 2
        assert "gelu" in code and "extern_kernels." not in code

    def test_gradient_of_the_input(self, block):
        torch._dynamo.reset()
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        grads = []
        for function in (block, compiled):
            x = torch.linspace(-1, 1, 64).view(4, 16).requires_grad_()
            function(x).square().sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(*grads)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bit_models_and_autocast(self, block, dtype):
        torch._dynamo.reset()
        x = torch.randn(3, 16)
        layer = block.first
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            with torch.autocast("cpu", dtype=dtype):
                assert_same(compiled(x), layer(x))
            assert_same(compiled(x.to(dtype)), layer(x.to(dtype)))

    def test_a_stub_for_two_layers(self):
        torch._dynamo.reset()

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.stub = dynquant.QuantStub()
                self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

            def forward(self, x):
                x = self.stub(x)
                return self.a(x) + self.b(x)

        model = dynquant.quantize_dynamic(Shared())
        x = torch.randn(3, 8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=2e-2)

    def test_weights_loaded_later_are_seen(self, block):
        torch._dynamo.reset()
        compiled = torch.compile(block.first, fullgraph=True, backend="aot_eager")
        x = torch.randn(3, 16)
        with torch.no_grad():
            compiled(x)
            block.first.load_state_dict(dynquant.quantize_dynamic(Block()).first.state_dict())
            assert_same(compiled(x), block.first(x))


class TestExport:
    @pytest.mark.parametrize("strict", [False, True])
    def test_dynamic_rows_saved_and_loaded(self, block, strict, tmp_path):
        rows = torch.export.Dim("rows", min=1, max=4096)
        with torch.no_grad():
            program = torch.export.export(
                block, (torch.randn(4, 16),), dynamic_shapes=({0: rows},), strict=strict
            )
        assert dynquant_ops(program.graph) == [f"{op}" for op in ONE_FOR_EACH]
        torch.export.save(program, tmp_path / "block.pt2")
        loaded = torch.export.load(tmp_path / "block.pt2").module()
        for count in (1, 4, 9):
            x = torch.randn(count, 16)
            with torch.no_grad():
                assert_same(loaded(x), block(x))

    def test_decomposed_for_inference(self, block):
        program = torch.export.export(block, (torch.randn(4, 16),)).run_decompositions()
        assert len(dynquant_ops(program.graph)) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*deprecated")
class TestJit:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("freeze", [False, True])
    def test_script(self, bias, freeze):
        model = dynquant.quantize_dynamic(Block(bias))
        kinds = [type(module) for module in model.modules()]
        scripted = torch.jit.script(model)
        scripted = torch.jit.freeze(scripted) if freeze else scripted
        loaded = jit_saved(scripted)
        x = torch.randn(3, 16)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))
        assert [type(module) for module in model.modules()] == kinds

    def test_script_of_attention_and_transformer(self):
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        model = dynquant.quantize_dynamic(model)
        x = torch.randn(2, 3, 16)
        with torch.no_grad():
            loaded = jit_saved(torch.jit.script(model))
            torch.testing.assert_close(loaded(x, x), model(x, x))
            attention = model.encoder.layers[0].self_attn
            loaded = jit_saved(torch.jit.script(attention))
            mask = torch.ones(3, 3).triu(1).bool()
            for one, other in zip(
                loaded(x, x, x, attn_mask=mask), attention(x, x, x, attn_mask=mask), strict=True
            ):
                torch.testing.assert_close(one, other)

    def assert_scripts(self, module, *arguments, **named):
        with torch.no_grad():
            scripted = torch.jit.script(module)
            for one in (scripted, torch.jit.freeze(scripted)):
                loaded = jit_saved(one)
                results = tree_leaves(loaded(*arguments, **named))
                expected = tree_leaves(module(*arguments, **named))
                for result, exact in zip(results, expected, strict=True):
                    assert_same(result, exact)

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    def test_script_with_weights_in_16_bits(self, bias, half):
        model = dynquant.quantize_dynamic(Block(bias), dtype=half)
        kinds = [type(module) for module in model.modules()]
        loaded, x = jit_saved(torch.jit.script(model)), torch.randn(3, 16)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), model(x))
        assert [type(module) for module in model.modules()] == kinds
        self.assert_scripts(model.first, torch.randn(2, 3, 16))
        attention = dynquant.quantize_dynamic(nn.MultiheadAttention(16, 2, bias=bias), dtype=half)
        self.assert_scripts(attention, x, x, x)
        layer = nn.TransformerEncoderLayer(16, 2, 32)  # torch cannot script one without bias
        layer = dynquant.quantize_dynamic(layer, dtype=half)
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))

    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("batch", [(), (4,)], ids=str)
    @pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
    def test_script_of_cells(self, cell, batch, bias, dtype):
        form = dynquant.quantize_dynamic(cell(6, 5, bias=bias), dtype=dtype)
        x, state = torch.randn(*batch, 6), torch.randn(*batch, 5)
        self.assert_scripts(form, x)
        self.assert_scripts(form, x, (state, 2 * state) if cell is nn.LSTMCell else state)
        scripted = torch.jit.script(form)
        with pytest.raises(torch.jit.Error, match="input has inconsistent input_size: got 7"):
            scripted(torch.randn(3, 7))

    def test_script_of_a_relu_cell(self):
        mod = nn.RNNCell(6, 5, nonlinearity="relu")
        for dtype in (torch.qint8, torch.float16):
            self.assert_scripts(dynquant.quantize_dynamic(mod, dtype=dtype), torch.randn(4, 6))

    @pytest.mark.parametrize("dtype", [torch.quint8, torch.quint4x2], ids=str)
    def test_script_of_embeddings(self, dtype):
        table = dynquant.quantize_dynamic(nn.Embedding(11, 5, padding_idx=2), dtype=dtype)
        ids = torch.tensor([3, 2, 0, 10, 2, 2])
        self.assert_scripts(table, ids.view(2, 3))
        self.assert_scripts(table.half(), ids)
        for mode in ("sum", "mean", "max"):
            for options in ({}, {"padding_idx": 2}, {"include_last_offset": True}):
                bag = nn.EmbeddingBag(11, 5, mode=mode, **options)
                bag = dynquant.quantize_dynamic(bag, dtype=dtype)
                self.assert_scripts(bag, ids.view(2, 3))
                self.assert_scripts(bag, ids, torch.tensor([0, 2, 6]))
                if mode == "sum":
                    self.assert_scripts(bag, ids.view(2, 3), per_sample_weights=torch.rand(2, 3))

    @pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
    @pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
    def test_script_of_recurrent_layers_is_an_error(self, layer, dtype):
        model = nn.Sequential(nn.Linear(6, 6), layer(6, 5))
        model = dynquant.quantize_dynamic(model, dtype=dtype)
        kinds = [type(module) for module in model.modules()]
        name = type(model[1]).__name__
        message = f"cannot compile dynquant.nn.{name}, .*torch.jit.trace, or torch.export.export"
        with pytest.raises(RuntimeError, match=message):
            torch.jit.script(model)
        assert [type(module) for module in model.modules()] == kinds
        x = torch.randn(3, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = jit_saved(torch.jit.trace(model, x))
        for one, other in zip(tree_leaves(traced(x)), tree_leaves(model(x)), strict=True):
            assert_same(one, other)

    @pytest.mark.parametrize("stub", [dynquant.QuantStub, dynquant.DeQuantStub])
    def test_script_of_stubs_is_an_error(self, stub):
        model = dynquant.quantize_dynamic(nn.Sequential(stub(), nn.Linear(6, 6)))
        message = f"cannot compile dynquant.nn.{type(model[0]).__name__}, .*torch.jit.trace"
        with pytest.raises(RuntimeError, match=message):
            torch.jit.script(model)

    def test_trace_of_a_model(self, block):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(block, torch.randn(3, 16))
        loaded, x = jit_saved(traced), torch.randn(5, 16)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), block(x))
