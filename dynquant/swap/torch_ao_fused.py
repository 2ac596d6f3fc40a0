"""torch.ao's fused LinearReLU: its linear layer is quantized where it is, and the type stays."""

import sys

from dynquant.nn._torch_ao import under_first_child


def load_fused(model):
    """Makes every LinearReLU of `model` load what torch.ao saves of a quantized one."""
    module = sys.modules.get("torch.ao.nn.intrinsic.modules.fused")
    if module is None:  # nobody has made one
        return
    for fused in model.modules():
        if isinstance(fused, module.LinearReLU):
            hooks = fused._load_state_dict_pre_hooks.values()
            if not any(hook.hook is under_first_child for hook in hooks):
                fused.register_load_state_dict_pre_hook(under_first_child)
