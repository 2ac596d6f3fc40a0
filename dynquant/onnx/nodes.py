"""Ops of dynquant as nodes of a domain of their own, while torch.onnx.export is at work.

At that time no op can see the values of weights, which are packed. So each op becomes one node with
its arguments, and `lower` replaces the nodes once the model is there, weights and all.
"""

import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

import dynquant.ops  # noqa: F401 (registers torch.ops.dynquant)

DOMAIN = "dynquant"
_TYPES = ("float", "float16", "bfloat16", "uint8", "int8", "uint16", "int32", "int64", "bool")
_TYPES = [f"tensor({one})" for one in _TYPES]


def translation_table():
    """For each op of dynquant, and its overload without a gradient, what makes a node of it."""
    table = {}
    for name in sorted(_names()):
        packet = getattr(torch.ops.dynquant, name)
        for overload in packet.overloads():
            op = getattr(packet, overload)
            table[op] = _translation(name, op._schema)
    return table


def _names():
    schemas = torch._C._jit_get_all_schemas()
    return {
        schema.name.removeprefix("dynquant::")
        for schema in schemas
        if schema.name.startswith("dynquant::")
    }


def arguments_of(node):
    """The arguments of the op that a node stands for, by name: values, None, and numbers."""
    schema = getattr(torch.ops.dynquant, node.op_type).default._schema
    tensors = [one.name for one in schema.arguments if _is_tensor(one)]
    given = dict.fromkeys(tensors) | dict(zip(tensors, node.inputs, strict=False))
    for one in schema.arguments:
        if not _is_tensor(one):
            held = node.attributes.get(one.name)
            given[one.name] = one.default_value if held is None else held.value
    return given


def scope_of(node):
    """The name of the module that a node comes from, as messages call it."""
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    names = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
    return (names[-2] if len(names) > 1 else "") or "the model"


def _is_tensor(argument):
    return "Tensor" in str(argument.type)


def _translation(name, schema):
    names = [one.name for one in schema.arguments]
    tensors = [one.name for one in schema.arguments if _is_tensor(one)]
    op = Op(Opset(DOMAIN, 1), name, _onnx_schema(name, schema))

    def translate(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        numbers = {
            key: int(value) if isinstance(value, bool) else value
            for key, value in given.items()
            if key not in tensors and value is not None
        }
        return op(*(given.get(key) for key in tensors), **numbers)

    return translate


def _onnx_schema(name, schema):
    formal, option = OpSchema.FormalParameter, OpSchema.FormalParameterOption
    inputs = [
        formal(
            one.name,
            f"T_{one.name}",
            param_option=option.Optional if "Optional" in str(one.type) else option.Single,
        )
        for one in schema.arguments
        if _is_tensor(one)
    ]
    outputs = [formal(f"y{place}", f"T_y{place}") for place in range(len(schema.returns))]
    numbers = [one for one in schema.arguments if not _is_tensor(one)]
    kinds = OpSchema.AttrType
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(one.type_str, _TYPES, "") for one in (*inputs, *outputs)],
        attributes=[
            OpSchema.Attribute(
                one.name, kinds.FLOAT if "float" in str(one.type) else kinds.INT, required=False
            )
            for one in numbers
        ],
    )
