"""Hugging Face transformers: models that are quantized while they are loaded, saved and loaded.

import dynquant.transformers  # registers the method "dynquant"; also before loading what it saved
from transformers import AutoModel

config = dynquant.transformers.DynquantConfig()
model = AutoModel.from_pretrained(path, quantization_config=config)
model.save_pretrained(folder)
model = AutoModel.from_pretrained(folder)
"""

from transformers import __version__ as _version

if int(_version.partition(".")[0]) < 5:
    raise ImportError(
        f"dynquant.transformers needs transformers 5 or newer; {_version} is installed. "
        "dynquant.quantize_dynamic(model) works with every version"
    )

from dynquant.transformers.config import DynquantConfig  # noqa: E402
from dynquant.transformers.foreign_checkpoint import load_int8  # noqa: E402
from dynquant.transformers.left_config import leave_config, take_config  # noqa: E402
from dynquant.transformers.module_names import only  # noqa: E402
from dynquant.transformers.parameters import count_quantized  # noqa: E402
from dynquant.transformers.quantizer import DynquantQuantizer  # noqa: E402

count_quantized()

__all__ = [
    "DynquantConfig",
    "DynquantQuantizer",
    "leave_config",
    "load_int8",
    "only",
    "take_config",
]
