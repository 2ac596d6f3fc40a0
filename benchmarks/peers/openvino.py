"""OpenVINO's CPU plugin: int8 weights with activations quantized at run time, and static int8."""

import numpy as np
import torch
from torch import nn

from benchmarks import made
from benchmarks.cases import Encoder
from benchmarks.peers.base import Peer, Unsupported

FLOAT_ACTIVATIONS_DB = 60  # an SNR that no int8 product reaches


class OpenVino(Peer):
    """One group a row (dynamic_quantization_group_size = K), and a scale a channel.

    Whole models have their weights compressed to 8 bits by nncf, and the plugin's own group size.

    The execution graph does not say whether the activations were quantized (it gives the
    precision of the weights), so the result does: with activations left in float it agrees with
    the dequantized weights' product far more closely than int8 can.
    """

    packages = ("openvino", "nncf")
    modules = ("openvino", "nncf")
    FORM = "openvino"

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import openvino
        import openvino.properties.hint

        self.openvino = openvino
        self.core = openvino.Core()

    def convert(self, module, inputs):
        if isinstance(module, Encoder):
            return self._encoder(module, inputs)
        if not isinstance(module, nn.Linear):
            raise Unsupported("only linear layers and encoders are built for OpenVINO here")
        weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
        scale = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
        quantized = np.rint(weight / scale).clip(-127, 127).astype(np.int8)
        x = inputs[0].numpy()
        group = {self.openvino.properties.hint.dynamic_quantization_group_size: x.shape[1]}
        call = self._call(self._model(quantized, scale, bias, x.shape), group)
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

    def _encoder(self, module, inputs):
        path = made.folder(
            module.name, self.FORM, ("openvino", "nncf"), lambda folder: self._make(module, folder)
        )
        model = self.core.read_model(path / "model.xml")
        model.reshape({i: list(x.shape) for i, x in enumerate(inputs)})
        return self._call(model, {})

    def _make(self, module, folder):
        import nncf

        model = self.openvino.convert_model(module, example_input=_random_texts(module, 2))
        self.openvino.save_model(
            self._compressed(nncf, module, model), folder / "model.xml", compress_to_fp16=False
        )

    def _compressed(self, nncf, module, model):
        return nncf.compress_weights(model)

    def _call(self, model, properties_of_its_own):
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
                **properties_of_its_own,
            },
        )
        request, Tensor = compiled.create_infer_request(), self.openvino.Tensor
        kind, shape = self.openvino.Type.f32, self.openvino.Shape(compiled.outputs[0].shape)

        def call(*inputs):
            y = Tensor(kind, shape)
            for index, x in enumerate(inputs):
                request.set_input_tensor(index, x)
            request.set_output_tensor(y)
            request.infer(share_outputs=True)
            return y

        return call

    def prepare(self, inputs):
        return tuple(self.openvino.Tensor(x.numpy(), shared_memory=True) for x in inputs)

    def array(self, output):
        return output.data


class OpenVinoStatic(OpenVino):
    """Encoders with activations quantized by ranges from calibration data: random texts here.

    Those are like the ones that it is timed with, which is the best calibration that it can have.
    """

    FORM = "openvino_static"
    TEXTS = 100

    def convert(self, module, inputs):
        if not isinstance(module, Encoder):
            raise Unsupported("only encoders are calibrated here")
        self.note = f"calibrated with {self.TEXTS} texts of the same kind"
        return self._encoder(module, inputs)

    def _compressed(self, nncf, module, model):
        data = [tuple(x.numpy() for x in _random_texts(module, 1, i)) for i in range(self.TEXTS)]
        return nncf.quantize(
            model,
            nncf.Dataset(data, list),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=self.TEXTS,
        )


def _random_texts(module, batch, seed=0):
    generator = torch.Generator().manual_seed(seed + 1)
    ids = torch.randint(1000, module.model.config.vocab_size, (batch, 64), generator=generator)
    return ids, torch.ones_like(ids)
