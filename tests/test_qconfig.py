"""Every form of a config, and what is said about wrong ones."""

import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dynquant
from dynquant.qconfig import DTYPES, QConfig, parse_qconfig

Q8 = {"dtype": torch.qint8}
TENSOR_WEIGHT = QConfig(weight="per_tensor")


def test_defaults():
    assert QConfig() == QConfig("per_channel", "per_token", False, torch.qint8, None)
    assert parse_qconfig({}) == QConfig()


def test_is_a_value():
    config = QConfig(activation=dynquant.per_tensor, symmetric=True)
    assert hash(config) == hash(QConfig("per_channel", "per_tensor", True))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(AttributeError):
        config.symmetric = False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": "per_token"}, "weight is 'per_token'; allowed: per_channel, per_tensor"),
        ({"activation": "per_channel"}, "activation is 'per_channel'; allowed: per_token"),
        ({"dtype": torch.int8}, "dtype is torch.int8; allowed: torch.qint8"),
        ({"symmetric": 1}, "symmetric must be a bool, not 1"),
        ({"dynamic": "yes"}, "dynamic must be a bool or None, not 'yes'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        QConfig(**arguments)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (dynquant.per_channel, QConfig()),
        (dynquant.per_token, QConfig()),
        (dynquant.per_tensor, TENSOR_WEIGHT),
        (QConfig(symmetric=True), QConfig(symmetric=True)),
        ({"activation": Q8, "weight": Q8}, QConfig()),
        ({"activation": {"dtype": torch.quint8}}, QConfig()),
        ({"dtype": torch.quint8}, QConfig(dtype=torch.quint8)),
        ({"qscheme": dynquant.per_tensor}, TENSOR_WEIGHT),
        ({"qscheme": torch.per_tensor_symmetric}, TENSOR_WEIGHT),
        ({"weight": {"qscheme": dynquant.per_tensor}}, TENSOR_WEIGHT),
        (
            {"weight": {"qscheme": dynquant.per_tensor}, "qscheme": dynquant.per_channel},
            TENSOR_WEIGHT,
        ),
        (
            {"activation": {"qscheme": dynquant.per_tensor}},
            QConfig(activation="per_tensor"),
        ),
        (
            {"activation": {"qscheme": torch.per_tensor_affine}},
            QConfig(activation="per_tensor"),
        ),
        (
            {"activation": {"qscheme": torch.per_tensor_symmetric}},
            QConfig(activation="per_tensor", symmetric=True),
        ),
        ({"dynamic": True}, QConfig(dynamic=True)),
        ({"dynamic": False}, QConfig(dynamic=False)),
        (
            {"weight": {"dtype": torch.quint8, "qscheme": torch.per_channel_affine_float_qparams}},
            QConfig(dtype=torch.quint8),
        ),
    ],
)
def test_forms(config, expected):
    assert parse_qconfig(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"wieght": Q8}, r"here has the key 'wieght'; allowed: activation, weight"),
        ({"weight": {"bits": 4}}, r"here\['weight'\] has the key 'bits'"),
        ({"weight": torch.qint8}, r"here\['weight'\] is torch.qint8; expected a dict"),
        ({"weight": {"dtype": torch.int8}}, "here: the weight's dtype is torch.int8"),
        ({"weight": {"dtype": "qint8"}}, "here: the weight's dtype is 'qint8'"),
        ({"activation": {"dtype": torch.float16}}, r"here\['activation'\]\['dtype'\].*float16"),
        ({"qscheme": "per_row"}, r"here\['qscheme'\] is 'per_row'"),
        ({"qscheme": torch.per_tensor_affine}, "per_tensor_affine, but weights are symmetric"),
        ({"weight": {"qscheme": torch.per_channel_affine}}, "but weights are symmetric"),
        ({"qscheme": dynquant.per_token}, r"here\['qscheme'\] of a weight is 'per_token'"),
        ({"activation": {"qscheme": torch.per_channel_symmetric}}, "of an activation is"),
        ({"dynamic": 1}, "dynamic must be a bool or None"),
        ("per_row", "here is 'per_row'; allowed: per_channel"),
        (torch.float32, "here is torch.float32; allowed: torch.qint8"),
        (True, "here is True; expected"),
        (("per_channel",), "expected a dynquant.QConfig"),
    ],
)
def test_wrong_forms(config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        parse_qconfig(config, name="here")


def test_a_dtype_in_the_config_beats_the_argument():
    assert parse_qconfig({}, torch.float16).dtype is torch.float16
    assert parse_qconfig(dynquant.per_tensor, torch.float16).dtype is torch.float16
    assert parse_qconfig({"weight": Q8}, torch.float16).dtype is torch.qint8
    assert parse_qconfig({"dtype": torch.bfloat16}).dtype is torch.bfloat16
    assert parse_qconfig(QConfig(), torch.float16).dtype is torch.qint8


WEIGHT_QSCHEMES = {
    dynquant.per_channel: "per_channel",
    dynquant.per_tensor: "per_tensor",
    torch.per_channel_symmetric: "per_channel",
    torch.per_tensor_symmetric: "per_tensor",
}
ACTIVATION_QSCHEMES = {
    dynquant.per_token: ("per_token", False),
    dynquant.per_tensor: ("per_tensor", False),
    torch.per_tensor_affine: ("per_tensor", False),
    torch.per_tensor_symmetric: ("per_tensor", True),
}


@given(
    weight=st.none() | st.sampled_from(list(WEIGHT_QSCHEMES)),
    top=st.none() | st.sampled_from(list(WEIGHT_QSCHEMES)),
    activation=st.none() | st.sampled_from(list(ACTIVATION_QSCHEMES)),
    dtype=st.sampled_from([None, torch.qint8, torch.quint8]),
    dynamic=st.sampled_from([None, True, False]),
)
def test_dicts(weight, top, activation, dtype, dynamic):
    config = {"weight": {}, "activation": {}}
    if weight is not None:
        config["weight"]["qscheme"] = weight
    if top is not None:
        config["qscheme"] = top
    if activation is not None:
        config["activation"]["qscheme"] = activation
    if dtype is not None:
        config["activation"]["dtype"] = dtype
    if dynamic is not None:
        config["dynamic"] = dynamic
    governing = dynquant.per_channel if weight is None and top is None else weight or top
    scheme, symmetric = ACTIVATION_QSCHEMES[activation or dynquant.per_token]
    expected = QConfig(WEIGHT_QSCHEMES[governing], scheme, symmetric, torch.qint8, dynamic)
    assert parse_qconfig(config) == expected


@given(config=st.recursive(
    st.none() | st.booleans() | st.text(max_size=4) | st.sampled_from(DTYPES),
    lambda inner: st.dictionaries(
        st.sampled_from(["weight", "activation", "qscheme", "dtype", "dynamic", "x"]), inner
    ),
))  # fmt: skip
def test_anything_is_a_config_or_a_clear_error(config):
    try:
        assert isinstance(parse_qconfig(config), QConfig)
    except (TypeError, ValueError) as error:
        assert str(error)


class TestTorchQConfigs:
    @pytest.fixture
    def torch_qconfig(self):
        return pytest.importorskip("torch.ao.quantization.qconfig")

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("default_dynamic_qconfig", QConfig("per_tensor", "per_tensor", dynamic=True)),
            ("per_channel_dynamic_qconfig", QConfig(activation="per_tensor", dynamic=True)),
            ("default_qconfig", QConfig("per_tensor", "per_tensor")),
            ("default_per_channel_qconfig", QConfig(activation="per_tensor")),
            ("default_weight_only_qconfig", QConfig("per_tensor")),
            ("default_dynamic_qat_qconfig", QConfig("per_tensor", "per_tensor", dynamic=True)),
            ("float16_dynamic_qconfig", QConfig(dtype=torch.float16, dynamic=True)),
            ("float_qparams_weight_only_qconfig", QConfig(dtype=torch.quint8)),
            ("float_qparams_weight_only_qconfig_4bit", QConfig(dtype=torch.quint4x2)),
        ],
    )
    def test_named(self, torch_qconfig, name, expected):
        assert parse_qconfig(getattr(torch_qconfig, name)) == expected

    def test_refused(self, torch_qconfig):
        config = torch_qconfig.default_activation_only_qconfig
        with pytest.raises(ValueError, match="quantizes no weight"):
            parse_qconfig(config)

    def test_narrow_range_is_refused(self, torch_qconfig):
        observer = pytest.importorskip("torch.ao.quantization.observer")
        weight = observer.MinMaxObserver.with_args(
            dtype=torch.qint8, quant_min=-8, quant_max=7, qscheme=torch.per_tensor_symmetric
        )
        config = torch_qconfig.QConfig(activation=torch.nn.Identity, weight=weight)
        with pytest.raises(ValueError, match=r"weight asks for the range -8 to 7"):
            parse_qconfig(config)

    def test_reading_warns_of_nothing(self, torch_qconfig):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            parse_qconfig(torch_qconfig.default_dynamic_qconfig)
            parse_qconfig(torch_qconfig.get_default_qconfig("fbgemm"))


def test_bits_of_activations():
    assert parse_qconfig({"activation": {"bits": 16}}) == QConfig(activation_bits=16)
    assert parse_qconfig({"activation": {"bits": 8}}) == QConfig()


def test_a_dtype_alone():
    assert parse_qconfig(torch.bfloat16) == QConfig(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="torch.float32; allowed: torch.qint8"):
        parse_qconfig(torch.float32)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"activation_bits": 4}, ValueError, "activation_bits is 4; allowed: 8, 16"),
        ({"activation_bits": "16"}, TypeError, "activation_bits must be 8 or 16, not '16'"),
        ({"activation_bits": True}, TypeError, "activation_bits must be 8 or 16, not True"),
        ({"activation_bits": 16, "symmetric": True}, ValueError, "symmetric activations have 8"),
        ({"activation_bits": 16, "dtype": torch.float16}, ValueError, "activations stay float"),
    ],
)
def test_bits_that_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        QConfig(**arguments)
