"""export: torch.onnx.export for models with quantized modules."""

from contextlib import nullcontext

import torch
from torch import nn

from dynquant.fused.classes import unfused
from dynquant.onnx.lowering import lower
from dynquant.onnx.nodes import translation_table

MIN_OPSET = 18  # of the reductions and of Split
# Arguments of torch.onnx.export that would look at a model that is not finished, or not be heard.
_REFUSED = ("dynamo", "fallback", "verify", "export_params", "keep_initializers_as_inputs")


def export(
    model,
    args=(),
    f=None,
    *,
    kwargs=None,
    unsigned_weights=False,
    external_data=True,
    custom_translation_table=None,
    **options,
):
    """Exports a model with quantized modules to ONNX, in operators of the standard alone.

    Linear layers, attention, recurrent layers and embeddings become integers times integers
    (MatMulInteger) where their weights are int8, with activations that are quantized at each call:
    by DynamicQuantizeLinear for asymmetric per_tensor in 8 bits, otherwise by dynquant's formula in
    plain operators. A recurrence is a Scan. docs/onnx.md says how near results are.

    Args:
        model: what quantize_dynamic has made, or a torch.export.ExportedProgram. Blocks that run
            fused are exported as their modules, and the model must not be called meanwhile.
        args, kwargs: example inputs.
        f: the file to write, or None.
        unsigned_weights: weights as uint8 with the zero point 128. ONNX Runtime's product of uint8
            with int8 saturates on x86 processors without VNNI, unless the session's config
            "session.x64quantprecision" is "1"; this one does nowhere, and is slower where there is
            VNNI.
        external_data: whether weights go to a file beside `f`.
        custom_translation_table: as for torch.onnx.export, for other ops.
        options: others of torch.onnx.export, such as dynamic_shapes, input_names, output_names and
            opset_version (18 or more).

    Returns:
        a torch.onnx.ONNXProgram.

    Raises:
        ValueError: before anything is written, for an op without a form in ONNX: embedding bags,
            fused blocks in an ExportedProgram; for an opset below 18.
        TypeError: for an argument of torch.onnx.export that is not taken.
    """
    for name in _REFUSED:
        if name in options:
            raise TypeError(f"dynquant.onnx.export takes no {name}")
    opset = options.get("opset_version")
    if opset is not None and opset < MIN_OPSET:
        raise ValueError(f"opset_version is {opset}; allowed: {MIN_OPSET} or more")
    table = {**translation_table(), **(custom_translation_table or {})}
    with unfused(model) if isinstance(model, nn.Module) else nullcontext():
        program = torch.onnx.export(
            model, args, kwargs=kwargs, dynamo=True, custom_translation_table=table, **options
        )
    lower(program.model, unsigned_weights)
    if f is not None:
        program.save(f, external_data=external_data)
    return program
