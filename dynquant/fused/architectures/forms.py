"""What the files of known architectures share: how blocks are registered, names that recur."""

import dataclasses

from dynquant.fused.adapters import NO_NAMES, Adapter, Attention, LinearBlock, register

NOT_READ = frozenset({"position_ids", "token_type_ids"})  # passed on to layers that ignore them
MASKED = ("hidden_states", "attention_mask")
IN_CACHE = {"scale": "scaling", "index": "layer_idx"}  # where there may be a cache
USUAL = {"arguments": MASKED, "mask": "attention_mask", "ignored": NOT_READ}


def register_all(names, adapter):
    for name in names:
        register(name, adapter)


def linear_block(names, argument="hidden_states", **more):
    """A module that is a linear layer with an activation or a norm, or both."""
    block = LinearBlock("dense", **more)
    arguments = (argument, block.residual) if block.residual else (argument,)
    register_all(names, Adapter(arguments=arguments, linear_block=block))


def attention_module(names, attention, **more):
    """A module of transformers that is an attention with its output projection."""
    usual = {**USUAL, "attention": attention, "result": "weights"}
    register_all(names, Adapter(**usual | more))


def layer(names, attention, feed_forward, **more):
    """A layer of transformers that keeps its attention in a module: its names begin with that."""
    usual = {**USUAL, "attention": attention, "feed_forward": feed_forward, "residual": True}
    register_all(names, Adapter(**usual | more))


def within(part, names, **more):
    """The names of an Attention, or a FeedForward, seen from the module that has it as `part`."""

    def seen(name, value):
        if dataclasses.is_dataclass(value):
            return within(part, value)
        return f"{part}.{value}" if value and name not in NO_NAMES else value

    found = {name: seen(name, value) for name, value in vars(names).items()}
    return dataclasses.replace(names, **found | more)


def mlp(names, feed_forward, argument="hidden_states"):
    """A module that is a feed-forward block."""
    register_all(names, Adapter(arguments=(argument,), feed_forward=feed_forward))


def projections(output, **more):
    return Attention("q_proj", "k_proj", "v_proj", "head_dim", output, **more)


# The attention of most decoders, and what the argument of its forward is for.
TOKEN = projections("o_proj", **IN_CACHE)
TOKEN_NORMED = dataclasses.replace(TOKEN, query_norm="q_norm", key_norm="k_norm")
BEHIND_A_CACHE = {
    "arguments": ("hidden_states", "position_embeddings", "attention_mask", "cache"),
    "rotary": "position_embeddings",
    "cache": "cache",
}
