"""Fused models and what they are compared with."""

import warnings
from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dynquant

# The sizes of a small text model of transformers.
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 80,
    "vocab_size": 99,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
LENGTHS = (12, 5)
MASK = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
IDS = torch.randint(3, 99, MASK.shape, generator=torch.Generator().manual_seed(1)) * MASK


def small(name, config=TEXT, **options):
    """The float model of transformers whose config has that name, with random parameters."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**config | options)
    return getattr(transformers, f"{name}Model")(config)


@torch.no_grad()
def hidden(model, **arguments):
    """The model's first output for IDS, at the tokens that are not padding."""
    given = {"input_ids": IDS, "attention_mask": MASK, **arguments}
    return model(**given)[0][MASK.bool()]


def randomized(model, seed=0):
    """The model with parameters of the size that keeps outputs near inputs, in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn / parameter.shape[-1] ** 0.5)
            else:
                parameter.copy_(1 + drawn / 4)
    return model.eval()


def fused(model, attention="integer"):
    """(quantized, fused) of a float model; every block that is known has to be fused."""
    quantized = dynquant.quantize_dynamic(randomized(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantized, dynquant.fuse(quantized, attention=attention)


def decibels(actual, expected):
    actual, expected = actual.double(), expected.double()
    noise = (actual - expected).square().sum()
    return float(10 * torch.log10(expected.square().sum() / noise.clamp(min=1e-30)))


def seen_one_by_one(model):
    """Gives every submodule of every block a hook, so that nothing can run fused.

    Dropouts have none: where MPNet calls one, it shows the float attention's probabilities.
    """

    def hook(module, args, output):
        return None

    for name in dynquant.fused_blocks(model):
        block = model.get_submodule(name)
        for child in block.modules():
            if child is not block and not isinstance(child, nn.Dropout):
                child.register_forward_hook(hook)
    return model


class Counting(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "dynquant":
            self.found[function.__name__.partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def ops_of(model, **arguments):
    """How often a call of the model runs each op that takes the place of a block."""
    with Counting() as counting:
        model(**arguments)
    found, layers = counting.found, len(getattr(getattr(model, "encoder", None), "layer", ()))
    for name in ("attention", "feed_forward"):
        found[name] += found["encoder"] * layers
    return {name: found[name] for name in ("attention", "feed_forward", "linear_block")}
