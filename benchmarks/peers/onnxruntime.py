"""ONNX Runtime: quantize_dynamic, which its optimizer fuses into DynamicQuantizeMatMul."""

import copy
import io
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks import made
from benchmarks.cases import Decoding, DecodingStep, Encoder
from benchmarks.peers.base import Peer, Unsupported

TRIAL_SECONDS = 0.1
FAIR_DB = 3
_QUANTIZED = ("DynamicQuantize", "QAttention")


class OnnxRuntime(Peer):
    """Weights quantized per channel or per tensor, activations to int8: the faster of the two.

    Per tensor is only taken where it is about as accurate: it may cost FAIR_DB of SNR at most.
    Called as `run` with numpy arrays, which wrap the tensors' memory.
    """

    packages = ("onnxruntime", "onnx")
    modules = ("onnxruntime", "onnx")

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import onnx
        import onnxruntime
        from onnxruntime import quantization

        self.onnx, self.onnxruntime, self.quantization = onnx, onnxruntime, quantization

    def convert(self, module, inputs):
        model = self._float_model(module, inputs)
        arrays, exact = self.prepare(inputs), module(*inputs).numpy()
        per_channel, per_tensor = (
            self._call(module, self._session(self._quantized(model, choice)))
            for choice in (True, False)
        )
        most = np.square(per_channel(*arrays) - exact).mean() * 10 ** (FAIR_DB / 10)
        fair = np.square(per_tensor(*arrays) - exact).mean() <= most
        if fair and _mean_seconds(per_tensor, arrays) < _mean_seconds(per_channel, arrays):
            self.note = "weights per tensor"
            return per_tensor
        self.note = "weights per channel"
        return per_channel

    def _float_model(self, module, inputs):
        """What quantize_dynamic takes: an ONNX model, or the path of one."""
        if isinstance(module, nn.Linear):
            return _linear_model(module)
        return _export_step(module) if isinstance(module, Decoding) else _export(module, inputs)

    def _quantized(self, model, per_channel):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.onnx"
            self.quantization.quantize_dynamic(
                model,
                path,
                per_channel=per_channel,
                weight_type=self.quantization.QuantType.QInt8,
                # Fused nodes have no rule by which the types of their results are found.
                extra_options={"DefaultTensorType": self.onnx.TensorProto.FLOAT},
            )
            nodes = self.onnx.load(path).graph.node
            if not any(node.op_type.startswith(_QUANTIZED) for node in nodes):
                raise Unsupported("ONNX Runtime quantizes nothing of this model")
            return path.read_bytes()

    def _session(self, data):
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        options.log_severity_level = 3
        return self.onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def _call(self, module, session):
        if isinstance(module, Decoding):
            return self._tokens(module, session)
        names = [value.name for value in session.get_inputs()]
        return lambda *x: session.run(None, dict(zip(names, x, strict=True)))[0]

    def _tokens(self, module, session):
        """Token by token: what the model gives for one is handed on to the next as it is."""
        value = self.onnxruntime.OrtValue.ortvalue_from_numpy
        names = [each.name for each in session.get_inputs()]
        kept, cached = [value(each.numpy()) for each in module.tensors()], module.kept.shape[-2]

        def call(ids):
            given, states = kept, []
            positions = np.arange(cached, cached + ids.shape[1])
            for token, position in zip(ids.T, positions, strict=True):
                numbers = value(token.reshape(-1, 1)), value(position.reshape(1, 1))
                inputs = dict(zip(names, (*numbers, *given), strict=True))
                state, *own = session.run_with_ort_values(None, inputs)
                states.append(state.numpy())
                given = [*own, *given[len(own) :]]
            return np.concatenate(states, 1)

        return call

    def prepare(self, inputs):
        return tuple(x.numpy() for x in inputs)

    def array(self, output):
        return output


class OnnxRuntimeOptimized(OnnxRuntime):
    """Encoders, with the attention and the sums fused by ONNX Runtime's optimizer of transformers.

    It knows the eager form of the attention.
    """

    packages = ("onnxruntime", "onnx", "sympy")

    def _float_model(self, module, inputs):
        if not isinstance(module, Encoder):
            raise Unsupported("the optimizer of transformers is for whole encoders")
        path = made.folder(
            module.name,
            "onnxruntime_optimized",
            ("onnxruntime", "onnx", "torch"),
            lambda folder: self._make(module, inputs, folder),
        )
        return path / "model.onnx"

    def _make(self, module, inputs, folder):
        from onnxruntime.transformers import optimizer

        eager = copy.deepcopy(module)
        eager.model.set_attn_implementation("eager")
        axes = {name: {0: "batch", 1: "length"} for name in ("ids", "mask", "hidden")}
        source = folder / "exported.onnx"
        torch.onnx.export(
            eager,
            inputs,
            source,
            dynamo=False,
            input_names=["ids", "mask"],
            output_names=["hidden"],
            dynamic_axes=axes,
        )
        config = module.model.config
        optimized = optimizer.optimize_model(
            str(source),
            model_type="bert",
            num_heads=config.num_attention_heads,
            hidden_size=config.hidden_size,
        )
        if optimized.get_fused_operator_statistics()["Attention"] != config.num_hidden_layers:
            raise Unsupported("the optimizer does not find the attention of this model")
        optimized.save_model_to_file(str(folder / "model.onnx"))
        source.unlink()


def _linear_model(linear):
    from onnx import TensorProto, helper, numpy_helper

    weight = np.ascontiguousarray(linear.weight.detach().numpy().T)
    k, n = weight.shape
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "weight"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", n])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(linear.bias.detach().numpy(), "bias"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _export(module, inputs, **options):
    import onnx

    buffer = io.BytesIO()
    torch.onnx.export(module, inputs, buffer, dynamo=False, **options)
    return onnx.load_from_string(buffer.getvalue())


def _export_step(decoding):
    """One token, with the number of those before it left open."""
    own, all_of_them = 2 * len(decoding.kept), decoding.tensors()
    names = [f"kept_{index}" for index in range(len(all_of_them))]
    token = torch.tensor([[7]])
    inputs = (token, torch.full_like(token, decoding.kept.shape[-2]), *all_of_them)
    given = ["state", *(f"with_{name}" for name in names[:own])]
    return _export(
        DecodingStep(decoding),
        inputs,
        input_names=["token", "position", *names],
        output_names=given,
        dynamic_axes={name: {2: "tokens"} for name in (*names[:own], *given[1:])},
    )


def _mean_seconds(call, arrays):
    call(*arrays)
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < TRIAL_SECONDS:
        call(*arrays)
        calls += 1
    return (time.perf_counter() - begin) / calls
