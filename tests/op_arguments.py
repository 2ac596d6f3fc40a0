"""One valid call of each op: what the tests of errors, fakes, schemas and the like start from."""

import math

import torch

M, N, K = 3, 5, 7
TABLE = ("indices", "rows", "qparams", "bits", "dim")
OPS = {
    "quantize_weight": ("weight", "per_channel"),
    "pack_weight": ("qweight",),
    "unpack_weight": ("packed", "n", "k"),
    "choose_qparams": ("x", "per_token", "symmetric", "bits"),
    "quantize_activation": ("x", "per_token", "symmetric", "bits"),
    "quantize_with": ("x", "scale", "zero_point", "symmetric", "bits"),
    "int_mm": ("q", "zero_point", "packed", "n"),
    "rescale": ("acc", "scale", "weight_scale", "bias", "dtype"),
    "scaled_mm": ("q", "scale", "zero_point", "packed", "weight_scale", "bias", "dtype"),
    "linear_dynamic": (
        *("x", "packed", "weight_scale", "bias"),
        *("per_token", "symmetric", "activation_bits"),
    ),
    "linear_half": ("x", "half_weight", "bias"),
    "quantize_embedding": ("weight", "bits"),
    "embedding": (*TABLE, "dtype"),
    "embedding_sum": (
        *("indices", "table", "type_indices", "type_table", "position_table"),
        *("norm", "norm_weight", "norm_bias", "norm_eps"),
    ),
    "embedding_bag": (
        *(*TABLE, "dtype", "offsets", "per_sample_weights"),
        *("mode", "include_last_offset", "padding_idx"),
    ),
}
_INT8 = (
    *("packed_ih", "weight_scale_ih", "bias_ih"),
    *("packed_hh", "weight_scale_hh", "bias_hh"),
)
_HALF = ("weight_ih", "bias_ih", "weight_hh", "bias_hh")
_STEPS = ("batch_sizes", "reverse")
_SCHEME = ("per_token", "symmetric", "activation_bits")
_MIXED = (
    *("weight_ih", "weight_scale_ih", "bias_ih"),
    *("weight_hh", "weight_scale_hh", "bias_hh"),
)
_SCHEMES = tuple(f"{one}_{part}" for part in ("ih", "hh") for one in _SCHEME)
RECURRENT = {
    "lstm_dynamic": (
        *("x", "h0", "c0", *_INT8, "packed_hr", "weight_scale_hr"),
        *(*_STEPS, *_SCHEME),
    ),
    "gru_dynamic": ("x", "h0", *_INT8, *_STEPS, *_SCHEME),
    "rnn_dynamic": ("x", "h0", *_INT8, "relu", *_STEPS, *_SCHEME),
    "lstm_half": ("x", "h0", "c0", *_HALF, "weight_hr", *_STEPS),
    "gru_half": ("x", "h0", *_HALF, *_STEPS),
    "rnn_half": ("x", "h0", *_HALF, "relu", *_STEPS),
    "lstm_mixed": (
        *("x", "h0", "c0", *_MIXED, "weight_hr", "weight_scale_hr", *_STEPS, *_SCHEMES),
        *("per_token_hr", "symmetric_hr", "activation_bits_hr"),
    ),
    "gru_mixed": ("x", "h0", *_MIXED, *_STEPS, *_SCHEMES),
    "rnn_mixed": ("x", "h0", *_MIXED, "relu", *_STEPS, *_SCHEMES),
}
_NORM = ("", "_weight", "_bias", "_eps")
_ENDS = (
    "residual",
    *(f"norm_before{part}" for part in _NORM),
    *(f"norm_after{part}" for part in _NORM),
)


def _weights(*parts):
    return [f"{kind}_{part}" for part in parts for kind in ("packed", "weight_scale", "bias")]


_KEPT, _SOFTMAX = ("key_scale", "value_scale"), ("softcap", "sinks")
_ADDED = ("mask", "position_bias", "is_causal", "scale")
BLOCKS = {
    "activation": ("x", "function"),
    "layer_norm": ("x", "weight", "bias", "eps"),
    "rms_norm": ("x", "weight", "eps", "plus_one"),
    "softmax": ("x",),
    "linear_block": (
        *("x", "packed", "weight_scale", "bias", "activation"),
        *(*_ENDS, *_SCHEME, "residual_last"),
    ),
    "feed_forward": (
        *("x", *_weights("up", "gate", "down"), "activation", "split"),
        *(*_ENDS, *_SCHEME, "residual_last"),
    ),
    "rotary": ("x", "cos", "sin", "interleaved"),
    "scaled_dot_product": ("query", "key", "value", *_ADDED, "integers", *_KEPT, *_SOFTMAX),
    "relative_attention": (
        *("query", "key", "value", "position_key", "position_query"),
        *("mask", "scale", "integers"),
    ),
    "query_key_value": (
        *("x", *_weights("q", "k", "v"), "heads", "kv_heads", "cos", "sin"),
        *("norm_q_weight", "norm_q_eps", "norm_k_weight", "norm_k_eps"),
        *(*(f"norm_before{part}" for part in _NORM), *_SCHEME, "heads_plus_one"),
        *("interleaved", "gated"),
    ),
    "attend": (
        *("x", "key", "value", *_weights("out", "q"), "mask", "position_bias", "scale"),
        *(*_KEPT, *_ENDS, *_SCHEME, "residual_last", "is_causal", "gate", *_SOFTMAX),
    ),
    "attention": (
        *("x", *_weights("q", "k", "v", "out"), "heads", "kv_heads", *_ADDED, "cos", "sin"),
        *("integers", *_ENDS, *_SCHEME, "residual_last", "interleaved"),
    ),
    "encoder": (
        *("x", "weights", "heads", "kv_heads", "activation", "eps", "norm_first", "mask"),
        *("integers", *_SCHEME),
    ),
}
GROUPED = {
    "linear_grouped": ("x", "counts", "weight", "weight_scale", "bias", "n", *_SCHEME),
    "experts": (
        *("x", "chosen", "chosen_weights"),
        *("weight_up", "weight_scale_up", "bias_up", "n_up"),
        *("weight_down", "weight_scale_down", "bias_down", "n_down"),
        *("activation", "split", *_SCHEME),
    ),
}
CONVOLUTIONS = {
    "conv1d_dynamic": (
        *("x", "packed", "weight_scale", "bias", "kernel_size", "stride"),
        *("padding_left", "padding_right", "dilation", *_SCHEME),
    ),
}
_RULE = "query", "key", "value", "decay", "beta", "state", "scale", "normalize"
_SCAN = "x", "dt", "A", "B", "C", "D", "state"
MIXERS = {
    "gated_delta_rule": _RULE,
    "gated_delta_rule_": _RULE,
    "selective_scan": _SCAN,
    "selective_scan_": _SCAN,
    "causal_conv1d": ("x", "weight", "bias", "state", "activation"),
}
ALL_OPS = OPS | RECURRENT | BLOCKS | GROUPED | CONVOLUTIONS | MIXERS
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
CPU_ONLY = ("linear_half", "quantize_embedding", "embedding", "embedding_bag", "embedding_sum")
CUDA_OPS = tuple(name for name in OPS if name not in CPU_ONLY)


def op_named(name):
    return getattr(torch.ops.dynquant, name).default


def valid_arguments(m=(M,), n=N, k=K, dtype=torch.float32, per_channel=True):
    """A value for every argument name of OPS; m is the leading shape."""
    generator = torch.Generator().manual_seed(0)

    def integers(low, high, shape, dtype):
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    qweight = integers(-127, 128, (n, k), torch.int8)
    return {
        "weight": torch.randn(n, k, generator=generator).to(dtype),
        "half_weight": torch.randn(n, k, generator=generator).to(torch.float16),
        "indices": integers(0, max(n, 1), (4 if n else 0,), torch.int64),
        "rows": integers(0, 256, (n, k), torch.uint8),
        "qparams": torch.randn(n, 2, generator=generator),
        "table": torch.randn(n, k, generator=generator).to(dtype),
        "type_indices": integers(0, 2, (4 if n else 0,), torch.int64),
        "type_table": torch.randn(2, k, generator=generator).to(dtype),
        "position_table": torch.randn(4, k, generator=generator).to(dtype),
        "norm": 1,
        "norm_weight": torch.randn(k, generator=generator).to(dtype),
        "norm_bias": torch.randn(k, generator=generator).to(dtype),
        "norm_eps": 1e-5,
        "bits": 8,
        "dim": k,
        "offsets": torch.zeros(2, dtype=torch.int64),
        "per_sample_weights": None,
        "mode": 0,
        "include_last_offset": False,
        "padding_idx": -1,
        "qweight": qweight,
        "packed": torch.ops.dynquant.pack_weight(qweight),
        "n": n,
        "k": k,
        "x": torch.randn(*m, k, generator=generator).to(dtype),
        "q": integers(0, 256, (*m, k), torch.uint8),
        "acc": integers(-999, 999, (*m, n), torch.int32),
        "scale": torch.rand(m, generator=generator) + 0.5,
        "zero_point": integers(0, 256, m, torch.int32),
        "weight_scale": torch.rand(n if per_channel else 1, generator=generator) + 0.5,
        "bias": torch.randn(n, generator=generator).to(dtype),
        "dtype": dtype,
        "per_channel": True,
        "per_token": True,
        "symmetric": False,
        "activation_bits": 8,
    }


def valid_recurrent_arguments(name, m=(M,), n=N, k=K, dtype=torch.float32, per_channel=True):
    """A value for every argument name of RECURRENT[name]: two steps of prod(m) rows, n states."""
    generator = torch.Generator().manual_seed(0)
    cell = name.partition("_")[0]
    batch, columns = math.prod(m), GATES[cell] * n
    values = {
        "x": torch.randn(2, batch, k, generator=generator).to(dtype),
        "h0": torch.randn(batch, n, generator=generator).to(dtype),
        "c0": torch.randn(batch, n, generator=generator).to(dtype),
        "relu": False,
        "batch_sizes": None,
        "reverse": False,
        "per_token": True,
        "symmetric": False,
        "activation_bits": 8,
    }
    for part, rows, depth in (("ih", columns, k), ("hh", columns, n), ("hr", n, n)):
        weight = torch.randint(-127, 128, (rows, depth), generator=generator).to(torch.int8)
        scale = (torch.rand(rows if per_channel else 1, generator=generator) + 0.5) / 500
        values[f"packed_{part}"] = torch.ops.dynquant.pack_weight(weight)
        values[f"weight_scale_{part}"] = scale
        values[f"weight_{part}"] = (weight * 0.002).half()
        values[f"bias_{part}"] = torch.randn(rows, generator=generator).to(dtype)
        values |= {f"per_token_{part}": True, f"symmetric_{part}": False}
        values[f"activation_bits_{part}"] = 16
    if name.endswith("_mixed"):  # int8, fp32, int8
        values |= {"weight_ih": values["packed_ih"], "weight_hr": values["packed_hr"]}
        values |= {"weight_hh": values["weight_hh"].float(), "weight_scale_hh": None}
    return values


def valid_block_arguments(name, m=(M,), n=N, k=K, dtype=torch.float32, per_channel=True):
    """A value for every argument of BLOCKS[name]: rows of shape m, or prod(m) sequences of four."""
    generator = torch.Generator().manual_seed(0)

    def floats(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    def weight(part, rows, depth):
        values = torch.randint(-127, 128, (rows, depth), generator=generator).to(torch.int8)
        scale = (torch.rand(rows if per_channel else 1, generator=generator) + 0.5) / 500
        return {
            f"packed_{part}": torch.ops.dynquant.pack_weight(values),
            f"weight_scale_{part}": scale,
            f"bias_{part}": floats(rows),
        }

    values = {
        "x": floats(*m, k),
        "eps": 1e-5,
        "weight": floats(k),
        "bias": floats(k),
        "function": 1,
        "activation": 1,
        "split": 0,
        "residual": floats(*m, k),
        "per_token": True,
        "symmetric": False,
        "activation_bits": 8,
        **dict.fromkeys(("plus_one", "heads_plus_one", "residual_last"), False),
        **dict.fromkeys(("interleaved", "gated"), False),
        **weight("up", n, k),
        **weight("gate", n, k),
        **weight("down", k, n),
    }
    for end in ("before", "after"):
        norm = {"": 1, "_weight": floats(k), "_bias": floats(k), "_eps": 1e-5}
        values |= {f"norm_{end}{part}": value for part, value in norm.items()}
    batch, rows, heads, dim = math.prod(m), 4, 2, 2 * (n % 8 + 1)
    values |= {
        "query": floats(batch, rows, heads, dim),
        "key": floats(batch, rows, heads, dim),
        "value": floats(batch, rows, heads, dim),
        "position_key": floats(2 * rows - 1, heads, dim),
        "position_query": floats(2 * rows - 1, heads, dim),
        "mask": torch.ones(1, 1, rows, rows, dtype=torch.bool),
        "position_bias": floats(1, heads, rows, rows),
        "is_causal": False,
        "scale": None,
        "integers": True,
        "key_scale": None,
        "value_scale": None,
        "softcap": 5.0,
        "sinks": floats(heads),
        "cos": floats(rows, dim),
        "sin": floats(rows, dim),
        "heads": heads,
        "kv_heads": heads,
    }
    for part in "qkv":
        values |= weight(part, heads * dim, k)
    values |= weight("out", k, heads * dim)
    if name == "linear_block":
        made = weight("of", n, k)
        values |= {one.removesuffix("_of"): value for one, value in made.items()}
        values |= {"residual": floats(*m, n)}
        values |= {f"norm_after_{part}": floats(n) for part in ("weight", "bias")}
    if name == "rotary":
        values["x"] = values["query"]
    if name == "attend":
        values["gate"] = floats(batch, rows, heads, dim)
        for kept in ("key", "value"):  # in int8; scaled_dot_product has floats
            q = torch.randint(-127, 128, (batch, heads, rows, dim), generator=generator)
            values[kept] = q.to(torch.int8)
            values[f"{kept}_scale"] = torch.rand(batch, heads, rows, generator=generator) / 50
    if name in ("attend", "attention", "encoder", "query_key_value"):
        values["x"] = floats(batch, rows, k)
        values["residual"] = floats(batch, rows, k)
    if name == "query_key_value":
        values |= weight("q", 2 * heads * dim, k) | {"gated": True}
        values |= {"cos": floats(rows, dim // 2), "sin": floats(rows, dim // 2)}
        values["interleaved"] = True
        values |= {f"norm_{part}_weight": floats(dim) for part in "qk"}
        values |= {f"norm_{part}_eps": 1e-6 for part in "qk"}
    if name == "encoder":
        parts = _weights("q", "k", "v", "out", "up", "down")
        norms = ("norm_before_weight", "norm_before_bias", "norm_after_weight", "norm_after_bias")
        values["weights"] = 2 * [values[part] for part in (*parts, *norms)]
        values["norm_first"] = False
    return values


def valid_grouped_arguments(m=(M,), n=N, k=K, dtype=torch.float32, per_channel=True, half=False):
    """A value for every argument of GROUPED: prod(m) rows in three groups, one of them empty.

    Three rows and more leave one in no group. half: weights in 16 bits.
    """
    generator = torch.Generator().manual_seed(0)
    rows = math.prod(m)
    first = rows // 2
    counts = torch.tensor([first, 0, rows - first - (rows > 2)])
    groups = len(counts)

    def of_groups(n, k):
        weight = torch.randint(-127, 128, (groups, n, k), generator=generator).to(torch.int8)
        scale = torch.rand(groups, n if per_channel else 1, generator=generator) + 0.5
        bias = torch.randn(groups, n, generator=generator).to(dtype)
        return weight, scale, bias

    def packed(weight):
        return torch.stack([torch.ops.dynquant.pack_weight(one) for one in weight])

    weight, scale, bias = of_groups(n, k)
    up, scale_up, bias_up = of_groups(2 * n, k)
    down, scale_down, bias_down = of_groups(k, n)
    return {
        "x": torch.randn(rows, k, generator=generator).to(dtype),
        "counts": counts,
        "weight": weight.to(torch.bfloat16) if half else packed(weight),
        "weight_scale": None if half else scale,
        "bias": bias,
        "n": n,
        "chosen": torch.arange(2 * rows).view(rows, 2) % (groups + 1),  # the last is none
        "chosen_weights": torch.rand(rows, 2, generator=generator).to(dtype),
        **{"weight_up": packed(up), "weight_scale_up": scale_up / 500},
        **{"bias_up": bias_up, "n_up": 2 * n},
        **{"weight_down": packed(down), "weight_scale_down": scale_down / 500},
        **{"bias_down": bias_down, "n_down": k},
        "activation": 3,
        "split": 1,
        "per_token": True,
        "symmetric": False,
        "activation_bits": 8,
    }


def valid_convolution_arguments(m=(M,), n=N, k=K, dtype=torch.float32, per_channel=True):
    """A value for every argument of CONVOLUTIONS: prod(m) sequences of k channels."""
    kernel_size = 3
    values = valid_arguments((), n, kernel_size * k, dtype, per_channel)
    generator = torch.Generator().manual_seed(1)
    return values | {
        "x": torch.randn(math.prod(m), k, 9, generator=generator).to(dtype),
        "kernel_size": kernel_size,
        "stride": 2,
        "padding_left": 1,
        "padding_right": 2,
        "dilation": 2,
    }


def valid_mixer_arguments(name, m=(M,), n=N, k=K, dtype=torch.float32, per_channel=True):
    """A value for every argument of MIXERS[name]: prod(m) sequences of three tokens, two heads.

    n: what comes out of a head; k: features of its keys, states of its values, or channels.
    """
    generator = torch.Generator().manual_seed(0)
    batch, rows, heads = math.prod(m), 3, 2

    def floats(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    if name == "causal_conv1d":
        return {
            "x": floats(batch, rows, k),
            "weight": floats(k, 4),
            "bias": floats(k),
            "state": floats(batch, k, 4),
            "activation": 3,
        }
    k = max(k, 1)
    if name.startswith("selective_scan"):
        return {
            "x": floats(batch, rows, heads, max(n, 1)),
            "dt": floats(batch, rows, heads).abs(),
            "A": -floats(heads).abs(),
            "B": floats(batch, rows, 1, k),
            "C": floats(batch, rows, 1, k),
            "D": floats(heads),
            "state": floats(batch, heads, max(n, 1), k).float(),
        }
    return {
        "query": floats(batch, rows, heads, k),
        "key": floats(batch, rows, heads, k),
        "value": floats(batch, rows, heads, n),
        "decay": -floats(batch, rows, heads).abs(),
        "beta": floats(batch, rows, heads).sigmoid(),
        "state": floats(batch, heads, k, n).float(),
        "scale": None,
        "normalize": True,
    }


def valid_call(name, **sizes):
    """A value for every argument of any op of ALL_OPS."""
    if name in GROUPED:
        return valid_grouped_arguments(**sizes)
    if name in CONVOLUTIONS:
        return valid_convolution_arguments(**sizes)
    if name in MIXERS:
        return valid_mixer_arguments(name, **sizes)
    if name in BLOCKS:
        return valid_block_arguments(name, **sizes)
    if name in RECURRENT:
        return valid_recurrent_arguments(name, **sizes)
    return valid_arguments(**sizes)


def call(name, values):
    """What an op gives; one that writes to its state gets a copy of it."""
    if name.endswith("_") and isinstance(values["state"], torch.Tensor):
        values = values | {"state": values["state"].clone()}
    return op_named(name)(*(values[argument] for argument in ALL_OPS[name]))
