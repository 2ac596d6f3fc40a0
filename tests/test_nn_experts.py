"""dynquant.nn.Experts and Experts16bit: experts of transformers as loops over linear layers."""

import copy
import importlib
from contextlib import nullcontext

import pytest
import torch
from compare import assert_same
from round_trips import COPIES, FORMATS
from torch import nn

import dynquant
from dynquant.nn import experts as module_of_experts

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

TOKENS, CHOICES, EXPERTS, HIDDEN, INNER = 11, 3, 5, 40, 24
# One class for each kind of declaration and of gate.
CLASSES = {
    "mixtral": "MixtralExperts",
    "qwen2_moe": "Qwen2MoeExperts",
    "qwen3_moe": "Qwen3MoeExperts",
    "deepseek_v2": "DeepseekV2Experts",
    "deepseek_v3": "DeepseekV3Experts",
    "deepseek_v4": "DeepseekV4Experts",  # a gate with limits
    "gpt_oss": "GptOssExperts",  # [E, K, N], biases, gate and up in turns
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts",  # [E, K, N], biases
    "aria": "AriaExperts",  # [E, K, N]
    "nemotron_h": "NemotronHExperts",  # no gate
    "muse_spark": "MuseSparkExperts",  # a norm after each expert
}


class Config:
    """Gives small values for whatever a class of experts reads of its config."""

    _experts_implementation = "eager"
    moe_latent_size = None
    swiglu_alpha, swiglu_limit = 1.7, 1.5

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        for part, value in {
            "expert": EXPERTS,
            "intermediate": INNER,
            "hidden_act": "silu",
            "hidden": HIDDEN,
            "eps": 1e-6,
        }.items():
            if part in name:
                return value
        raise AttributeError(name)


def experts(kind="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    made = getattr(module, CLASSES[kind])(Config()).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.to(dtype)


def routed(dtype=torch.float32, tokens=TOKENS):
    """Arguments of a call in which one of the experts is not chosen, and another by every token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    others = [
        torch.randperm(EXPERTS - 2, generator=generator)[: CHOICES - 1] for _ in range(tokens)
    ]
    chosen = [torch.cat([one, torch.tensor([EXPERTS - 1])]) for one in others]
    chosen = torch.stack(chosen) if chosen else torch.zeros(0, CHOICES, dtype=torch.int64)
    return x, chosen, torch.rand(tokens, CHOICES, generator=generator)


def linear_of(mod, name, expert, qconfig):
    """nn.Linear of one expert, quantized."""
    weight = getattr(mod, name)[expert]
    weight = weight.t() if mod.is_transposed else weight
    bias = getattr(mod, f"{name}_bias")[expert] if mod.has_bias else None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight)
    linear.bias = None if bias is None else nn.Parameter(bias)
    return dynquant.quantize_dynamic(linear, {nn.Linear: qconfig})


def looped(mod, x, chosen, weights, qconfig):
    """The experts one by one, each of two quantized nn.Linear."""
    up = "gate_up_proj" if mod.has_gate else "up_proj"
    total = torch.zeros(x.shape)
    for expert in range(mod.num_experts):
        tokens, places = torch.where(chosen == expert)
        if len(tokens):
            y = linear_of(mod, up, expert, qconfig)(x[tokens])
            y = mod._apply_gate(y) if mod.has_gate else mod.act_fn(y)
            y = linear_of(mod, "down_proj", expert, qconfig)(y)
            if mod.has_post_expert_norm:
                y = mod.post_expert_norm(y)
            y = y * weights[tokens, places, None]
            total.index_add_(0, tokens, y.float())
    return total.to(torch.promote_types(x.dtype, weights.dtype)).to(x.dtype)


QCONFIGS = {
    "int8": dynquant.QConfig(),
    "per_tensor": dynquant.QConfig(weight="per_tensor", activation="per_tensor"),
    "symmetric": dynquant.QConfig(symmetric=True),
    "16 bits": dynquant.QConfig(activation_bits=16),
    "float16": dynquant.QConfig(dtype=torch.float16),
    "bfloat16": dynquant.QConfig(dtype=torch.bfloat16),
}


@pytest.fixture(params=[False, True])
def one_by_one(request, monkeypatch):
    """Whether experts run one after the other, as for many rows."""
    if request.param:
        monkeypatch.setattr(module_of_experts, "_FEW_ROWS", -1)
    return request.param


def quantized(mod, qconfig=QCONFIGS["int8"]):
    return dynquant.quantize_dynamic(mod, {type(mod): qconfig})


@pytest.mark.parametrize("kind", CLASSES)
@torch.no_grad()
def test_equal_a_loop_over_linear_layers(one_by_one, kind):
    mod = experts(kind)
    made = dynquant.quantize_dynamic(mod)
    assert type(made) is dynquant.nn.Experts
    arguments = routed()
    found = made(*arguments)
    # The second is the class's own code, which multiplies with one expert's weight after another.
    for expected in (
        looped(mod, *arguments, QCONFIGS["int8"]),
        type(mod).forward.__wrapped__(made, *arguments),
    ):
        assert_alike(found, expected, one_by_one)
    assert signal_to_noise(mod(*arguments), found) > 30


def assert_alike(found, expected, one_by_one):
    """To the bit one by one: gates are the float class's own, and torch rounds the last values of a
    tensor otherwise.
    """
    if one_by_one:
        return assert_same(found, expected)
    assert signal_to_noise(expected, found) > (110 if found.dtype == torch.float32 else 60)


def signal_to_noise(wanted, found):
    noise = (wanted - found).double().square().sum()
    return 10 * torch.log10(wanted.double().square().sum() / noise).item()


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", QCONFIGS)
@torch.no_grad()
def test_every_config_and_dtype(one_by_one, kind, dtype, config):
    mod = experts(kind, dtype)
    made = quantized(mod, QCONFIGS[config])
    arguments = routed(dtype)
    y = made(*arguments)
    assert y.dtype == dtype
    expected = looped(mod, *arguments, QCONFIGS[config])
    assert_alike(y, expected, one_by_one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sums_in_16_bits_are_those_of_either_way(monkeypatch, dtype):
    """With weights in 16 bits as well: many rows give the bits of few."""
    made = quantized(experts("nemotron_h", dtype))
    x, chosen, weights = routed(dtype)
    together = made(x, chosen, weights.to(dtype))
    monkeypatch.setattr(module_of_experts, "_FEW_ROWS", -1)
    assert_same(made(x, chosen, weights.to(dtype)), together)


def test_rows_in_which_way_are_counted(monkeypatch):
    """Few together, many one expert after the other; neither reads what is chosen for none."""
    made = quantized(experts())
    x, chosen, weights = routed()
    chosen[0, 0], weights[0, 0] = EXPERTS, torch.nan
    called = []
    monkeypatch.setattr(type(made), "_expert", lambda *given: called.append(given) or given[2])
    made(x, chosen, weights)
    assert not called
    monkeypatch.setattr(module_of_experts, "_FEW_ROWS", chosen.numel() - 1)
    made(x, chosen, weights)
    assert called
    monkeypatch.undo()
    assert made(x, chosen, weights).isfinite().all()


class TestCall:
    def test_by_name(self):
        mod = experts("gpt_oss")
        made = quantized(mod)
        x, chosen, weights = routed()
        wanted = made(x, chosen, weights)
        assert_same(made(x, router_indices=chosen, routing_weights=weights), wanted)
        assert_same(made(hidden_states=x, top_k_index=chosen, top_k_weights=weights), wanted)
        with pytest.raises(TypeError, match="routes"):
            made(x, chosen, weights, routes=chosen)
        with pytest.raises(
            TypeError, match="top_k_index must be a torch.Tensor, got builtins.list"
        ):
            made(x, chosen.tolist(), weights)

    def test_an_index_beyond_the_experts_is_none_of_them(self):
        made = quantized(experts())
        x, chosen, weights = routed()
        beyond = chosen.clone()
        beyond[:, 0] = EXPERTS
        without = weights.clone()
        without[:, 0] = 0
        assert_same(made(x, beyond, weights), made(x, chosen, without))

    def test_no_token(self):
        assert quantized(experts())(*routed(tokens=0)).shape == (0, HIDDEN)

    def test_rows_do_not_depend_on_others(self):
        made = quantized(experts())
        x, chosen, weights = routed()
        assert_same(made(x, chosen, weights)[3:4], made(x[3:4], chosen[3:4], weights[3:4]))

    def test_gradient_of_the_input(self):
        mod = experts("gpt_oss")
        made = quantized(mod)
        x, chosen, weights = routed()
        gradients = []
        for one in (mod, made):
            leaf = x.clone().requires_grad_()
            one(leaf, chosen, weights).square().sum().backward()
            gradients.append(leaf.grad)
        assert signal_to_noise(*gradients) > 25

    def test_autocast(self):
        made = quantized(experts())
        with torch.autocast("cpu", torch.bfloat16):
            assert made(*routed()).dtype == torch.float32

    @pytest.mark.parametrize("config", ["int8", "per_tensor", "bfloat16"])
    @pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "muse_spark"])
    def test_compiled_without_a_break(self, kind, config):
        torch._dynamo.reset()
        made = quantized(experts(kind), QCONFIGS[config])
        compiled = torch.compile(made, backend="aot_eager", fullgraph=True, dynamic=True)
        with torch.no_grad():
            for tokens in (TOKENS, 4):
                x, chosen, weights = routed(tokens=tokens)
                chosen[1, 0] = EXPERTS
                # The activation, torch's, may differ in the last bit.
                wanted = made(x, chosen, weights)
                assert signal_to_noise(wanted, compiled(x, chosen, weights)) > 60

    def test_gradient_when_compiled(self):
        torch._dynamo.reset()
        made = quantized(experts("gpt_oss"))
        compiled = torch.compile(made, backend="aot_eager")  # in several graphs
        x, chosen, weights = routed()
        gradients = []
        for one in (made, compiled):
            leaf = x.clone().requires_grad_()
            one(leaf, chosen, weights).square().sum().backward()
            gradients.append(leaf.grad)
        assert signal_to_noise(*gradients) > 60

    def test_exported(self):
        made = quantized(experts())
        program = torch.export.export(made, routed())
        assert_same(program.module()(*routed()), made(*routed()))

    def test_traced_by_fx_as_one_call(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = quantized(experts())

            def forward(self, x, chosen, weights):
                return self.experts(x * 2, chosen, weights)

        block = Block()
        assert_same(torch.fx.symbolic_trace(block)(*routed()), block(*routed()))

    def test_scripted(self):
        with pytest.raises(RuntimeError, match=r"dynquant\.nn\.Experts"):
            torch.jit.script(quantized(experts()))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "muse_spark"])
class TestState:
    @pytest.mark.parametrize("config", ["int8", "per_tensor", "bfloat16"])
    @pytest.mark.parametrize("way", COPIES)
    def test_copies(self, kind, config, way):
        made = quantized(experts(kind), QCONFIGS[config])
        assert_same(COPIES[way](made)(*routed()), made(*routed()))

    @pytest.mark.parametrize("config", ["int8", "per_tensor", "bfloat16"])
    @pytest.mark.parametrize("way", FORMATS)
    def test_state_dict(self, kind, config, way):
        made = quantized(experts(kind), QCONFIGS[config])
        other = experts(kind)
        nn.init.zeros_(other.down_proj)
        other = quantized(other, QCONFIGS[config])
        state = FORMATS[way](made.state_dict())
        other.load_state_dict(state)
        assert_same(other(*routed()), made(*routed()))
        on_meta = quantized(experts(kind), QCONFIGS[config]).to("meta")
        on_meta.load_state_dict(state, assign=True)
        assert_same(on_meta(*routed()), made(*routed()))

    def test_float_checkpoint(self, kind):
        mod = experts(kind)
        other = quantized(mod)
        with torch.no_grad():
            mod.down_proj *= 2
        other.load_state_dict(mod.state_dict())
        assert_same(other(*routed()), quantized(mod)(*routed()))

    def test_keys(self, kind):
        mod = experts(kind)
        state = quantized(mod).state_dict()
        n, k = 2 * INNER, HIDDEN
        assert state["gate_up_proj_int8"].shape == (EXPERTS, n, k)
        assert state["gate_up_proj_int8"].dtype == torch.int8
        assert state["gate_up_proj_scale"].shape == (EXPERTS, n)
        others = {"gate_up_proj_bias", "down_proj_bias"} if mod.has_bias else set()
        own = {key for key in state if not key.startswith("post_expert_norm")}
        weights = {
            f"{name}_{part}" for name in ("gate_up_proj", "down_proj") for part in ("int8", "scale")
        }
        assert own == {*weights, *others, "version"}

    def test_weights_stand_for_dequantized_values(self, kind):
        mod = experts(kind)
        made = quantized(mod)
        for name in ("gate_up_proj", "down_proj"):
            weight, wanted = getattr(made, name), getattr(mod, name)
            assert weight.shape == wanted.shape and weight.dtype == wanted.dtype
            assert signal_to_noise(wanted, weight.dequantize()) > 38
            assert_same(weight[2].dequantize(), weight.dequantize()[2])
            assert_same(weight[torch.tensor(1)].dequantize(), weight.dequantize()[1])
            assert_same(weight + 0, weight.dequantize())
            assert weight.to(torch.bfloat16).dtype == torch.bfloat16
            integers = made.state_dict()[f"{name}_int8"]
            assert_same(weight.int_repr(), integers.mT if mod.is_transposed else integers)
            with pytest.raises(RuntimeError, match="cannot be written to"):
                weight[0] = 0
            with pytest.raises(IndexError, match="size 5"):
                weight[EXPERTS]

    def test_assigned_weight_is_quantized(self, kind):
        mod = experts(kind)
        made = quantized(mod)
        with torch.no_grad():
            mod.down_proj *= -1
        made.down_proj = mod.down_proj
        assert_same(made(*routed()), quantized(mod)(*routed()))
        made.down_proj = quantized(experts(kind)).down_proj
        assert_same(made(*routed()), quantized(experts(kind))(*routed()))
        with pytest.raises(ValueError, match="down_proj is"):
            made.down_proj = torch.zeros(EXPERTS, 3, 3)

    def test_scaled_in_place(self, kind):
        made = quantized(experts(kind))
        values = made.down_proj.dequantize()
        made.down_proj.div_(2)
        assert_same(made.down_proj.dequantize(), values / 2)

    def test_cast(self, kind):
        made = quantized(experts(kind))
        scale = made.down_proj_scale.clone()
        made.to(torch.bfloat16)
        assert made.down_proj.dtype == torch.bfloat16
        assert_same(made.down_proj_scale, scale)

    def test_empty_on_meta(self, kind):
        made = quantized(experts(kind)).to("meta").to_empty(device="cpu")
        assert not made.down_proj.int_repr().any()


class TestSelection:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        model = nn.Module()
        model.gate, model.experts = nn.Linear(HIDDEN, EXPERTS), experts()
        model.forward = lambda x: model.experts(x, *reversed(model.gate(x).softmax(-1).topk(2)))
        return model

    @pytest.mark.parametrize(
        ("spec", "is_quantized"),
        [
            (None, True),
            ({nn.Linear}, True),
            ({nn.GRU, nn.Linear}, True),
            ({nn.LSTM}, False),
            ({"gate"}, False),
            ({"experts"}, True),
            ({nn.Linear: dynquant.QConfig(), "experts": None}, False),
        ],
    )
    @pytest.mark.filterwarnings("ignore:no quantized form")
    def test_selects(self, model, spec, is_quantized):
        made = dynquant.quantize_dynamic(model, spec)
        assert isinstance(made.experts, dynquant.nn.Experts) == is_quantized

    def test_its_own_type(self, model):
        made = dynquant.quantize_dynamic(model, {type(model.experts)})
        assert isinstance(made.experts, dynquant.nn.Experts)
        assert isinstance(made.gate, nn.Linear)

    def test_not_finite(self, model):
        with torch.no_grad():
            model.experts.down_proj[1, 2, 3] = torch.nan
        with pytest.raises(ValueError, match=r"experts\.down_proj holds NaN or Inf"):
            dynquant.quantize_dynamic(model)

    def test_a_class_with_another_forward(self):
        class Other(type(experts())):
            def forward(self, x, chosen, weights):
                return x

        with pytest.warns(UserWarning, match="has a forward other than"):
            made = dynquant.quantize_dynamic(Other(Config()))
        assert type(made) is Other

    def test_parameters_that_are_not_declared(self):
        mod = experts()
        mod.extra = nn.Parameter(torch.zeros(3))
        with pytest.warns(UserWarning, match="other parameters than its class declares: extra"):
            assert dynquant.quantize_dynamic(mod) is not mod

    def test_keep_float_below_and_compare(self, model):
        arguments = (torch.randn(9, HIDDEN),)
        for limit, kept in ((20, False), (90, True)):
            with pytest.warns(UserWarning, match="left in float") if kept else nullcontext():
                made = dynquant.quantize_dynamic(
                    Called(model), keep_float_below=limit, example_inputs=arguments
                )
            assert isinstance(made.model.experts, dynquant.nn.Experts) != kept
        compared = dynquant.compare(
            Called(model), dynquant.quantize_dynamic(Called(model)), *arguments
        )
        (row,) = (row for row in compared.rows if row["name"] == "model.experts")
        assert row["type"] == "Experts" and 30 < row["snr_db"] < 60


class Called(nn.Module):
    """Routes and calls."""

    def __init__(self, model):
        super().__init__()
        self.model = copy.copy(model)
        self.model.__dict__.pop("forward", None)

    def forward(self, x):
        weights, chosen = self.model.gate(x).softmax(-1).topk(2)
        return self.model.experts(x, chosen, weights)
