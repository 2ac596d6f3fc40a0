"""Models of transformers whose layers are fused: less between the caller and the first layer.

At one short text, what the forward of such a model does besides its layers (defaults read from the
config, masks, capturing) takes as long as they do.
"""

import sys

import torch
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused.adapters import name_of
from dynquant.fused.block import FusedBlock
from dynquant.fused.classes import Swapped
from dynquant.fused.hooks import disturbed

_KNOWN = {
    f"transformers.models.{module}.modeling_{module}.{name}"
    for module, name in (
        ("bert", "BertModel"),
        ("roberta", "RobertaModel"),
        ("xlm_roberta", "XLMRobertaModel"),
        ("camembert", "CamembertModel"),
    )
}
_WAY = "_attn_implementation_internal"
_OUTPUT = "BaseModelOutputWithPoolingAndCrossAttentions"


def is_known(module):
    """Whether it is such a model, not fused yet, with fused layers."""
    if name_of(type(module)) not in _KNOWN or isinstance(module, Swapped):
        return False
    return all(isinstance(layer, FusedBlock) for layer in module.encoder.layer)


class FusedModel(Swapped):
    """Embeddings, layers, pooler; the forward of the model itself where more is asked for."""

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, *args, **kwargs):
        return_dict = kwargs.get("return_dict")
        if args or not self._fits(input_ids, attention_mask, kwargs):
            return super().forward(input_ids, attention_mask, token_type_ids, *args, **kwargs)
        mask = None
        if attention_mask is not None and not attention_mask.all():
            mask = attention_mask.to(torch.bool)[:, None, None, :]
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        for layer in self.encoder.layer:
            hidden = layer(hidden, mask)
        pooled = None if self.pooler is None else self.pooler(hidden)
        if self.config.__dict__.get("return_dict", True) if return_dict is None else return_dict:
            made = getattr(sys.modules["transformers.modeling_outputs"], _OUTPUT)
            return made(last_hidden_state=hidden, pooler_output=pooled)
        return (hidden,) if pooled is None else (hidden, pooled)

    def _fits(self, ids, mask, kwargs):
        if self.training or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.is_cpu:
            return False
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
            return False
        for name, value in kwargs.items():
            if name != "return_dict" and value is not None and value is not False:
                return False
        # Its values decide which way is taken, which nothing that traces can follow.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(ids) is not torch.Tensor:
            return False
        config = self.config.__dict__
        asked = ("output_hidden_states", "_output_attentions", "is_decoder", "is_causal")
        if any(config.get(name) for name in asked) or config.get(_WAY) != "sdpa":
            return False
        return not (_has_any_global_hook() or disturbed(self.encoder))
