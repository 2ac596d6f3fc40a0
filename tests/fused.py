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
# Those of a small encoder and decoder.
SEQUENCES = {
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "vocab_size": 99,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
T5 = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_layers": 2, "num_heads": 4, "vocab_size": 99}
WHISPER = {**SEQUENCES, "max_source_positions": 20, "num_mel_bins": 8}
MOONSHINE = {
    **{"hidden_size": 48, "intermediate_size": 80, "vocab_size": 99},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **dict.fromkeys(("encoder_num_hidden_layers", "decoder_num_hidden_layers"), 2),
    **dict.fromkeys(("encoder_num_attention_heads", "decoder_num_attention_heads"), 4),
    **dict.fromkeys(("encoder_num_key_value_heads", "decoder_num_key_value_heads"), 4),
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


def assert_alike(cache, other, least):
    """Both caches hold the same, to that many decibels."""
    for layer, twin in zip(cache.layers, other.layers, strict=True):
        if getattr(layer, "keys", None) is None:  # one that takes those of another
            assert type(layer) is type(twin)
            continue
        assert layer.get_seq_length() == twin.get_seq_length()
        assert decibels(layer.keys, twin.keys) > least
        assert decibels(layer.values, twin.values) > least


def gradients_of_kept(layer, run):
    """Of a cache's layer, keys and values: of the squares of the first output of run(), summed."""
    layer.keys, layer.values = (one.clone().requires_grad_() for one in (layer.keys, layer.values))
    learned = layer.keys, layer.values
    return torch.autograd.grad(run()[0].square().sum(), learned)


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


class Wrapped(nn.Module):
    """As an adapter is: called in the place of a linear layer."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


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
    """How often a call of the model runs each op that takes the place of a block.

    `attend`, of tokens behind a cache or few tokens, counts as an attention.
    """
    with Counting() as counting:
        model(**arguments)
    found, layers = counting.found, len(getattr(getattr(model, "encoder", None), "layer", ()))
    for name in ("attention", "feed_forward"):
        found[name] += found["encoder"] * layers
    found["attention"] += found["attend"]
    return {name: found[name] for name in ("attention", "feed_forward", "linear_block")}


class Doubled(nn.Module):
    def forward(self, x):
        return x * 2


def parametrize_weight(norm):
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", Doubled())


def plain_weight(norm):
    """A tensor that is no parameter in the place of one."""
    weight = norm.weight.detach() * 2
    del norm.weight
    norm.weight = weight


def parametrize_bias(norm):
    torch.nn.utils.parametrize.register_parametrization(norm, "bias", Doubled())


# Ways to keep the parameters of a norm elsewhere.
ELSEWHERE = (parametrize_weight, plain_weight, parametrize_bias)
