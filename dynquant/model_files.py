"""Models on disk, as `python -m dynquant` reads and writes them: nothing is unpickled unasked."""

import json
import shutil
import warnings
from pathlib import Path

import torch
from torch import nn

from dynquant.qconfig import QConfig
from dynquant.quantize import quantize_dynamic
from dynquant.swap.plan import default_spec
from dynquant.whole_files import whole

_WEIGHT_SUFFIXES = {
    ".bin",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".ot",
    ".pt",
    ".pth",
    ".safetensors",
}
_OTHER_ENGINES = {"onnx", "openvino", "coreml"}


class SavedModelError(Exception):
    """A request about a saved model that cannot be met, and why."""


def read(path, allow_pickle=False):
    """The float model that is saved as `path`, in eval mode.

    Args:
        path: a Hugging Face folder, or a file of a module that torch.save wrote.
        allow_pickle: whether what can only be unpickled is: a saved module, or a folder's weights
            that are not in safetensors. Unpickling runs whatever code the file asks for.

    Raises:
        SavedModelError: where it cannot be read so.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path, allow_pickle)
    if not path.exists():
        raise SavedModelError(f"{path} does not exist")
    return _read_module(path, allow_pickle)


def read_inputs(path):
    """What torch.save wrote: a tensor, a tuple or a dict of tensors, as (arguments, named ones)."""
    try:
        value = torch.load(path, weights_only=True)
    except Exception as error:
        raise SavedModelError(f"{path} holds no tensors that can be loaded: {error}") from error
    if isinstance(value, dict):
        return (), value
    return (tuple(value) if isinstance(value, (tuple, list)) else (value,)), {}


def tokenized(folder, texts):
    """The named inputs that the tokenizer of a Hugging Face folder makes of texts.

    Raises:
        SavedModelError: where there is no tokenizer.
    """
    transformers = _transformers()
    # transformers makes up an empty one where there is none.
    if not list(Path(folder).glob("tokenizer*")):
        raise SavedModelError(f"{folder} has no tokenizer; pass --inputs")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
    except (OSError, ValueError, ImportError) as error:
        raise SavedModelError(f"{folder} has no tokenizer that can be loaded: {error}") from error


def quantize(source, target, qconfig=None, keep_float=(), allow_pickle=False):
    """Quantizes the model saved as `source` and saves it as `target`, in the same form.

    Args:
        source: as for read.
        target: what does not exist yet. It is there only once it is complete.
        qconfig: a QConfig.
        keep_float: names of modules that stay in float.
        allow_pickle: as for read.

    Returns:
        the quantized model.

    Raises:
        SavedModelError: where either cannot be.
    """
    source, target = Path(source), Path(target)
    qconfig = qconfig or QConfig()
    if target.exists():
        raise SavedModelError(f"{target} exists already")
    check_folder_of(target)
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise SavedModelError(f"{target} is within {source}, which is copied")
    with whole(target) as made:
        if source.is_dir():
            model = _quantize_folder(source, made, qconfig, keep_float, allow_pickle)
        else:
            model = quantize_as(read(source, allow_pickle), qconfig, keep_float)
            torch.save(model, made)
    return model


def quantize_as(model, qconfig, keep_float):
    """quantize_dynamic with one config for everything but the modules named in keep_float."""
    return quantize_dynamic(model, {**default_spec(qconfig), **dict.fromkeys(keep_float)})


def check_folder_of(path):
    """Raises SavedModelError unless the folder that `path` shall be in is there."""
    folder = Path(path).absolute().parent
    if not folder.is_dir():
        raise SavedModelError(f"{folder} is not a folder")


def _transformers():
    try:
        import transformers
    except ImportError as error:
        raise SavedModelError(
            "a Hugging Face folder needs transformers (pip install transformers)"
        ) from error
    return transformers


def _read_folder(folder, allow_pickle, **arguments):
    transformers = _transformers()
    config = _configuration(folder)
    if not allow_pickle and not list(folder.glob("*.safetensors")):
        raise SavedModelError(
            f"{folder} has no weights in safetensors; others are unpickled with --allow-pickle only"
        )
    names = config.get("architectures") or ["AutoModel"]
    name = str(names[0] if isinstance(names, list) else names)
    architecture = getattr(transformers, name, None)
    if not hasattr(architecture, "from_pretrained"):
        raise SavedModelError(f"{folder} is a {name}, which this transformers does not have")
    try:
        return architecture.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=None if allow_pickle else True,
            **arguments,
        ).eval()
    except Exception as error:  # of reading JSON, safetensors and pickles, and of the model's code
        raise SavedModelError(f"{folder} cannot be loaded: {error}") from error


def _configuration(folder):
    """What config.json says; SavedModelError unless that is of a float model."""
    file = folder / "config.json"
    if not file.is_file():
        raise SavedModelError(f"{folder} has no config.json: it is no Hugging Face folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SavedModelError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise SavedModelError(f"{file} holds a {type(config).__name__}, not the keys of a model")
    if held := config.get("quantization_config"):
        method = held.get("quant_method") if isinstance(held, dict) else held
        raise SavedModelError(f"{folder} is quantized already, by {method}")
    return config


def _read_module(file, allow_pickle):
    if file.suffix == ".safetensors":
        raise SavedModelError(
            f"{file} holds tensors without their model: load them into a quantized model instead"
        )
    try:
        value = torch.load(file, weights_only=not allow_pickle)
    except Exception as error:
        if allow_pickle:
            raise SavedModelError(f"{file} cannot be loaded: {error}") from error
        raise SavedModelError(
            f"{file} is no file of plain tensors; if it is a saved module, unpickling it runs "
            "whatever code it asks for: pass --allow-pickle if you trust it"
        ) from error
    if not isinstance(value, nn.Module):
        raise SavedModelError(
            f"{file} holds a {type(value).__name__}, not a module: load a state dict into a "
            "quantized model instead"
        )
    return value.eval()


def _quantize_folder(folder, made, qconfig, keep_float, allow_pickle):
    _transformers()
    from dynquant.transformers import DynquantConfig, only

    config = DynquantConfig(
        qconfig.weight, qconfig.activation, qconfig.symmetric, [*map(only, keep_float)]
    )
    model = _read_folder(folder, allow_pickle, quantization_config=config)
    names = dict(model.named_modules())
    for name in keep_float:
        if name not in names:
            raise SavedModelError(f"the model has no module named {name!r}")
    shutil.copytree(folder, made, ignore=_weights_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(made)
    return model


def _weights_in(folder, names):
    """What a copy of a folder leaves out: weights in any form, and what belongs to them."""
    return [
        name
        for name in names
        if Path(name).suffix in _WEIGHT_SUFFIXES
        or name.endswith(".index.json")
        or name.startswith(".git")
        or name in _OTHER_ENGINES
    ]
