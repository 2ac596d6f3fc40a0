"""Which modules of a model are swapped for what: everything is checked before anything changes."""

import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from dynquant import nn as quantized
from dynquant.qconfig import DTYPES, QConfig, one_of, parse_qconfig
from dynquant.spec import Match, Spec, describe
from dynquant.stubs import DeQuantStub, QuantStub

# The quantized forms of each float type, of which the config's dtype chooses one; None for a type
# that has none although its base type has.
_FORMS = {
    nn.Linear: (quantized.Linear, quantized.HalfLinear),
    # Whoever makes one computes with its weight; it is quantized where it is asked for itself.
    NonDynamicallyQuantizableLinear: None,
    nn.MultiheadAttention: quantized.MultiheadAttention,
    nn.LSTM: (quantized.LSTM, quantized.HalfLSTM),
    nn.GRU: (quantized.GRU, quantized.HalfGRU),
    nn.RNN: (quantized.RNN, quantized.HalfRNN),
    nn.LSTMCell: (quantized.LSTMCell, quantized.HalfLSTMCell),
    nn.GRUCell: (quantized.GRUCell, quantized.HalfGRUCell),
    nn.RNNCell: (quantized.RNNCell, quantized.HalfRNNCell),
    nn.Embedding: quantized.Embedding,
    nn.EmbeddingBag: quantized.EmbeddingBag,
    QuantStub: quantized.Quantize,
    DeQuantStub: quantized.DeQuantize,
}
STUBS = (QuantStub, DeQuantStub)


@dataclass
class Item:
    """One swap: `module`, found as `name` and in `places`, gives way to its quantized form.

    places: each (parent module, key in its _modules); none for the model itself.
    tie: equal for items whose forms can share a packed weight.
    """

    name: str
    module: nn.Module
    form: type
    qconfig: QConfig
    places: list
    tie: tuple


# Types of modules that dynquant does not import: where they are defined, and the quantized forms.
_FOREIGN_FORMS = (
    ("transformers.pytorch_utils", "Conv1D", (quantized.Conv1D, quantized.HalfConv1D)),
    ("torch.ao.nn.qat.dynamic.modules.linear", "Linear", _FORMS[nn.Linear]),
)


def _foreign_forms():
    """Those of _FOREIGN_FORMS that are loaded; what is not loaded is in no model."""
    return {
        getattr(sys.modules[module], name): form
        for module, name, form in _FOREIGN_FORMS
        if module in sys.modules
    }


class Forms:
    """The quantized form of every float type, those of the user's `mapping` first.

    Entries of `mapping` that lead to torch.ao's own modules say no more than that the type is to be
    quantized: they give way to the forms of dynquant.

    Attributes:
        relatives: types made of linear layers, which an entry for nn.Linear covers as well.
    """

    def __init__(self, mapping):
        mapping = {} if mapping is None else mapping
        if not isinstance(mapping, Mapping):
            raise TypeError(f"mapping is {mapping!r}; expected a dict from float types to classes")
        for base, form in mapping.items():
            if not (isinstance(base, type) and issubclass(base, nn.Module)):
                raise TypeError(f"mapping has the key {base!r}; expected a type of nn.Module")
            if not callable(getattr(form, "from_float", None)):
                raise TypeError(
                    f"mapping[{describe(base)}] is {form!r}; expected a class with from_float"
                )
        foreign = _foreign_forms()
        self.relatives = (nn.MultiheadAttention, *foreign)
        mapping = {base: form for base, form in mapping.items() if not _is_of_torch_ao(form)}
        self._forms = {**_FORMS, **foreign, **mapping}
        self._quantized = tuple({form for forms in self._forms.values() for form in _each(forms)})

    def allow(self, base):
        """Quantizes a type of linear layer that is otherwise left in float."""
        if self._forms.get(base, self) is None:
            self._forms[base] = self._forms[nn.Linear]

    def of(self, module_type):
        """The nearest base type that has an entry, and its forms: (None, ()) without one."""
        base = next((base for base in module_type.__mro__ if base in self._forms), None)
        return base, _each(self._forms.get(base))

    def is_quantized(self, module_type):
        return issubclass(module_type, self._quantized)

    def has_any(self, module_type):
        """Whether the type, or one that derives from it, has a quantized form or is one."""
        return (
            bool(self.of(module_type)[1])
            or self.is_quantized(module_type)
            or any(issubclass(base, module_type) for base, form in self._forms.items() if form)
        )

    def default_types(self, dtype):
        """What is quantized where nothing but a dtype is asked for."""
        return [base for base in self._forms if self._has_default(base, dtype)]

    def _has_default(self, base, dtype):
        forms = _each(self._forms[base])
        served = not forms or _for_dtype(forms, dtype) is not None
        return base not in STUBS and served


def _each(forms):
    """The entry of a type as a tuple."""
    if forms is None:
        return ()
    return forms if isinstance(forms, tuple) else (forms,)


def _for_dtype(forms, dtype):
    """That of the forms that serves the dtype, or None. One without DTYPES serves them all."""
    return next((form for form in forms if dtype in getattr(form, "DTYPES", (dtype,))), None)


def _check_dtype(forms, dtype, subject):
    """Raises ValueError where none of the forms serves the dtype."""
    if forms and _for_dtype(forms, dtype) is None:
        one_of(f"{subject}: dtype", dtype, [one for form in forms for one in form.DTYPES])


class Plan:
    """The items to swap, and the warnings about what was asked for and stays as it is.

    Args:
        modules: those of the model, a dict by name.
        match: gives for a name the Match that tells the module's config, or None.
        forms: a Forms.
    """

    def __init__(self, modules, match, forms):
        self.items = []
        self.warnings = []
        left, within = [], []
        places = _places(modules)
        asked = {}  # by id(module): its first name and config
        outer = None
        for name, module in modules.items():
            if outer is not None and (outer == "" or name.startswith(f"{outer}.")):
                found = match(name)
                if found is not None and found.by_name:
                    within.append(_titled(name, module))
                continue
            base, candidates = forms.of(type(module))
            found = match(name) or (Match(QConfig(), False) if base in STUBS else None)
            if found is None or found.qconfig is None and not candidates:
                continue
            if base is NonDynamicallyQuantizableLinear and found.by_name:
                candidates = candidates or _each(_FORMS[nn.Linear])
            if not candidates:
                continue
            first, qconfig = asked.setdefault(id(module), (name, found.qconfig))
            if qconfig != found.qconfig:
                raise ValueError(f"{first!r} and {name!r} are one module, asked for differently")
            if first != name or qconfig is None:
                continue
            form = _for_dtype(candidates, qconfig.dtype)
            if form is None:  # a name or type that covers it asks for a dtype of other modules
                if found.by_name:
                    _check_dtype(candidates, qconfig.dtype, _titled(name, module))
                continue
            obstacle = _obstacle(module, base, [parent for parent, _ in places[id(module)]])
            if obstacle:
                left.append(f"{_titled(name, module)} {obstacle}")
                continue
            if hasattr(form, "check_float"):
                form.check_float(module, qconfig, name)
            weight = module._parameters.get("weight", module)
            tie = (id(weight), form, qconfig.weight, qconfig.dtype)
            self.items.append(Item(name, module, form, qconfig, places[id(module)], tie))
            outer = name
        self._warn("left in float", left)
        self._warn("part of a module that is quantized as a whole", within)

    def _warn(self, what, subjects):
        if subjects:
            self.warnings.append(f"{what}: {'; '.join(subjects)}")

    def keep_in_float(self, ratios, threshold):
        """Takes items out, with a warning. ratios: dB by the item's name."""
        subjects = [
            f"{_titled(item.name, item.module)} {ratios[item.name]:.1f} dB"
            for item in self.items
            if item.name in ratios
        ]
        self.items = [item for item in self.items if item.name not in ratios]
        self._warn(f"left in float, below {threshold} dB", subjects)

    def warn_of_unreached(self, names):
        self._warn("quantized without a measurement, not reached by example_inputs", names)

    def warn_of_requests_without_form(self, modules, spec, forms):
        """Adds the warning that names the types and names that cover nothing to quantize."""

        def idle(covering, dtype):
            return not any(
                isinstance(module, NonDynamicallyQuantizableLinear)
                or forms.is_quantized(type(module))
                or _for_dtype(forms.of(type(module))[1], dtype) is not None
                for outer in covering
                for module in outer.modules()
            )

        subjects = []
        for base, qconfig in spec.types.items():
            instances = [module for module in modules.values() if isinstance(module, base)]
            if qconfig is not None and not forms.has_any(base) and idle(instances, qconfig.dtype):
                subjects.append(describe(base))
        for name, qconfig in spec.names.items():
            if qconfig is not None and idle([modules[name]], qconfig.dtype):
                subjects.append(_titled(name, modules[name]))
        self._warn("no quantized form, left as it is", subjects)


def plan_from_spec(model, qconfig_spec, dtype, mapping, inplace, qconfig):
    """The Plan that the arguments of quantize_dynamic ask for."""
    argument = "qconfig_spec" if qconfig is None else "qconfig"
    if qconfig is not None:
        if qconfig_spec is not None:
            raise TypeError("qconfig is another name of qconfig_spec: pass one of them")
        qconfig_spec = qconfig
    modules = _modules(model, inplace)
    one_of("dtype", dtype, DTYPES)
    forms = Forms(mapping)
    if qconfig_spec is None:
        spec = Spec(forms.default_types(dtype), dtype, relatives=forms.relatives)
        return Plan(modules, lambda name: spec.match(name, modules), forms)
    spec = Spec(qconfig_spec, dtype, argument, forms.relatives)
    spec.check_names(modules)
    if NonDynamicallyQuantizableLinear in spec.types:
        forms.allow(NonDynamicallyQuantizableLinear)
    for base, config in spec.types.items():
        if config is None:
            continue
        _check_dtype(forms.of(base)[1], config.dtype, f"{argument}[{describe(base)}]")
    plan = Plan(modules, lambda name: spec.match(name, modules), forms)
    plan.warn_of_requests_without_form(modules, spec, forms)
    return plan


def default_spec(qconfig):
    """The qconfig_spec that quantizes what None does, with a QConfig for all of it."""
    bases = Forms(None).default_types(qconfig.dtype)
    return {base: qconfig for base in bases if base is not NonDynamicallyQuantizableLinear}


def plan_from_attributes(model, mapping, inplace):
    """The Plan of swapping stubs and the modules that have a `qconfig` of their own.

    Raises:
        ValueError: when there is nothing to swap, and nothing swapped already.
    """
    modules = _modules(model, inplace)
    forms = Forms(mapping)

    def match(name):
        module = modules[name]
        if isinstance(module, STUBS) or not hasattr(module, "qconfig"):
            return None
        config = module.qconfig
        if config is not None and forms.of(type(module))[1]:
            config = parse_qconfig(config, name=f"{name or 'model'}.qconfig")
            _check_dtype(forms.of(type(module))[1], config.dtype, f"{name or 'model'}.qconfig")
        return Match(config, False)

    plan = Plan(modules, match, forms)
    if not plan.items and not any(forms.is_quantized(type(module)) for module in modules.values()):
        raise ValueError("the model has nothing to convert; call dynquant.prepare first")
    return plan


def _modules(model, inplace):
    """All modules by name, one that has several names under each of them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is of type {type(model).__name__}; expected an nn.Module")
    if not isinstance(inplace, bool):
        raise TypeError(f"inplace is {inplace!r}; expected a bool")
    return dict(model.named_modules(remove_duplicate=False))


def _places(modules):
    """By id(module): each (parent module, key in its _modules)."""
    places = defaultdict(list)
    for parent in modules.values():
        for key, child in parent._modules.items():
            places[id(child)].append((parent, key))
    return places


def _is_of_torch_ao(form):
    return getattr(form, "__module__", "").startswith("torch.ao.")


def _weights_of(module, base):
    """The names of the parameters that are quantized."""
    if issubclass(base, nn.RNNBase):
        return [name for name in module._flat_weights_names if name.startswith("weight")]
    if issubclass(base, nn.RNNCellBase):
        return ["weight_ih", "weight_hh"]
    return ["weight"] if issubclass(base, nn.Linear) else []


def _obstacle(module, base, parents):
    """Why a module of a type with a quantized form has none itself, or None."""
    if "forward" in vars(module) or type(module).forward is not base.forward:
        return f"has a forward other than {base.__name__}'s"
    if issubclass(base, nn.Linear):
        for parent in parents:
            if isinstance(parent, nn.MultiheadAttention):
                return "belongs to an nn.MultiheadAttention, which computes with its weight"
    for weight in _weights_of(module, base):
        if weight not in module._parameters and not is_parametrized(module, weight):
            return f"has a {weight} that a hook computes, as weight_norm's does: remove that first"
    return None


def _titled(name, module):
    return f"{name or 'the model'} ({type(module).__name__})"
