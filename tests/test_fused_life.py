"""What happens to a fused model, and what its blocks leave to their submodules."""

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from compare import assert_same, assert_same_state
from fused import IDS, MASK, decibels, fused, hidden, randomized, seen_one_by_one, small
from torch import nn

import dynquant
from dynquant.fused import Adapter, Attention, FeedForward, LinearBlock, register

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

LAYERS = {"encoder.layer.0": "", "encoder.layer.1": "", "pooler": ""}


@pytest.fixture(scope="module")
def made():
    return fused(small("Bert"))


@pytest.fixture
def model(made):
    return copy.deepcopy(made[1])


@torch.no_grad()
def run(model, **arguments):
    return model(input_ids=IDS, attention_mask=MASK, **arguments)


class TestCall:
    def test_leaves_the_original(self, made):
        quantized = made[0]
        before = hidden(quantized)
        types = [type(module) for module in quantized.modules()]
        dynquant.fuse(quantized)
        assert [type(module) for module in quantized.modules()] == types
        assert_same(hidden(quantized), before)

    def test_in_place(self, made):
        quantized = copy.deepcopy(made[0])
        assert dynquant.fuse(quantized, inplace=True) is quantized
        assert dynquant.fused_blocks(quantized) == LAYERS

    def test_fusing_twice_changes_nothing(self, model):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = dynquant.fuse(model)
        assert dynquant.fused_blocks(again) == LAYERS
        assert_same(hidden(again), hidden(model))

    def test_by_quantize_dynamic(self, made):
        torch.manual_seed(0)
        floats = randomized(small("Bert"))
        model = dynquant.quantize_dynamic(floats, fuse=True)
        assert dynquant.fused_blocks(model) == LAYERS
        assert_same(hidden(model), hidden(dynquant.fuse(dynquant.quantize_dynamic(floats))))
        assert dynquant.quantize_dynamic(floats, fuse=True, inplace=True) is floats
        assert dynquant.fused_blocks(floats) == LAYERS

    @pytest.mark.parametrize(
        "model, options, error, message",
        [
            (3, {}, TypeError, "model is of type int"),
            (nn.Linear(2, 2), {"attention": "int4"}, ValueError, "attention.*integer, float"),
        ],
    )
    def test_wrong_arguments(self, model, options, error, message):
        with pytest.raises(error, match=message):
            dynquant.fuse(model, **options)

    def test_nothing_known(self):
        with pytest.warns(UserWarning, match="no block of the model is known"):
            dynquant.fuse(nn.Sequential(nn.Linear(2, 2)))

    @pytest.mark.parametrize(
        "options, reason",
        [
            ({"hidden_act": "mish"}, "intermediate.intermediate_act_fn is not a known activation"),
            ({"chunk_size_feed_forward": 3}, "chunk_size_feed_forward is 3"),
        ],
    )
    def test_what_is_left_as_it_is(self, options, reason):
        quantized = dynquant.quantize_dynamic(small("Bert", **options))
        with pytest.warns(UserWarning, match=f"encoder.layer.0: {reason}"):
            model = dynquant.fuse(quantized)
        blocks = dynquant.fused_blocks(model)
        assert (
            reason in blocks["encoder.layer.0"] and blocks["encoder.layer.0.attention.self"] == ""
        )
        assert decibels(hidden(model), hidden(quantized)) > 25

    @pytest.mark.parametrize(
        "config",
        [
            {"activation": {"bits": 16}},
            {"activation": {"qscheme": dynquant.per_tensor}},
            {"activation": {"qscheme": torch.per_tensor_symmetric}},
        ],
    )
    def test_other_schemes(self, config):
        quantized = dynquant.quantize_dynamic(randomized(small("Bert")), {nn.Linear: config})
        model = dynquant.fuse(quantized)
        assert dynquant.fused_blocks(model) == LAYERS
        assert decibels(hidden(model), hidden(quantized)) > 20
        assert_same(hidden(seen_one_by_one(copy.deepcopy(model))), hidden(model))

    def test_mixed_schemes_are_left_alone(self):
        config = {nn.Linear: None, "encoder.layer.0": dynquant.per_channel}
        config |= {"encoder.layer.0.output": {"activation": {"bits": 16}}}
        quantized = dynquant.quantize_dynamic(small("Bert"), config)
        with pytest.warns(UserWarning, match="in different ways"):
            dynquant.fuse(quantized)

    def test_another_device(self, made):
        quantized = copy.deepcopy(made[0]).to("meta")
        with pytest.warns(UserWarning, match="encoder.layer.0: is on meta"):
            dynquant.fuse(quantized)

    def test_float_layers_are_left_alone(self):
        quantized = dynquant.quantize_dynamic(
            small("Bert"), {"encoder.layer.1", "encoder.layer.0.output"}
        )
        with pytest.warns(UserWarning, match="encoder.layer.0: .*is of type Linear"):
            model = dynquant.fuse(quantized)
        assert dynquant.fused_blocks(model)["encoder.layer.1"] == ""

    @pytest.mark.parametrize(
        ("returned", "why"),
        [
            (lambda y: -y, "differs: .* dB"),
            (lambda y: (y,), "returns a tuple of 1, and its ops a tensor"),
            (lambda y: (y, None), "returns a tuple of 2, and its ops a tensor"),
        ],
    )
    def test_a_block_that_is_another_one(self, returned, why):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
                self.activation = nn.ReLU()

            def forward(self, x):
                return returned(self.second(self.activation(self.first(x))))

        names = FeedForward(up="first", activation="activation", down="second")
        register(Model, Adapter(arguments=("x",), feed_forward=names), replace=True)
        with pytest.warns(UserWarning, match=f"the model: {why}"):
            model = dynquant.fuse(dynquant.quantize_dynamic(Model()))
        assert type(model) is Model


class TestState:
    def test_tree_and_state_dict_stay(self, made):
        quantized, model = made
        assert [name for name, _ in quantized.named_modules()] == [
            name for name, _ in model.named_modules()
        ]
        for one, other in zip(quantized.modules(), model.modules(), strict=True):
            assert isinstance(other, type(one)) and type(other).__name__ == type(one).__name__
        assert_same_state(quantized, model)

    def test_loads_a_state_dict(self, made):
        other = fused(small("Bert"))[1]
        randomized(other, 3)
        other.load_state_dict(made[1].state_dict())
        assert_same(hidden(other), hidden(made[1]))

    @pytest.mark.parametrize(
        "copied",
        [
            copy.deepcopy,
            lambda model: pickle.loads(pickle.dumps(model)),
            lambda model: torch.load(_saved(model), weights_only=False),
        ],
    )
    def test_copies(self, model, copied):
        expected = hidden(model)
        other = copied(model)
        assert dynquant.fused_blocks(other) == LAYERS
        assert_same(hidden(other), expected)
        for one, two in zip(model.modules(), other.modules(), strict=True):
            assert type(one) is type(two) and one is not two
        assert "_parts" not in pickle.loads(pickle.dumps(model)).encoder.layer[0].__dict__

    def test_a_pickle_in_a_new_process(self, model, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        code = (
            "import dynquant, json, torch\n"
            f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
            "print(json.dumps(dynquant.fused_blocks(model)))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout.splitlines()[-1]) == LAYERS

    def test_saved_by_transformers(self, tmp_path):
        from dynquant.transformers import DynquantConfig

        randomized(small("Bert")).save_pretrained(tmp_path / "float")
        quantized = transformers.AutoModel.from_pretrained(
            tmp_path / "float", quantization_config=DynquantConfig()
        )
        model = dynquant.fuse(quantized)
        model.save_pretrained(tmp_path / "fused")
        loaded = transformers.AutoModel.from_pretrained(tmp_path / "fused")
        assert_same(hidden(loaded), hidden(quantized))
        assert_same(hidden(dynquant.fuse(loaded)), hidden(model))

    def test_casts(self, model):
        model.bfloat16()
        assert hidden(model).dtype == torch.bfloat16
        assert dynquant.fused_blocks(model) == LAYERS


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


class TestWholeModel:
    """What is called besides the layers is left out where nothing asks for it."""

    @pytest.mark.parametrize("name", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
    def test_the_forward_of_the_model_gives_the_same(self, name):
        _, model = fused(small(name))
        types = torch.zeros_like(IDS)
        for given in (
            {"input_ids": IDS},
            {"input_ids": IDS, "attention_mask": MASK},
            {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types},
        ):
            with torch.no_grad():
                found, expected = model(**given), type(model)._base.forward(model, **given)
                assert type(found) is type(expected) and found.keys() == expected.keys()
                assert_same(found.pooler_output, expected.pooler_output)
                seen = given.get("attention_mask", torch.ones_like(IDS)).bool()
                assert_same(found.last_hidden_state[seen], expected.last_hidden_state[seen])
                pair = model(**given, return_dict=False)
                assert isinstance(pair, tuple) and len(pair) == 2
                assert_same(pair[0], found.last_hidden_state)

    def test_hooks_and_what_else_is_asked_for(self, model):
        before, seen = hidden(model), []
        model.encoder.register_forward_hook(lambda *given: seen.append(1))
        assert_same(hidden(model), before)
        assert seen
        with torch.no_grad():
            embeds = model.embeddings.word_embeddings(IDS)
            found = model(inputs_embeds=embeds, attention_mask=MASK).last_hidden_state
            assert_same(found[MASK.bool()], before)
            positions = torch.arange(12).expand(2, -1)
            found = model(IDS, MASK, position_ids=positions).last_hidden_state
            assert_same(found[MASK.bool()], before)


class TestCapture:
    def test_hidden_states(self, made):
        quantized, model = made
        model = copy.deepcopy(model)
        expected = run(quantized, output_hidden_states=True).hidden_states
        for _ in range(2):
            found = run(model, output_hidden_states=True)
            assert len(found.hidden_states) == len(expected) == 3
            assert_same(found.hidden_states[-1], found.last_hidden_state)
        assert dynquant.fused_blocks(model) == LAYERS

    def test_attentions(self, made):
        quantized, model = fused(small("Bert", attn_implementation="eager"))
        before = hidden(model)
        expected = run(quantized, output_attentions=True).attentions
        found = run(model, output_attentions=True)
        assert len(found.attentions) == len(expected) == 2
        assert decibels(found.attentions[0], expected[0]) > 80
        assert_same(found.last_hidden_state[MASK.bool()], before)
        assert dynquant.fused_blocks(model) == LAYERS  # the hooks that stay are idle
        assert_same(hidden(model), before)


class TestUnfusedForACall:
    def test_hook_is_called(self, model):
        before, seen = hidden(model), []
        handle = model.encoder.layer[1].attention.self.key.register_forward_hook(
            lambda module, args, output: seen.append(output.shape)
        )
        assert_same(hidden(model), before)
        assert seen == [(2, 12, 48)]
        assert dynquant.fused_blocks(model)["encoder.layer.1"] == "key has hooks"
        handle.remove()
        assert dynquant.fused_blocks(model) == LAYERS

    def test_global_hook(self, model):
        before, seen = hidden(model), []
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output: seen.append(type(module).__name__)
        )
        try:
            assert_same(hidden(model), before)
        finally:
            handle.remove()
        assert seen.count("Linear") == 13  # six a layer, and the pooler's

    def test_replaced_forward(self, model):
        before, called = hidden(model), []
        inner = model.encoder.layer[0].intermediate
        forward = inner.forward
        inner.forward = lambda *args: called.append(1) or forward(*args)
        assert_same(hidden(model), before)
        assert called

    @pytest.mark.parametrize("at", ["query", "value"])
    def test_adapter_of_low_rank(self, model, at):
        class LowRank(nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base
                self.down, self.up = nn.Linear(48, 2, bias=False), nn.Linear(2, 48, bias=False)
                nn.init.zeros_(self.up.weight)

            def forward(self, x):
                return self.base(x) + self.up(self.down(x))

        before = hidden(model)
        attention = model.encoder.layer[0].attention.self
        base = getattr(attention, at)
        setattr(attention, at, LowRank(base))
        assert_same(hidden(model), before)
        assert "is of type LowRank" in dynquant.fused_blocks(model)["encoder.layer.0"]
        getattr(attention, at).up.weight.data += 1
        assert decibels(hidden(model), before) < 40
        output = model(input_ids=IDS).last_hidden_state
        output.sum().backward()
        assert getattr(attention, at).up.weight.grad.abs().sum() > 0
        setattr(attention, at, base)
        assert_same(hidden(model), before)
        assert dynquant.fused_blocks(model) == LAYERS

    def test_other_container(self, model):
        class Doubled(nn.Module):
            def forward(self, x, y):
                return 2 * y

        layer, x = model.encoder.layer[0], torch.randn(2, 12, 48)
        with torch.no_grad():
            expected = 2 * layer.attention(x)[0]
            layer.output = Doubled()
            assert_same(layer(x), expected)
        assert "output" in dynquant.fused_blocks(model)["encoder.layer.0"]

    def test_gradients(self, made):
        quantized, model = copy.deepcopy(made)
        grads = []
        for one in (quantized, model):
            embeds = torch.randn(2, 12, 48, generator=torch.Generator().manual_seed(2))
            embeds.requires_grad_()
            one(inputs_embeds=embeds).last_hidden_state.square().sum().backward()
            grads.append(embeds.grad)
        assert_same(grads[1], grads[0])
        assert model.encoder.layer[0].output.LayerNorm.weight.grad is not None

    def test_training(self, made):
        outputs = []
        for one in map(copy.deepcopy, made):
            one.train()
            torch.manual_seed(0)
            outputs.append(run(one).last_hidden_state)
        assert_same(outputs[1], outputs[0])

    def test_autocast(self, made):
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = (hidden(one) for one in made[::-1])
        assert_same(found, expected)

    def test_cache(self):
        quantized, model = fused(small("Bert", is_decoder=True))
        for one in (quantized, model):
            assert run(one, use_cache=True).cache is not None
        assert decibels(hidden(model, use_cache=True), hidden(quantized, use_cache=True)) > 25

    def test_cross_attention(self):
        quantized, model = fused(small("Bert", is_decoder=True, add_cross_attention=True))
        states = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(2))
        given = {"encoder_hidden_states": states, "use_cache": False}
        assert decibels(hidden(model, **given), hidden(quantized, **given)) > 25

    def test_empty(self, model):
        with torch.no_grad():
            assert model.encoder.layer[0](torch.zeros(0, 12, 48)).shape == (0, 12, 48)


class TestCompilers:
    def test_compile_without_a_break(self):
        model = fused(small("Bert", num_hidden_layers=1))[1]
        expected, graphs = hidden(model), []

        def backend(graph, inputs):
            graphs.append(graph.graph)
            return graph

        torch._dynamo.reset()
        assert_same(hidden(torch.compile(model, fullgraph=True, backend=backend)), expected)
        names = [str(node.target).split(".") for node in graphs[0].nodes]
        blocks = [name[1] for name in names if name[0] == "dynquant"]
        # The embeddings, the layer, the pooler.
        assert blocks == ["embedding_sum", "attention", "feed_forward", "linear_block"]

    def test_export(self, model):
        layer = model.encoder.layer[0]
        x = torch.randn(2, 12, 48)
        with torch.no_grad():
            program = torch.export.export(layer, (x,))
            assert_same(program.module()(x), layer(x))
        assert sum("dynquant.attention" in str(node.target) for node in program.graph.nodes) == 1

    def test_trace(self, model):
        layer, x = model.encoder.layer[0], torch.randn(2, 12, 48)
        with torch.no_grad():
            traced = torch.jit.trace(layer, (x,))
            assert_same(traced(x), layer(x))

    def test_script_is_an_error(self, model):
        with pytest.raises(RuntimeError, match="script the model before dynquant.fuse"):
            torch.jit.script(model.encoder.layer[0])


class TestRegister:
    @pytest.mark.parametrize(
        "block, adapter, error, message",
        [
            (3, None, TypeError, "block is 3"),
            ("Name", None, TypeError, "block is 'Name'"),
            (nn.Linear, 3, TypeError, "adapter is 3"),
            (
                "transformers.models.bert.modeling_bert.BertLayer",
                Adapter(("x",), feed_forward=FeedForward("up", "down", "act")),
                ValueError,
                "has an adapter already",
            ),
        ],
    )
    def test_wrong_arguments(self, block, adapter, error, message):
        with pytest.raises(error, match=message):
            register(block, adapter)

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: Adapter(("x",)), "needs attention or feed_forward"),
            (
                lambda: Adapter(
                    ("x",), feed_forward=FeedForward("a", "b", "c"), linear_block=LinearBlock("d")
                ),
                "linear_block alone",
            ),
            (lambda: Adapter((), feed_forward=FeedForward("a", "b", "c")), "arguments is empty"),
            (
                lambda: Adapter(("x",), feed_forward=FeedForward("a", "b", "c"), result="list"),
                "result is 'list'",
            ),
            (lambda: FeedForward("a", "b", "c", split="gate"), "split is 'gate'"),
            (lambda: FeedForward("a", "b", "c", gate="d", split="up_first"), "gate and split"),
            (lambda: Attention("q", "k", None, "d"), "key and value"),
            (lambda: Attention("q", None, None, "d"), "output"),
        ],
    )
    def test_wrong_adapters(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_architecture_of_ones_own(self):
        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.LayerNorm(24)
                self.a, self.b = nn.Linear(24, 40), nn.Linear(40, 24)
                self.act = nn.SiLU()

            def forward(self, x):
                return x + self.b(self.act(self.a(self.norm(x))))

        names = FeedForward(up="a", activation="act", down="b", norm="norm")
        register(Own, Adapter(("x",), feed_forward=names, residual=True, norm_first=True))
        quantized, model = fused(nn.Sequential(Own(), Own()))
        assert dynquant.fused_blocks(model) == {"0": "", "1": ""}
        x = torch.randn(5, 24)
        with torch.no_grad():
            assert decibels(model(x), quantized(x)) > 35
