"""Models on disk, as `python -m dynquant` reads and writes them: nothing is unpickled unasked."""

import json
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from dynquant.qconfig import QConfig
from dynquant.quantize import quantize_dynamic
from dynquant.swap.floats import quantized_layers
from dynquant.swap.plan import default_spec
from dynquant.swap.selection import check_names
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
TEXTS = (
    "The cat sits on the mat.",
    "Dynamic quantization maps the activations of a network to eight bits while it runs.",
)
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


def example(source, file=None, texts=None):
    """What the model that is saved as `source` is tried on, as (arguments, named ones).

    Args:
        file: of inputs that torch.save wrote; without it, the tokenizer in `source` makes them.
        texts: for the tokenizer, in place of TEXTS.

    Raises:
        SavedModelError: where there is neither.
    """
    if file is not None:
        return read_inputs(file)
    return (), tokenized(source, texts or TEXTS)


def tokenized(folder, texts):
    """The named inputs that the tokenizer of a Hugging Face folder makes of texts.

    Raises:
        SavedModelError: where there is no tokenizer.
    """
    # transformers makes up an empty one where there is none.
    if not list(Path(folder).glob("tokenizer*")):
        raise SavedModelError(f"{folder} has no tokenizer; pass --inputs")
    transformers = _transformers()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
    except Exception as error:  # of reading JSON and of the tokenizer's code
        raise SavedModelError(f"{folder} has no tokenizer that can be loaded: {error}") from error


@dataclass
class Request:
    """How a model shall be quantized.

    Args:
        qconfig: a QConfig.
        embeddings: the dtype of embeddings, besides that of `qconfig`; None for none.
        convolutions: whether nn.Conv1d and nn.ConvTranspose1d are quantized.
        keep_float: names of modules that stay in float.
        keep_float_below, raise_bits_below: as for quantize_dynamic.
        inputs: (arguments, named ones) that the model is called with where one of those is given.
    """

    qconfig: QConfig = field(default_factory=QConfig)
    embeddings: torch.dtype | None = None
    convolutions: bool = False
    keep_float: Sequence[str] = ()
    keep_float_below: float | None = None
    raise_bits_below: float | None = None
    inputs: tuple | None = None

    def limits(self):
        """Those that are given."""
        both = {name: getattr(self, name) for name in ("keep_float_below", "raise_bits_below")}
        return {name: limit for name, limit in both.items() if limit is not None}

    def spec(self):
        """The qconfig_spec of quantize_dynamic."""
        spec = default_spec(self.qconfig, self.convolutions)
        if self.embeddings is not None:
            spec |= default_spec(QConfig(dtype=self.embeddings))
        return spec | dict.fromkeys(self.keep_float)


def quantize(source, target, request, allow_pickle=False):
    """Quantizes the model saved as `source` and saves it as `target`, in the same form.

    Args:
        source: as for read.
        target: what does not exist yet. It is there only once it is complete.
        request: a Request.
        allow_pickle: as for read.

    Returns:
        the quantized model.

    Raises:
        SavedModelError: where either cannot be.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise SavedModelError(f"{target} exists already")
    check_folder_of(target)
    if source.is_dir() and source.resolve() in target.resolve().parents:
        raise SavedModelError(f"{target} is within {source}, which is copied")
    if source.is_dir() and not request.limits():  # each layer while it is read
        model = _read_quantized(source, request, allow_pickle)
    else:
        model = quantize_as(read(source, allow_pickle), request)
    with whole(target) as made:
        try:
            if source.is_dir():
                _save_folder(model, source, made)
            else:
                torch.save(model, made)
        except Exception as error:  # a full disk has several names, and so has what no pickle holds
            raise SavedModelError(f"{target} cannot be written: {error}") from error
    return model


def quantize_as(model, request):
    """quantize_dynamic as the Request says.

    Raises:
        SavedModelError: where nothing is quantized.
    """
    measured = request.limits()
    if measured:
        arguments, named = request.inputs
        measured["example_inputs"] = named or arguments  # read_inputs gives one or the other
    quantized = quantize_dynamic(model, request.spec(), **measured)
    _check_quantized(quantized, request.qconfig)
    return quantized


def _check_quantized(model, qconfig):
    if quantized_layers(model):
        return
    kinds = sorted({type(module).__name__ for module in model.modules()})
    raise SavedModelError(
        f"nothing of the model is quantized with dtype {qconfig.dtype}: it is made of "
        f"{', '.join(kinds[:8])}{', ...' if len(kinds) > 8 else ''}"
    )


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
        raise SavedModelError(f"{folder} has no config.json: it is not a Hugging Face folder")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SavedModelError(f"{file} is not JSON: {error}") from error
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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is an archive of TorchScript, which is said below
        try:
            value = torch.load(file, weights_only=not allow_pickle)
        except OSError as error:
            raise SavedModelError(f"{file} cannot be read: {error}") from error
        except Exception as error:
            raise SavedModelError(_why_not(file, error, allow_pickle)) from error
    if isinstance(value, torch.jit.ScriptModule):
        raise SavedModelError(f"{file} {_SCRIPTED}")
    if isinstance(value, Mapping):
        raise SavedModelError(f"{file} {_about_mapping(value)}")
    if not isinstance(value, nn.Module):
        raise SavedModelError(f"{file} holds a {type(value).__name__}, not a module")
    if by := _already_quantized(value):
        raise SavedModelError(f"{file} is quantized already, by {by}")
    return value.eval()


_SCRIPTED = (
    "is a ScriptModule, in which no module can be swapped: quantize the module that it was "
    "scripted or traced from, and script or trace the result"
)


def _why_not(file, error, allow_pickle):
    """What to do about a file that torch.load refuses."""
    if "TorchScript" in str(error):
        return f"{file} {_SCRIPTED}"
    if allow_pickle:
        return f"{file} cannot be loaded: {error}"
    return (
        f"{file} holds more than tensors, or no tensors at all. If it is a module that torch.save "
        "wrote, pass --allow-pickle: loading it then runs whatever code the file asks for, so do "
        "that only with a file that you trust"
    )


def _about_mapping(value):
    tensors = [one for one in value.values() if isinstance(one, torch.Tensor)]
    kind = type(value).__name__
    kind = f"{'an' if kind[0] in 'AEIOU' else 'a'} {kind}"
    if not tensors:
        return f"holds {kind} with the keys {', '.join(map(repr, [*value][:5]))}, not a module"
    if any(one.dtype == torch.int8 for one in tensors):
        return (
            f"holds {kind} with int8 weights: the state dict of a model that is quantized already"
        )
    return (
        f"holds {kind} of {len(tensors)} tensors, a state dict without its model: quantize the "
        "model in Python, whose quantized form loads this state dict"
    )


def _already_quantized(model):
    """The library that quantized a model, or None."""
    if quantized_layers(model):
        return "dynquant"
    of_torch = ("torch.ao.nn.quantized", "torch.nn.quantized")
    kinds = [type(module).__module__ for module in model.modules()]
    return "torch.ao" if any(kind.startswith(of_torch) for kind in kinds) else None


def _read_quantized(folder, request, allow_pickle):
    _transformers()
    from dynquant.transformers import DynquantConfig, only

    qconfig = request.qconfig
    config = DynquantConfig(
        qconfig.weight,
        qconfig.activation,
        qconfig.symmetric,
        [*map(only, request.keep_float)],
        activation_bits=qconfig.activation_bits,
        dtype=qconfig.dtype,
        embeddings=request.embeddings,
        convolutions=request.convolutions,
    )
    model = _read_folder(folder, allow_pickle, quantization_config=config)
    check_names(request.keep_float, dict(model.named_modules()))
    _check_quantized(model, qconfig)
    return model


def _save_folder(model, folder, made):
    """Writes the model, and what `folder` has that is not a weight."""
    shutil.copytree(folder, made, ignore=_weights_in)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(made)


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
