"""Files that say what is not so: an error that names it, and nothing changed."""

import copy
import io
import itertools

import pytest
import torch
from compare import assert_same, assert_same_state
from recurrent import every_module
from torch import nn

import dynquant

SCALES = (-1.0, 0.0, float("inf"), float("-inf"), float("nan"))


def modules():
    torch.manual_seed(0)
    floats = {
        **every_module(),
        "linear": nn.Linear(12, 7),
        "attention": nn.MultiheadAttention(8, 2),
        "encoder": nn.TransformerEncoderLayer(8, 2, 16),
    }
    made = {name: dynquant.quantize_dynamic(module) for name, module in floats.items()}
    tables = {"embedding": nn.Embedding(9, 6), "bag": nn.EmbeddingBag(9, 6)}
    for (name, table), dtype in itertools.product(tables.items(), (torch.quint8, torch.quint4x2)):
        made[f"{name} {dtype}"] = dynquant.quantize_dynamic(table, dtype=dtype)
    stub = dynquant.QuantStub(dynquant.QConfig())
    prepared = dynquant.prepare(nn.Sequential(stub, nn.Linear(4, 4)))
    prepared(torch.randn(2, 4))
    made["calibrated stub"] = dynquant.convert(prepared)
    return made


MODULES = list(modules())


def is_of_scales(key):
    return key.endswith(("scale", "qparams"))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("assign", [False, True])
def test_scales(name, assign):
    module = modules()[name]
    state = copy.deepcopy(module.state_dict())
    keys = [key for key in state if is_of_scales(key)]
    assert keys
    for key, value in itertools.product(keys, SCALES):
        wrong = copy.deepcopy(state)
        wrong[key].reshape(-1)[0] = value
        with pytest.raises(RuntimeError, match=rf"\b{key} holds"):
            module.load_state_dict(wrong, assign=assign)
        assert_same_state(module, state)


@pytest.mark.parametrize("name", ["embedding torch.quint8", "bag torch.quint4x2"])
def test_offsets_of_tables(name):
    module = modules()[name]
    wrong = copy.deepcopy(module.state_dict())
    wrong["weight_qparams"][3, 1] = float("nan")
    with pytest.raises(RuntimeError, match="weight_qparams holds NaN"):
        module.load_state_dict(wrong)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("version", [0, -1, 99, 1 << 62])
def test_versions(name, version):
    module = modules()[name]
    state = copy.deepcopy(module.state_dict())
    for key in [key for key in state if key.rpartition(".")[2] == "version"]:
        with pytest.raises(RuntimeError, match=f"{key} is {version}"):
            module.load_state_dict(state | {key: torch.tensor(version)})


def lies(packed):
    """The packed weight with headers that say another N or K, another layout, or nothing."""
    for position, value in itertools.product((8, 16), (0, -1, 3, 1 << 20, 1 << 40, (1 << 63) - 1)):
        wrong = packed.clone()
        wrong[position : position + 8] = torch.tensor([value]).view(torch.int8)
        yield wrong
    for position, value in ((0, 1), (4, 7)):
        wrong = packed.clone()
        wrong[position] = value
        yield wrong
    yield packed[:-1]
    yield packed[:64]
    yield packed[:0]


def saved_and_loaded(saver, loader, value):
    file = io.BytesIO()
    saver(value, file)
    file.seek(0)
    return loader(file)


def test_exported_programs():
    layer, x = dynquant.quantize_dynamic(nn.Linear(12, 70)), torch.randn(3, 12)
    program = torch.export.export(layer, (x,))
    module = saved_and_loaded(torch.export.save, torch.export.load, program).module()
    assert_same(module(x), layer(x))
    for wrong in lies(layer.packed):
        module.packed = wrong
        with pytest.raises(RuntimeError, match="packed"):
            module(x)


def test_traces():
    layer, x = dynquant.quantize_dynamic(nn.LSTM(12, 7)), torch.randn(3, 2, 12)
    trace = torch.jit.trace(layer, (x,))
    for name in ("packed_ih_l0", "packed_hh_l0"):
        loaded = saved_and_loaded(torch.jit.save, torch.jit.load, trace)
        assert_same(loaded(x)[0], layer(x)[0])
        for wrong in lies(getattr(layer, name)):
            setattr(loaded, name, wrong)
            with pytest.raises(RuntimeError, match="packed"):
                loaded(x)


def test_regular_expressions_that_backtrack(monkeypatch):
    """In the config.json of somebody else's model."""
    transformers = pytest.importorskip("transformers")
    import dynquant.transformers as integration
    from dynquant.transformers import module_names

    monkeypatch.setattr(module_names, "_PATTERN_SECONDS", 0.2)
    model = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            vocab_size=8,
        )
    )
    for pattern in (r"(.|..)*[XY]", r"(?:(.)|(..)|(...))+[XY]"):
        config = integration.DynquantConfig(modules_to_not_convert=[pattern])
        with pytest.raises(ValueError, match="modules_to_not_convert has .* takes too long"):
            config.spec_for(model)
    with pytest.raises(ValueError, match="not a regular expression"):
        integration.DynquantConfig(modules_to_not_convert=["(" * 5000 + ")" * 5000])
