"""quantize_dynamic, prepare and convert: they swap float modules for quantized ones."""

import copy
import inspect
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import nn

from dynquant.comparison import losses
from dynquant.fused import fuse as fuse_blocks
from dynquant.qconfig import ConfigLike, is_of_torch
from dynquant.stubs import QuantStub
from dynquant.swap.copies import copied, in_eval_mode
from dynquant.swap.own_thread import on_own_thread, stop_if_interrupted
from dynquant.swap.places import replace_modules
from dynquant.swap.plan import plan_from_attributes, plan_from_spec
from dynquant.swap.registry import STUBS
from dynquant.swap.ties import part_from_quantized, remember_shared, shared_names
from dynquant.swap.torch_ao_fused import load_fused
from dynquant.swap.undo import all_or_nothing

# Of what a qconfig_spec is made, and `mapping`.
Spec: TypeAlias = Iterable[type[nn.Module] | str] | Mapping[Any, ConfigLike | None]
FormsByType: TypeAlias = Mapping[type[nn.Module], Any]

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Spec | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: FormsByType | None = None,
    inplace: bool = False,
    *,
    qconfig: Spec | None = None,
    keep_float_below: float | None = None,
    raise_bits_below: float | None = None,
    example_inputs: Any = None,
    fuse: bool = False,
) -> nn.Module:
    """The model with int8 weights, whose activations are quantized at run time.

    Linear layers are faster than in fp32 but for the smallest ones at many rows. On a Zen 4 core,
    at 4096 rows, those are the ones of about 1,000 weights and fewer (32 inputs and outputs took
    1.1 to 1.6 times as long), and those of one or two outputs (1.3 to 2.6 times). Keep these in
    float by name where they matter.

    Args:
        model: an nn.Module; the weights to be quantized are fp32, bf16 or fp16.
        qconfig_spec: what is quantized, and how:
            None: every supported module type that has a form of that dtype, but for convolutions;
            a set or list of module types, names, and patterns with `*`, each of which covers
            submodules. nn.Conv1d and nn.ConvTranspose1d are quantized where one of them is the
            type, the own name, or a pattern whose last part is one for the last part of that name
            ('*.conv', '*conv*');
            a dict from those to configs, of which None keeps a module in float. The most specific
            entry wins: exact name, longest parent name, pattern, exact type, base type, types of
            parents.
            A product of a recurrent layer is named by its weight ('lstm.weight_ih_l0'), one of an
            attention by its projection ('attn.q_proj'); so each can have a config of its own.
            Patterns reach products, too ('*.weight_hh_*').
            A config is a QConfig, dynquant.per_channel, per_token or per_tensor, a dtype, a dict, a
            torch QConfig, or the class QuantStub for the default.
        dtype: for configs that name no dtype: torch.qint8; torch.float16 or torch.bfloat16
            (weights in 16 bits, computed in fp32); torch.quint8 or torch.quint4x2
            (embeddings and embedding bags in 8 or 4 bits).
        mapping: further float types, each with the class whose from_float(module) makes the
            quantized form; from_float is given qconfig as well where it has such a parameter.
        inplace: change `model` itself instead of a copy. Its float weights are freed at the end,
            when all quantized ones are there.
        qconfig: another name of qconfig_spec.
        keep_float_below: dB. A layer whose output has a lower signal-to-noise ratio, for what the
            float layer gets when the model runs on example_inputs, stays in float, as does one
            that they do not reach; a warning names them. Each product of a recurrent layer (named
            by its weight) and of an attention (by its projection) counts on its own.
        raise_bits_below: dB. A layer or product that loses more than that with activations in 8
            bits gets 16, and a warning names it. It is tried before keep_float_below.
        example_inputs: what the model is called with for these two: a tuple of arguments, a dict of
            named ones, or a single tensor.
        fuse: whether the blocks that dynquant.fuse knows run as single ops.

    Returns:
        A model in eval mode: a new one that shares no memory with `model`, or `model` itself where
        inplace. A `model` that is itself a quantizable module gives its quantized form either way.
        Hooks and ties are kept. What is quantized already stays as it is.

    Raises, before anything is changed:
        TypeError, ValueError: for an argument that is none of the above, a name that the model
            does not have, a dtype that a type has no form for, or a weight that cannot be
            quantized.
        Whatever else ends the call, an interrupt as well, leaves the model as it was.

    Warns:
        UserWarning: about what was asked for and stays as it is.
    """
    made = None
    limits = {"raise_bits_below": raise_bits_below, "keep_float_below": keep_float_below}
    with all_or_nothing(model):
        plan = plan_from_spec(model, qconfig_spec, dtype, mapping, inplace, qconfig)
        if example_inputs is not None or any(limit is not None for limit in limits.values()):
            made = _made_above(plan, model, example_inputs, limits)
        _show_warnings(plan)
        result = _finish(plan, model, inplace, made)
        return fuse_blocks(result, inplace=True) if fuse else result


def prepare(
    model: nn.Module,
    qconfig_spec: Spec | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: FormsByType | None = None,
    inplace: bool = False,
    *,
    qconfig: Spec | None = None,
) -> nn.Module:
    """The model in eval mode with every QuantStub recording what passes, ready for convert.

    Each module that convert will swap gets its QConfig as the attribute `qconfig`, which may be
    changed, or set to None to keep the module in float. Arguments, errors and warnings are those
    of quantize_dynamic.
    """
    with all_or_nothing(model):
        plan = plan_from_spec(model, qconfig_spec, dtype, mapping, inplace, qconfig)
        _show_warnings(plan)
        if not inplace:
            model = copied(model)
        for item in plan.items:
            module = model.get_submodule(item.name)
            if not isinstance(module, QuantStub):
                if item.products is not None:
                    raise ValueError(
                        f"{item.name}: prepare takes no config for a product of a layer; "
                        "quantize_dynamic does"
                    )
                module.qconfig = item.qconfig
            elif module.observer is None:
                module.observe(item.qconfig)
        return model.eval()


def convert(
    model: nn.Module, mapping: FormsByType | None = None, inplace: bool = False
) -> nn.Module:
    """The model with its stubs swapped, and every module that has a `qconfig`.

    Args:
        model: from prepare; or one whose modules were given a `qconfig` (any form of a config; None
            keeps the module in float) by hand.
        mapping, inplace: as for quantize_dynamic, which also says what is returned and raised.

    Raises:
        ValueError: when there is nothing to convert, and nothing converted already.
    """
    with all_or_nothing(model):
        plan = plan_from_attributes(model, mapping, inplace)
        _show_warnings(plan)
        return _finish(plan, model, inplace)


def _show_warnings(plan):
    for message in plan.warnings:
        warnings.warn(message, UserWarning, stacklevel=3)


def _finish(plan, model, inplace, made=None):
    """Carries the plan out; a model of transformers, when it is saved, says what was quantized."""
    qconfigs = plan.configs()
    shared = shared_names(model, [item.module for item in plan.items])
    model = _carry_out(plan, model, inplace, made)
    remember_shared(model, shared)
    left_on(model, qconfigs)
    return model


def left_on(model, qconfigs):
    """Leaves on models of transformers what is quantized; arguments as for leave_config."""
    if "transformers.modeling_utils" in sys.modules:
        try:
            from dynquant.transformers import leave_config
        except ImportError:  # an older transformers
            return
        leave_config(model, qconfigs)


def _carry_out(plan, model, inplace, made=None):
    """made: the items with their quantized forms, where these are there already."""
    if not inplace:
        return _copy(plan, model, made)
    return _swap(_made(plan.items) if made is None else made, model)


def _swap(made, model):
    """Changes the model in the caller's thread, which an interrupt stops."""
    model.eval()
    made_of = {}
    for item, form in made:
        keep_hooks(item.module, form, lambda hooks: hooks)
        made_of[item.module] = form
        for parent, key in item.places:
            parent._modules[key] = form
        if item.module is model:
            model = form
    replace_modules(model, made_of)  # in plain lists
    _prepare_for_others(model)
    return model


# Tensors made in inference mode could not be loaded into later, nor give gradients.
@on_own_thread
@torch.inference_mode(False)
@torch.no_grad()
def _copy(plan, model, made):
    # Each float module that is swapped is never copied: the copy finds its quantized form.
    made = _made(plan.items) if made is None else made
    memo = {id(item.module): form for item, form in made}
    result = copied(model, memo).eval()
    for item in plan.items:
        keep_hooks(item.module, memo[id(item.module)], lambda hooks: copy.deepcopy(hooks, memo))
    _prepare_for_others(result)
    return result


@torch.inference_mode(False)
@torch.no_grad()
def _made_above(plan, model, example_inputs, limits):
    """The items with their quantized forms; what loses more is raised to 16 bits, or taken out.

    limits: raise_bits_below and keep_float_below.
    """
    limits = {name: limit for name, limit in limits.items() if limit is not None}
    if not limits or example_inputs is None:
        raise ValueError(
            f"{' or '.join(limits or ('keep_float_below', 'raise_bits_below'))} and example_inputs "
            "need each other: pass both"
        )
    for name, limit in limits.items():
        if isinstance(limit, bool) or not isinstance(limit, (int, float)):
            raise TypeError(f"{name} is {limit!r}; expected a number of dB")
    inputs, named = _example(example_inputs)
    made = _forms_of(plan.items)
    parts = [
        (item, product)
        for item in plan.items
        if not isinstance(item.module, STUBS)
        for product in item.parts()
        if item.config(product) is not None
    ]

    def measured(parts):
        forms = {part: (part[0].name, _form_of_part(*part, made)) for part in parts}
        return losses(model, forms, inputs, named)

    if "raise_bits_below" in limits:
        limit = limits["raise_bits_below"]
        ratios = measured(part for part in parts if _can_rise(*part))
        plan.raise_bits({part: one for part, one in ratios.items() if one < limit}, limit)
        made |= _forms_of(item for item in plan.items if item.is_changed)
    if "keep_float_below" in limits:
        limit = limits["keep_float_below"]
        ratios = measured(parts)
        plan.keep_in_float({part: one for part, one in ratios.items() if not one >= limit}, limit)
        made |= _forms_of(item for item in plan.items if item.is_changed)
    return [(item, made[item]) for item in plan.items]


def _can_rise(item, product):
    config = item.config(product)
    return config.dtype == torch.qint8 and config.activation_bits == 8 and not config.symmetric


def _form_of_part(item, product, made):
    """The quantized form of a layer, or one of which the product alone is quantized."""
    if product is None:
        return made[item]
    products = {**dict.fromkeys(item.parts()), product: item.config(product)}
    return item.form.from_float(item.module, item.config(product), products=products)


def _forms_of(items):
    """The quantized form of each item."""
    items = list(items)
    for item in items:
        item.is_changed = False
    return dict(_made(items))


def _example(example_inputs):
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        f"example_inputs is of type {type(example_inputs).__name__}; expected a tuple, a dict, or "
        "a tensor"
    )


def _prepare_for_others(model):
    load_fused(model)
    part_from_quantized(model)
    for module in model.modules():  # torch.ao removes its own as well
        if is_of_torch(vars(module).get("qconfig")):
            del module.qconfig


@on_own_thread
@torch.inference_mode(False)
@torch.no_grad()
def _made(items):
    """The items with their quantized forms."""
    sharing = Counter(item.tie for item in items)
    made, tied = [], {}
    for item in _with_progress(items):
        stop_if_interrupted()
        form = _from_float(item, tied.get(item.tie))
        if sharing[item.tie] > 1:
            tied.setdefault(item.tie, form)
        made.append((item, form))
    return made


def _from_float(item, tied_to):
    wanted = inspect.signature(item.form.from_float).parameters
    offered = {"qconfig": item.qconfig, "tied_to": tied_to}
    if item.products is not None:
        offered["products"] = item.products
    given = {key: value for key, value in offered.items() if key in wanted}
    with in_eval_mode(item.module):
        return item.form.from_float(item.module, **given)


def _with_progress(items):
    """The items, with a bar once going through them lasts over a second."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc="quantizing", unit=" modules", delay=1, leave=False)


def keep_hooks(module, form, copied):
    """Gives a quantized form the hooks of its float module, each dict of them through `copied`."""
    for name in _HOOKS:
        setattr(form, name, copied(getattr(module, name)))
