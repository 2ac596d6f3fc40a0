"""Schemas, fakes and tracing of every op: torch's own opcheck, and shapes under fake tensors."""

import pytest
import torch
from compare import assert_same
from op_arguments import BLOCKS, GROUPED, MIXERS, OPS, call, op_named, valid_arguments, valid_call
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

CHECKED = OPS | BLOCKS | GROUPED | MIXERS
CALLS = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16, one row": {"dtype": torch.float16, "m": (1,)},
    "one vector": {"m": ()},
    "batches": {"m": (2, 1, 3), "n": 65, "k": 64},
    "one weight scale": {"n": 70, "per_channel": False},
    "no rows": {"m": (0,)},
    "no columns": {"n": 0},
    "no depth": {"k": 0},
}
FLAGS = {
    "defaults": {},
    "other schemes": {"per_token": False, "per_channel": False, "bias": None},
    "symmetric": {"symmetric": True, "zero_point": None},
    "16 bits": {"activation_bits": 16},
}


def arguments_of(name, sizes, flags):
    values = valid_call(name, **CALLS[sizes]) | FLAGS[flags]
    if name not in OPS:
        return values, tuple(values[argument] for argument in CHECKED[name])
    if values["zero_point"] is None:
        values["zero_point"] = torch.zeros(values["scale"].shape, dtype=torch.int32)
        values["q"] = values["q"].view(torch.int8)
    if values["activation_bits"] == 16:
        values["bits"] = 16 if "x" in OPS[name] else 8
        values["q"] = values["q"].to(torch.uint16) if name == "scaled_mm" else values["q"]
    return values, tuple(values[argument] for argument in OPS[name])


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("sizes", ["plain", "batches", "one weight scale"])
@pytest.mark.parametrize("flags", FLAGS)
def test_opcheck(name, sizes, flags):
    torch.library.opcheck(op_named(name), arguments_of(name, sizes, flags)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_with_a_gradient(dtype):
    values = valid_arguments(dtype=dtype)
    values["x"].requires_grad_()
    torch.library.opcheck(
        op_named("linear_dynamic"), tuple(values[argument] for argument in OPS["linear_dynamic"])
    )


def assert_same_metadata(fake, real, where):
    assert len(fake) == len(real), where
    for one, other in zip(fake, real, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype), where
        assert one.stride() == other.stride(), where


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", CHECKED)
def test_fakes(name, flags):
    for sizes in CALLS:
        values, arguments = arguments_of(name, sizes, flags)
        real = pytree.tree_leaves(call(name, values))
        with FakeTensorMode() as mode:
            fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            results = pytree.tree_leaves(op_named(name)(*fakes))
        assert_same_metadata(results, real, f"fake, {sizes}")
        metas = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), arguments)
        results = pytree.tree_leaves(op_named(name)(*metas))
        assert_same_metadata(results, real, f"meta, {sizes}")
        assert all(tensor.is_meta for tensor in results)


def test_fakes_refuse_what_the_kernels_refuse():
    """So that a mistake shows when a model is traced, not when it runs."""
    wrong = {
        "x": torch.zeros(3, 7, dtype=torch.float64),
        "weight_scale": torch.ones(4),
        "bias": torch.ones(6),
        "packed": torch.zeros(99, dtype=torch.uint8),
    }
    for argument, value in wrong.items():
        values = valid_arguments() | {argument: value}
        with FakeTensorMode() as mode, pytest.raises(Exception, match=argument):
            arguments = (values[one] for one in OPS["linear_dynamic"])
            fakes = pytree.tree_map_only(torch.Tensor, mode.from_tensor, tuple(arguments))
            op_named("linear_dynamic")(*fakes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_linear_is_traced_without_a_break(dynamic):
    def function(x, packed, weight_scale, bias):
        return torch.ops.dynquant.linear_dynamic(x.relu(), packed, weight_scale, bias) * 2

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for rows in (3, 4, 1):
        values = valid_arguments(m=(rows,))
        arguments = [values[name] for name in ("x", "packed", "weight_scale", "bias")]
        assert_same(compiled(*arguments), function(*arguments))


def test_the_arguments_have_their_documented_names():
    for name in CHECKED:
        schema = op_named(name)._schema
        assert tuple(argument.name for argument in schema.arguments) == CHECKED[name]


@pytest.mark.parametrize("name", CHECKED)
def test_every_op_is_documented(name):
    assert "Raises:" in getattr(torch.ops.dynquant, name).__doc__
