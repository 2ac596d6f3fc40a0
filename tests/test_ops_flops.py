"""torch.utils.flop_counter counts a quantized model as it counts the float one."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dynquant

X = torch.randn(6, 5, 16)
PACKED = nn.utils.rnn.pack_padded_sequence(X, [6, 5, 3, 3, 1])


def flops(model, *args, **kwargs):
    with (
        FlopCounterMode(display=False) as counter,
        torch.backends.mkldnn.flags(enabled=False),  # whose LSTM torch counts as nothing
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),  # likewise on the CPU
    ):
        model(*args, **kwargs)
    return counter.get_total_flops()


MODELS = {
    "linear layers": (
        lambda: nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 7, bias=False)),
        (X,),
    ),
    "attention": (lambda: nn.MultiheadAttention(16, 4), (X, X, X)),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(16, 4, 40), (X,)),
    "LSTM": (lambda: nn.LSTM(16, 8, num_layers=2, bidirectional=True), (X,)),
    "LSTM with projections": (lambda: nn.LSTM(16, 8, proj_size=5), (X,)),
    "LSTM of a packed sequence": (lambda: nn.LSTM(16, 8), (PACKED,)),
    "GRU": (lambda: nn.GRU(16, 8, bias=False), (X,)),
    "RNN": (lambda: nn.RNN(16, 8), (X,)),
    "LSTMCell": (lambda: nn.LSTMCell(16, 8), (X[0],)),
    "GRUCell": (lambda: nn.GRUCell(16, 8), (X[0],)),
    "RNNCell": (lambda: nn.RNNCell(16, 8), (X[0],)),
}
CONFIGS = {
    "int8": dynquant.QConfig(),
    "activations in 16 bits": dynquant.QConfig(activation_bits=16),
    "float16": dynquant.QConfig(dtype=torch.float16),
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_as_the_float_model(name, config):
    build, arguments = MODELS[name]
    model = build().eval()
    spec = {nn.Module: CONFIGS[config]}
    counted = flops(dynquant.quantize_dynamic(model, spec), *arguments)
    assert counted == flops(model, *arguments) > 0


def test_products_of_several_formats():
    model = nn.Sequential(nn.LSTM(16, 8))
    spec = {"0": dynquant.QConfig(), "0.weight_hh_l0": None}
    assert flops(dynquant.quantize_dynamic(model, spec), X) == flops(model, X)


def test_an_input_that_is_quantized_once():
    model = nn.Sequential(dynquant.QuantStub(), nn.Linear(16, 7))
    assert flops(dynquant.quantize_dynamic(model), X) == flops(model, X)


def test_backward():
    model = nn.Sequential(nn.Linear(16, 7))
    model.requires_grad_(False)
    x = X.clone().requires_grad_()

    def step(model):
        return flops(lambda x: model(x).sum().backward(), x)

    assert step(dynquant.quantize_dynamic(model)) == step(model)


@pytest.mark.parametrize("as_ops", [False, True])
def test_fused(as_ops, monkeypatch):
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 4, 40, batch_first=True), 2, enable_nested_tensor=False
    ).eval()
    fused = dynquant.quantize_dynamic(model, fuse=True)
    assert not any(dynquant.fused_blocks(fused).values())
    if as_ops:  # which the counter's hooks on modules keep blocks from
        monkeypatch.setattr("dynquant.fused.block._has_any_global_hook", lambda: False)
    wanted = flops(model, X)  # with gradients: torch's own fused layer counts as nothing
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused(X)
    assert counter.get_total_flops() == wanted > 0
    ops = {str(op) for op in counter.get_flop_counts()["Global"]}
    assert ops == (
        {"dynquant.attention", "dynquant.feed_forward"}
        if as_ops
        else {"dynquant.linear_dynamic", "dynquant.scaled_dot_product"}
    )


@pytest.mark.parametrize("projects", [False, True])
def test_attend(projects):
    ops = torch.ops.dynquant
    key, query = torch.randn(2, 2, 9, 8), torch.randn(2, 3, 4, 8)
    q, out = (
        (ops.pack_weight(integers), scale, None)
        for integers, scale in (
            ops.quantize_weight(torch.randn(n, k)) for n, k in ((32, 20), (12, 32))
        )
    )
    x = torch.randn(2, 3, 20)

    def parts():
        heads = ops.linear_dynamic(x, *q).unflatten(-1, (4, 8)) if projects else query
        kept = key.transpose(1, 2)
        attended = ops.scaled_dot_product(heads, kept, kept, integers=False)
        return ops.linear_dynamic(attended.flatten(2), *out)

    def whole():
        given = (x, key, key, *out, *q) if projects else (query, key, key, *out)
        return ops.attend(*given)

    assert flops(whole) == flops(parts) > 0


class TestTransformers:
    @pytest.fixture(autouse=True)
    def _is_installed(self):
        pytest.importorskip("transformers", reason="transformers is not installed")

    def test_experts(self):
        from test_nn_experts import experts, routed

        for kind in ("mixtral", "gpt_oss", "nemotron_h"):
            model = experts(kind)
            assert flops(dynquant.quantize_dynamic(model), *routed()) == flops(model, *routed()) > 0

    @torch.no_grad()
    def test_a_token_behind_a_cache(self, monkeypatch):
        from fused import TEXT, fused, small

        monkeypatch.setattr("dynquant.fused.block._has_any_global_hook", lambda: False)
        counts = []
        for model in fused(small("Llama", TEXT, attn_implementation="eager")):
            ids = torch.arange(14).reshape(2, 7) + 3
            cache = model(ids, use_cache=True).cache
            counts.append(flops(model, ids[:, :1], cache=cache))
        assert counts[0] == counts[1] > 0

    @pytest.mark.parametrize("as_ops", [False, True])
    @pytest.mark.parametrize("kind", ["Llama", "ModernBert"])
    def test_fused_blocks(self, kind, as_ops, monkeypatch):
        import transformers

        if as_ops:
            monkeypatch.setattr("dynquant.fused.block._has_any_global_hook", lambda: False)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4}
        if kind == "Llama":
            heads["num_key_value_heads"] = 2
        config = getattr(transformers, f"{kind}Config")(
            **sizes, **heads, vocab_size=99, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
        model = getattr(transformers, f"{kind}Model")._from_config(
            config, attn_implementation="eager"
        )
        model.eval()
        ids = torch.arange(14).reshape(2, 7) + 3
        with torch.no_grad():
            fused = dynquant.quantize_dynamic(model, fuse=True)
            assert flops(fused, ids) == flops(model, ids) > 0
