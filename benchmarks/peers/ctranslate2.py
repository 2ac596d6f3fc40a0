"""CTranslate2: encoders with int8 weights and activations quantized at run time."""

import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import made
from benchmarks.cases import Encoder
from benchmarks.peers.base import Peer, Unsupported


class CTranslate2(Peer):
    packages = ("ctranslate2",)
    modules = ("ctranslate2",)

    def __init__(self, threads, spin=False):
        super().__init__(threads, spin)
        import ctranslate2

        self.ctranslate2 = ctranslate2

    def convert(self, module, inputs):
        if not isinstance(module, Encoder):
            raise Unsupported("CTranslate2 runs whole transformers only")
        path = made.folder(
            module.name, "ctranslate2", self.packages, lambda folder: self._make(module, folder)
        )
        encoder = self.ctranslate2.Encoder(
            str(path / "model"),
            device="cpu",
            compute_type="int8",
            intra_threads=self.threads,
            inter_threads=1,
        )
        return lambda ids, lengths: encoder.forward_batch(ids, lengths).last_hidden_state

    def _make(self, module, folder):
        converters = self.ctranslate2.converters
        with tempfile.TemporaryDirectory() as source:
            module.model.save_pretrained(source)
            _name_positions(Path(source) / "config.json")
            _write_vocabulary(source, module.model.config.vocab_size)
            converters.TransformersConverter(source).convert(
                str(folder / "model"), quantization="int8"
            )

    def prepare(self, inputs):
        ids, mask = (x.numpy().astype(np.int32) for x in inputs)
        view = self.ctranslate2.StorageView.from_array
        return view(ids), view(mask.sum(1, dtype=np.int32))

    def array(self, output):
        return np.array(output)


def _name_positions(config):
    """Says what the converter asks for, and transformers 5 writes no more."""
    values = json.loads(config.read_text())
    config.write_text(json.dumps({"position_embedding_type": "absolute"} | values))


def _write_vocabulary(folder, size):
    """A tokenizer, without which it converts no model."""
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{i}" for i in range(size - len(special))]
    with open(f"{folder}/vocab.txt", "w") as file:
        file.write("\n".join(words))
    BertTokenizer(f"{folder}/vocab.txt").save_pretrained(folder)
