"""OpenVINO's CPU plugin with int8 weights and its dynamic quantization of activations."""

import numpy as np
from torch import nn

from benchmarks.peers.base import Peer, Unsupported

FLOAT_ACTIVATIONS_DB = 60  # an SNR that no int8 product reaches


class OpenVino(Peer):
    """One group a row (dynamic_quantization_group_size = K), and a scale a channel.

    The execution graph does not say whether the activations were quantized (it gives the
    precision of the weights), so the result does: with activations left in float it agrees with
    the dequantized weights' product far more closely than int8 can.
    """

    packages = ("openvino",)
    modules = ("openvino",)

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import openvino

        self.openvino = openvino
        self.core = openvino.Core()

    def convert(self, module, inputs):
        if not isinstance(module, nn.Linear):
            raise Unsupported("only single linear layers are built for OpenVINO here")
        weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
        scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
        quantized = np.rint(weight / scale).clip(-127, 127).astype(np.int8)
        x = inputs[0].numpy()
        call = self._call(self._model(quantized, scale, bias, x.shape))
        weights_only = x.astype(np.float64) @ (quantized * scale.astype(np.float64)).T + bias
        error = np.square(call(*self.prepare(inputs)).data - weights_only).mean()
        if error * 10 ** (FLOAT_ACTIVATIONS_DB / 10) < np.square(weights_only).mean():
            raise Unsupported("its activations stay in float here: not an int8 product")
        return call

    def _model(self, quantized, scale, bias, shape):
        from openvino import opset13 as ops

        x = ops.parameter(shape, np.float32)
        weight = ops.multiply(ops.convert(ops.constant(quantized), "f32"), ops.constant(scale))
        product = ops.matmul(x, weight, False, True)
        return self.openvino.Model([ops.add(product, ops.constant(bias[None]))], [x])

    def _call(self, model):
        import openvino.properties as properties
        import openvino.properties.hint as hints

        compiled = self.core.compile_model(
            model,
            "CPU",
            {
                properties.inference_num_threads: self.threads,
                properties.num_streams: 1,
                hints.performance_mode: hints.PerformanceMode.LATENCY,
                hints.inference_precision: self.openvino.Type.f32,
                hints.dynamic_quantization_group_size: model.inputs[0].shape[1],
            },
        )
        request, Tensor = compiled.create_infer_request(), self.openvino.Tensor
        kind, shape = self.openvino.Type.f32, self.openvino.Shape(compiled.outputs[0].shape)

        def call(x):
            y = Tensor(kind, shape)
            request.set_input_tensor(x)
            request.set_output_tensor(y)
            request.infer(share_outputs=True)
            return y

        return call

    def prepare(self, inputs):
        return tuple(self.openvino.Tensor(x.numpy(), shared_memory=True) for x in inputs)

    def array(self, output):
        return output.data
