"""experts: the bits of its parts, by the reference, for each token alone."""

import numpy as np
import pytest
import reference as ref
import reference_float
import torch
from compare import assert_same, widened
from drawn import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from op_arguments import GROUPED, call, valid_grouped_arguments
from test_ops_blocks import drawn_scheme, name_of, threads  # noqa: F401
from test_ops_grouped import some, weights

from dynquant.ops.blocks import ACTIVATIONS

OPS = torch.ops.dynquant
F = np.float32


def rounded(values, dtype):
    return ref.round_to(values.astype(F), name_of(dtype))


def expected(x, chosen, chosen_weights, up, down, activation, split, schemes):
    """up, down: weight, scale and bias of all experts, as the reference takes them."""
    name, product_type = name_of(x.dtype), torch.promote_types(x.dtype, chosen_weights.dtype)
    rows, by, (tokens, choices) = widened(x), widened(chosen_weights), chosen.shape
    per_token, symmetric, bits = schemes
    total = np.zeros((tokens, down[0].shape[1]), F)
    for expert in range(len(up[0])):
        places = [(t, c) for t in range(tokens) for c in range(choices) if chosen[t, c] == expert]
        if not places:
            continue

        def product(rows, part, expert=expert):
            weight, scale, bias = (one if one is None else one[expert] for one in part)
            return ref.linear_dynamic(
                *(rows, weight, scale, bias, per_token, symmetric, name, bits)
            )

        y = product(rows[[t for t, _ in places]], up)
        if split:
            halves = np.split(y, 2, axis=1)
            first, second = halves if split == 1 else halves[::-1]
            y = rounded(reference_float.activation(first, activation, name) * second, x.dtype)
        else:
            y = reference_float.activation(y, activation, name)
        for (t, c), row in zip(places, product(y, down), strict=True):
            total[t] += rounded(row * by[t, c], product_type)
    return rounded(total, x.dtype)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_is_the_specification(isa, threads, seed):  # noqa: F811
    rng = np.random.default_rng(seed)
    tokens, choices = int(rng.choice([0, 1, 2, 7, 33])), int(rng.choice([1, 2, 5]))
    count, k = int(rng.integers(1, 7)), int(rng.choice([1, 15, 64, 130]))
    inner, n = int(rng.choice([1, 8, 33])), int(rng.choice([1, 16, 65]))
    split, dtype = int(rng.integers(3)), some(rng, DTYPES)
    x = torch.from_numpy(rng.standard_normal((tokens, k)).astype(F)).to(dtype)
    chosen = torch.from_numpy(rng.integers(0, count + 2, (tokens, choices)))
    by = torch.from_numpy(rng.standard_normal((tokens, choices)).astype(F)).to(some(rng, DTYPES))
    given, parts = [], []
    for rows, depth in ((inner * (2 if split else 1), k), (n, inner)):
        weight, scale, *own = weights(
            rng, some(rng, ("per_channel", "per_tensor")), count, rows, depth
        )
        bias = None
        if rng.random() < 0.5:
            bias = torch.from_numpy(rng.standard_normal((count, rows)).astype(F)).to(dtype)
        given += weight, scale, bias, rows
        parts.append((*own, None if bias is None else widened(bias)))
    name, schemes = some(rng, list(ACTIVATIONS)), drawn_scheme(rng)
    found = OPS.experts(x, chosen, by, *given, ACTIVATIONS[name], split, *schemes)
    assert found.shape == (tokens, n) and found.dtype == dtype and found.is_contiguous()
    with np.errstate(all="ignore"):
        assert_same(found, expected(x, chosen, by, *parts, name, split, schemes))


def test_a_token_does_not_depend_on_others(isa, threads):  # noqa: F811
    valid = valid_grouped_arguments(m=(70,), n=33, k=50)
    generator = torch.Generator().manual_seed(1)
    valid["chosen"] = torch.randint(0, 4, (70, 2), generator=generator)
    whole = call("experts", valid)
    for rows in (slice(3, 4), slice(10, 52)):
        some = {name: valid[name][rows] for name in ("x", "chosen", "chosen_weights")}
        assert_same(call("experts", valid | some), whole[rows])


def test_more_rows_than_are_held_at_once():
    """Experts go in blocks whose rows fit into 32 MiB."""
    valid = valid_grouped_arguments(m=(1000,), n=32, k=4096)
    for dtype in (torch.float32, torch.bfloat16):
        given = {"x": valid["x"].to(dtype), "chosen_weights": valid["chosen_weights"].to(dtype)}
        whole = call("experts", valid | given)
        for rows in (slice(0, 3), slice(990, 1000)):
            some = {name: one[rows] for name, one in given.items()}
            some["chosen"] = valid["chosen"][rows]
            assert_same(call("experts", valid | some), whole[rows])


def test_strides_and_nobody(isa):
    valid = valid_grouped_arguments(m=(5,))
    expected = call("experts", valid)
    apart = {
        name: valid[name].repeat_interleave(2, -1)[:, ::2]
        for name in ("x", "chosen", "chosen_weights", "weight_scale_up", "bias_down")
    }
    assert_same(call("experts", valid | apart), expected)
    none = {"chosen": torch.full_like(valid["chosen"], 1 << 40)}
    assert not call("experts", valid | none).any()
    assert (
        call(
            "experts",
            valid
            | {"chosen": valid["chosen"][:, :0], "chosen_weights": valid["chosen_weights"][:, :0]},
        )
        .eq(0)
        .all()
    )


WRONG = [
    ({"x": torch.randn(3, 5, 7)}, "x must have two dimensions"),
    ({"x": torch.randn(5, 7).double()}, "x must have dtype"),
    ({"chosen": torch.zeros(5, 2, dtype=torch.int32)}, "chosen must have dtype .*int64"),
    ({"chosen": torch.zeros(4, 2, dtype=torch.int64)}, "chosen must have the shape"),
    ({"chosen": torch.zeros(5, dtype=torch.int64)}, "chosen must have the shape"),
    ({"chosen_weights": torch.rand(5, 3)}, "chosen_weights must have the shape"),
    ({"chosen_weights": torch.zeros(5, 2, dtype=torch.int64)}, "chosen_weights must have dtype"),
    ({"weight_up": torch.zeros(3, 9, dtype=torch.int8)}, "weight_up must have the shape"),
    ({"weight_up": torch.zeros(3, dtype=torch.int8)}, "weight_up must have the shape"),
    ({"weight_down": torch.zeros(2, 4096, dtype=torch.int8)}, "weight_down must have the shape"),
    ({"weight_down": torch.zeros(3, 4096)}, "weight_down must have dtype .*int8"),
    ({"weight_scale_up": torch.rand(3, 5)}, "weight_scale_up must have the shape"),
    ({"weight_scale_down": torch.rand(3, 1).half()}, "weight_scale_down must have dtype .*float32"),
    ({"bias_up": torch.rand(3, 5)}, "bias_up must have"),
    ({"bias_down": torch.rand(7)}, "bias_down must have"),
    ({"n_up": -2}, "n_up"),
    ({"n_up": 3}, "n_up must be even"),
    ({"n_down": 1 << 40}, "n_down"),
    ({"weight_up": torch.tensor(1, dtype=torch.int8)}, "weight_up must have the shape"),
    ({"x": torch.zeros(5, 1).expand(5, 1 << 19)}, "x has K = 524288, more than"),
    ({"activation": 99}, "activation must"),
    ({"split": 3}, "split must be 0"),
    ({"activation_bits": 4}, "activation_bits"),
]


@pytest.mark.parametrize("changes, text", WRONG)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors(device, changes, text):
    valid = valid_grouped_arguments(m=(5,)) | changes
    values = {
        name: one.to(device) if isinstance(one, torch.Tensor) else one
        for name, one in valid.items()
    }
    with pytest.raises(RuntimeError, match=text):
        call("experts", values)


def test_a_negative_expert():
    valid = valid_grouped_arguments(m=(5,))
    valid["chosen"][2, 1] = -1
    with pytest.raises(RuntimeError, match="chosen must not be negative, got -1"):
        call("experts", valid)


def test_a_packed_weight_of_another_size():
    valid = valid_grouped_arguments(m=(5,))
    valid["weight_up"] = torch.nn.functional.pad(valid["weight_down"], (0, 4096))
    with pytest.raises(RuntimeError, match="does not fit its header"):
        call("experts", valid)


def test_tensors_elsewhere():
    valid = valid_grouped_arguments(m=(5,))
    for name in GROUPED["experts"]:
        if isinstance(valid[name], torch.Tensor) and name != "x":
            with pytest.raises((RuntimeError, NotImplementedError), match="device|meta|Meta"):
                call("experts", valid | {name: valid[name].to("meta")})
