"""Quantized models in other processes, other dtypes, on other devices; trained around; tied."""

import copy
import pickle
import subprocess
import sys
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from children import TIMEOUT, result_of
from compare import assert_same
from torch import nn
from torch.utils._pytree import tree_leaves

import dynquant
from dynquant import QConfig


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 16),
        nn.ReLU(),
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
        nn.Linear(16, 4, bias=False),
    )


@pytest.fixture
def model():
    return dynquant.quantize_dynamic(net())


def given():
    return torch.linspace(-2, 2, 2 * 3 * 12).view(2, 3, 12)


def run(model):
    with torch.no_grad():
        return model(given())


def run_on_one_thread(model):
    torch.set_num_threads(1)
    return run(model)


class TestProcesses:
    @pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
    def test_recurrent_modules_too(self, kind):
        module = dynquant.quantize_dynamic(kind(4, 4))
        packed = [name for name in module._buffers if name.startswith("packed")]
        handles = ForkingPickler.dumps(module)
        assert packed and len(bytes(handles)) > 0
        other = pickle.loads(handles)
        x = torch.randn(3, 4)
        for one, wanted in zip(tree_leaves(other(x)), tree_leaves(module(x)), strict=True):
            assert_same(one, wanted)

    @pytest.mark.parametrize("method", ["fork", "spawn"])
    @pytest.mark.parametrize("shared", [False, True])
    def test_a_model_goes_to_a_child(self, model, method, shared):
        expected = run(model)
        if shared:
            model.share_memory()
            assert all(tensor.is_shared() for tensor in model.buffers() if tensor.numel())
        result = result_of(method, run_on_one_thread, model)
        assert_same(torch.from_numpy(result), expected)

    def test_saved_here_loaded_in_a_new_process(self, model, tmp_path):
        torch.save(model, tmp_path / "model.pt")
        torch.save(run(model), tmp_path / "expected.pt")
        code = (
            "import sys, torch, dynquant\n"
            "model = torch.load(sys.argv[1], weights_only=False)\n"
            "x = torch.linspace(-2, 2, 72).view(2, 3, 12)\n"
            "with torch.no_grad(): assert torch.equal(model(x), torch.load(sys.argv[2]))"
        )
        paths = [tmp_path / "model.pt", tmp_path / "expected.pt"]
        subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=TIMEOUT)


class TestModes:
    def test_inference_mode(self, model):
        expected = run(model)
        with torch.inference_mode():
            assert_same(model(given()), expected)
        made_inside = torch.inference_mode()(dynquant.quantize_dynamic)(net())
        assert_same(run(made_inside), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast(self, model, dtype):
        expected = run(model)
        with torch.autocast("cpu", dtype=dtype):
            result = run(model)
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.1)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_casts(self, model, dtype):
        expected = run(model)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model.to(dtype)
        for key, value in model.state_dict().items():
            if key.endswith("weight_scale") or before[key].dtype == torch.int8:
                assert_same(value, before[key], key)
            elif before[key].is_floating_point():
                assert value.dtype == dtype, key
        with torch.no_grad():
            result = model(given().to(dtype))
        assert result.dtype == dtype
        torch.testing.assert_close(result.float(), expected, rtol=0, atol=0.1)

    def test_a_16_bit_model_is_quantized_as_it_is(self):
        model = dynquant.quantize_dynamic(net().to(torch.bfloat16))
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert model(given().bfloat16()).dtype == torch.bfloat16

    def test_meta_and_back(self, model):
        expected, state = run(model), copy.deepcopy(model.state_dict())
        with torch.device("meta"):
            empty = dynquant.quantize_dynamic(net())
        assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
        assert empty(torch.empty(2, 3, 12, device="meta")).shape == (2, 3, 4)
        empty.load_state_dict(state, assign=True)
        assert_same(run(empty), expected)
        again = model.to("meta").to_empty(device="cpu")
        again.load_state_dict(state)
        assert_same(run(again), expected)

    def test_train_mode_changes_no_quantized_layer(self, model):
        expected = run(model)
        layer, x = model[0], given()
        assert_same(layer.train()(x), layer.eval()(x))
        assert_same(run(model.train().eval()), expected)


class LoRA(nn.Module):
    """A low-rank adapter around a frozen layer, as the usual libraries write it."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class TestTraining:
    @pytest.mark.parametrize("compiled", [False, True])
    def test_adapters_learn_on_frozen_layers(self, compiled):
        torch.manual_seed(0)
        frozen = dynquant.quantize_dynamic(
            nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 8))
        )
        before = {key: value.clone() for key, value in frozen.state_dict().items()}
        x, target = torch.randn(64, 16), torch.randn(64, 8)
        frozen[0], frozen[2] = LoRA(frozen[0]), LoRA(frozen[2])
        model = frozen
        if compiled:
            torch._dynamo.reset()
            model = torch.compile(frozen, backend="aot_eager", fullgraph=True)
        trained = [p for p in frozen.parameters() if p.requires_grad]
        assert len(trained) == 4
        optimizer = torch.optim.Adam(trained, lr=0.02)
        losses = []
        for _ in range(40):
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]
        # The first adapter's gradient has passed through the second quantized layer.
        assert frozen[0].up.weight.grad.abs().sum() > 0
        for place in (0, 2):
            for key, value in frozen[place].base.state_dict().items():
                assert_same(value, before[f"{place}.{key}"], key)

    def test_gradient_through_attention(self, model):
        x = given().requires_grad_()
        model(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
        reference = net().eval()
        other = given().requires_grad_()
        reference(other).square().sum().backward()
        similarity = torch.cosine_similarity(x.grad.flatten(), other.grad.flatten(), dim=0)
        assert similarity > 0.98


class Tied(nn.Module):
    """A language model whose head is its embedding, tied as transformers ties it."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.tie_weights()

    def tie_weights(self):
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        return self.head(self.body(self.embedding(ids)))


class TestTied:
    @pytest.mark.parametrize("inplace", [False, True])
    def test_the_embedding_stays_and_is_not_copied(self, inplace):
        model = Tied()
        weight = model.embedding.weight
        quantized = dynquant.quantize_dynamic(model, inplace=inplace)
        assert isinstance(quantized.head, dynquant.nn.Linear)
        assert (quantized.embedding.weight is weight) == inplace
        assert_same(quantized.embedding.weight, weight)
        floats = [p for p in quantized.parameters() if p.numel() == 88]
        assert len(floats) == 1

    def test_loads_a_float_checkpoint_with_both_names(self):
        trained, model = Tied(), dynquant.quantize_dynamic(Tied())
        model.load_state_dict(trained.state_dict())
        ids = torch.arange(5)
        with torch.no_grad():
            assert_same(model(ids), dynquant.quantize_dynamic(trained)(ids))

    def test_tying_again(self):
        model = dynquant.quantize_dynamic(Tied())
        ids = torch.arange(5)
        expected = model(ids)
        model.tie_weights()
        assert_same(model(ids), expected)
        assert set(model.head.state_dict()) == {"weight_int8", "weight_scale", "version"}
        model.embedding.weight.data.mul_(3)
        model.tie_weights()
        assert not torch.allclose(model(ids), expected)

    @pytest.mark.parametrize("head", [torch.qint8, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("table", [torch.quint8, torch.quint4x2], ids=str)
    def test_tying_again_to_a_quantized_embedding(self, table, head):
        spec = {nn.Embedding: QConfig(dtype=table), nn.Linear: QConfig(dtype=head)}
        model = dynquant.quantize_dynamic(Tied(), spec)
        held = {key: value.clone() for key, value in model.state_dict().items()}
        model.tie_weights()
        for key, value in model.state_dict().items():
            assert_same(value, held[key], key)
        model.embedding.weight = torch.randn(11, 8)  # quantized on the way
        assert model.embedding.weight.dtype == torch.float32
        model.tie_weights()
        linear = nn.Linear(8, 11, bias=False)
        linear.weight.data = model.embedding.weight.dequantize()
        expected = dynquant.quantize_dynamic(linear, dtype=head)
        for key, value in model.head.state_dict().items():
            assert_same(value, expected.state_dict()[key], key)

    @pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
    def test_tying_again_in_16_bits(self, half):
        model = dynquant.quantize_dynamic(Tied(), dtype=half)
        ids = torch.arange(5)
        expected = model(ids)
        model.tie_weights()
        assert_same(model(ids), expected)
        model.embedding.weight.data.mul_(3)
        model.tie_weights()
        assert_same(model.head.weight + 0, model.embedding.weight.detach().to(half).float())
        with pytest.raises(ValueError, match=r"weight is torch.float32 \[2, 2\]; allowed: .*11, 8"):
            model.head.weight = torch.zeros(2, 2)
        with pytest.raises(TypeError, match="a float tensor can be assigned to weight"):
            model.head.weight = torch.zeros(11, 8, dtype=torch.int8)

    def test_two_embeddings_share_one_table(self):
        model = nn.ModuleList([nn.Embedding(11, 8), nn.Embedding(11, 8), nn.Embedding(11, 8)])
        model[1].weight = model[2].weight = model[0].weight
        model[2].max_norm = 0.5
        quantized = dynquant.quantize_dynamic(model, dtype=torch.quint8)
        tables = [one.weight.data_ptr() for one in quantized]
        assert tables[0] == tables[1] != tables[2]
        other = dynquant.quantize_dynamic(nn.Embedding(11, 8), dtype=torch.quint8)
        other.weight = quantized[0].weight
        ids = torch.arange(11)
        assert_same(other(ids), quantized[0](ids))
        four = dynquant.quantize_dynamic(nn.Embedding(11, 8), dtype=torch.quint4x2)
        four.weight = quantized[0].weight
        assert torch.allclose(four(ids), other(ids), atol=0.3)
        with pytest.raises(TypeError, match="a float tensor can be assigned to weight"):
            other.weight = torch.zeros(11, 8, dtype=torch.uint8)
