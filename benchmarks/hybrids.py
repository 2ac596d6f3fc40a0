"""Decoders most of whose layers mix tokens without attention: eight layers, random weights."""

import copy

import numpy as np
import torch
from torch import nn

_LAYERS = 8
_SMALL = {"vocab_size": 2000, "num_hidden_layers": _LAYERS, "pad_token_id": 0}


def _qwen35():
    """By the shape of Qwen3.5-0.8B: three of four layers have the gated delta rule."""
    from transformers import Qwen3_5TextConfig, Qwen3_5TextModel

    config = Qwen3_5TextConfig(
        hidden_size=1024,
        intermediate_size=3584,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=16,
        **_SMALL,
    )
    return Qwen3_5TextModel(config)


def _granite4h():
    """By the shape of Granite 4.0 H 1B: all layers but one are Mamba 2's."""
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridModel

    config = GraniteMoeHybridConfig(
        hidden_size=1536,
        shared_intermediate_size=4096,
        num_local_experts=0,
        num_attention_heads=12,
        num_key_value_heads=4,
        mamba_n_heads=48,
        mamba_d_head=64,
        mamba_d_state=128,
        layer_types=[*(["mamba"] * 5), "attention", "mamba", "mamba"],
        **_SMALL,
    )
    return GraniteMoeHybridModel(config)


def _lfm2():
    """By the shape of LFM2-350M: five of eight layers have short convolutions."""
    from transformers import Lfm2Config, Lfm2Model

    conv, attention = "conv", "full_attention"
    config = Lfm2Config(
        hidden_size=1024,
        intermediate_size=4608,
        block_auto_adjust_ff_dim=False,
        num_attention_heads=16,
        num_key_value_heads=8,
        layer_types=[conv, conv, attention, conv, conv, attention, conv, attention],
        **_SMALL,
    )
    return Lfm2Model(config)


MODELS = {"qwen3.5-8": _qwen35, "granite4h-8": _granite4h, "lfm2-8": _lfm2}


@torch.no_grad()
def with_rates(model):
    """The model with rates and steps that every process has: constructors draw some of them."""
    generator = np.random.default_rng(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias")):
            values = generator.uniform(0.0, 2.0, parameter.shape).astype(np.float32)
            parameter.copy_(torch.from_numpy(values))
    return model


class Continuing(nn.Module):
    """The last hidden states of tokens, one after another, behind a prompt.

    The first call computes the prompt, by this module as it is then, and the next ones go on from
    a copy of its cache.
    """

    def __init__(self, model, prompt):
        super().__init__()
        self.model = model
        self.register_buffer("prompt", prompt)
        self.kept = None

    def forward(self, ids):
        """ids: [batch, length]."""
        if self.kept is None:
            self.kept = self.model(input_ids=self.prompt, use_cache=True).cache
        cache = copy.deepcopy(self.kept)
        states = [
            self.model(input_ids=token, cache=cache, use_cache=True)[0] for token in ids.split(1, 1)
        ]
        return torch.cat(states, 1)
