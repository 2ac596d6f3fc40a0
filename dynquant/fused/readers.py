"""The functions that read what a block is called with, by the family of its adapter."""

from dynquant.fused.arguments import of_torch_attention, of_torch_layer, of_transformers
from dynquant.fused.disentangled import of_disentangled

READERS = {
    "transformers": of_transformers,
    "torch_layer": of_torch_layer,
    "torch_attention": of_torch_attention,
    "disentangled": of_disentangled,
}
