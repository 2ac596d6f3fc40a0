"""ONNX: quantized models for ONNX Runtime and others.

dynquant.onnx.export(model, args, "model.onnx")
"""

from dynquant.onnx.export import export

__all__ = ["export"]
