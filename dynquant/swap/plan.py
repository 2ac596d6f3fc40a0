"""Which modules of a model are swapped for what: everything is checked before anything changes."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import type_before_parametrizations

from dynquant.nn.experts import FloatExperts, is_experts, unlike_experts
from dynquant.qconfig import DTYPES, QConfig, one_of, parse_qconfig
from dynquant.swap.copies import in_eval_mode
from dynquant.swap.floats import without_form
from dynquant.swap.own_thread import on_own_thread
from dynquant.swap.registry import ON_REQUEST, STUBS, Forms, check_dtype, form_for
from dynquant.swap.selection import Match, Spec, describe, fits, lineage_of


@dataclass(eq=False)
class Item:
    """One swap: `module`, found as `name` and in `places`, is replaced by its quantized form.

    places: each (parent module, key in its _modules); none for the model itself.
    tie: equal for items whose forms can share a packed weight.
    products: where those of the module differ, the config of each by name; None keeps one in float.
    """

    name: str
    module: nn.Module
    form: type
    qconfig: QConfig
    places: list
    tie: tuple
    products: dict | None = None
    is_changed: bool = False  # since its form was made

    def config(self, product=None):
        """The config of a product, or of the layer where that is None."""
        return self.qconfig if product is None or self.products is None else self.products[product]

    def set_config(self, product, qconfig):
        self.is_changed = True
        if product is None:
            self.qconfig = qconfig
            return
        if self.products is None:
            self.products = dict.fromkeys(self.parts(), self.qconfig)
        self.products[product] = qconfig

    def is_quantized(self):
        configs = [self.qconfig] if self.products is None else self.products.values()
        return any(config is not None for config in configs)

    def parts(self):
        """Its products, where the form distinguishes them; else None alone."""
        apart = getattr(self.form, "MIXED", None)
        return self.form.products_of(self.module) if apart else (None,)


class Plan:
    """The items to swap, and the warnings about what was asked for and stays as it is.

    Args:
        modules: those of the model, a dict by name.
        match: gives the Match with the config of the module of a name, or None.
        forms: a Forms.
        products: configs of products by name, a dict for each module's name.
    """

    def __init__(self, modules, match, forms, products=None):
        products = products or {}
        self.items = []
        self.warnings = []
        left, within, scripted = [], [], []
        places = _places(modules)
        self._asked = asked = {}  # by id(module): its first name and config
        outer = None
        for name, module in modules.items():
            if isinstance(module, torch.jit.ScriptModule):
                if not any(one == "" or name.startswith(f"{one}.") for one in scripted):
                    scripted.append(name)
                continue
            found = match(name)
            if outer is not None and (outer == "" or name.startswith(f"{outer}.")):
                if found is not None and found.by_name and not _is_product(name, products):
                    within.append(_titled(name, module))
                continue
            if found is None and isinstance(module, STUBS):
                found = Match(QConfig(), False)
            if found is None and name in products:
                found = Match(None, False)
            base, candidates = _candidates(name, module, found, forms)
            if not candidates:
                continue
            first, qconfig = asked.setdefault(id(module), (name, found.qconfig))
            if qconfig != found.qconfig:
                raise ValueError(f"{first!r} and {name!r} are one module, asked for differently")
            form = form_for(candidates, qconfig.dtype) if qconfig is not None else None
            each = None
            if name in products:
                form, each = _mixed(module, candidates, qconfig, products[name])
                qconfig = QConfig() if qconfig is None else qconfig
            if form is None or first != name:
                continue
            parents = [parent for parent, _ in places[id(module)]]
            if obstacle := _obstacle(module, base, form, parents):
                left.append(f"{_titled(name, module)} {obstacle}")
                continue
            if hasattr(form, "check_float"):
                more = {} if each is None else {"products": each}
                with in_eval_mode(module):
                    form.check_float(module, qconfig, name, **more)
            weight = module._parameters.get("weight", module)
            tie = (id(weight), form, qconfig.weight, qconfig.dtype)
            self.items.append(Item(name, module, form, qconfig, places[id(module)], tie, each))
            outer = name
        self._warn("left in float", left)
        self._warn("part of a module that is quantized as a whole", within)
        self._warn(
            "left as it is, since nothing within a ScriptModule can be swapped (quantize first, "
            "then script or trace)",
            [_titled(name, modules[name]) for name in scripted],
        )

    def configs(self):
        """The config of each module, and of each product that has another, by name."""
        configs = {}
        for item in filter(Item.is_quantized, self.items):
            configs[item.name] = item.qconfig
            for product, qconfig in (item.products or {}).items():
                if product is not None and qconfig != item.qconfig:
                    configs[f"{item.name}.{product}"] = qconfig
        return configs

    def _warn(self, what, subjects):
        if subjects:
            self.warnings.append(f"{what}: {'; '.join(subjects)}")

    def keep_in_float(self, ratios, threshold):
        """Takes layers and products of layers out, with a warning.

        Args:
            ratios: dB by (item, product, or None for the layer); NaN where example_inputs have not
                reached it.
            threshold: dB, which the warning names.
        """
        for item, product in ratios:
            item.set_config(product, None)
        self.items = [item for item in self.items if item.is_quantized()]
        below = {part: ratio for part, ratio in ratios.items() if not math.isnan(ratio)}
        unreached = [_titled_part(*part) for part in ratios if part not in below]
        self._warn_of_ratios(f"left in float, below {threshold} dB", below)
        self._warn("left in float, not measured since example_inputs do not reach it", unreached)

    def raise_bits(self, ratios, threshold):
        """Gives layers and products 16 bits, with a warning; arguments as for keep_in_float."""
        for item, product in ratios:
            item.set_config(product, replace(item.config(product), activation_bits=16))
        self._warn_of_ratios(f"activations in 16 bits, below {threshold} dB in 8", ratios)

    def _warn_of_ratios(self, what, ratios):
        self._warn(
            what, [f"{_titled_part(*part)} {ratio:.1f} dB" for part, ratio in ratios.items()]
        )

    def warn_of_large_floats(self, model, forms, dtype):
        """Adds a warning where much of the model is of types that have no quantized form.

        dtype: what was asked for.
        """
        on_request = {
            type_before_parametrizations(module)
            for module in model.modules()
            if _can_be_asked_for(module, dtype, forms)
        }
        swapped = [item.module for item in self.items]
        if message := without_form(model, swapped, forms, on_request):
            self.warnings.append(message)

    def warn_of_requests_without_form(self, modules, spec, forms):
        """Adds the warnings that name the types, names and patterns that cover nothing to quantize,
        or nothing but what has to be asked for by itself.
        """

        def is_quantized(module, dtype):
            base, candidates = forms.of(type(module))
            if forms.is_on_request(base) and id(module) not in self._asked:
                return False
            return (
                isinstance(module, NonDynamicallyQuantizableLinear)
                or forms.is_quantized(type(module))
                or form_for(candidates, dtype) is not None
            )

        without, unasked = [], []

        def check(subject, covering, dtype, otherwise):
            within = [module for outer in covering for module in outer.modules()]
            if any(is_quantized(module, dtype) for module in within):
                return
            can_be = any(_can_be_asked_for(module, dtype, forms) for module in within)
            (unasked if can_be else otherwise).append(subject)

        for base, qconfig in spec.types.items():
            if qconfig is not None and not forms.has_any(base):
                instances = [module for module in modules.values() if isinstance(module, base)]
                check(describe(base), instances, qconfig.dtype, without)
        for name, qconfig in spec.names.items():
            if qconfig is not None:
                module = modules[name]
                check(_titled(name, module), [module], qconfig.dtype, without)
        for pattern, qconfig in spec.patterns.items():
            if qconfig is not None:
                fitting = [modules[name] for name in modules if fits(pattern, name)]
                check(describe(pattern), fitting, qconfig.dtype, [])
        self._warn("no quantized form, left as it is", without)
        self._warn(
            "left as it is (only an entry for its type or its own name quantizes "
            f"{' or '.join(forms.on_request)})",
            unasked,
        )


@on_own_thread
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
        plan = Plan(modules, lambda name: spec.match(name, modules), forms)
        plan.warn_of_large_floats(model, forms, dtype)
        return plan
    spec = Spec(qconfig_spec, dtype, argument, forms.relatives)
    names = _names_of_products(spec, modules, forms)
    products = _taken_products(spec, names)
    spec.check_names(modules, names)
    if NonDynamicallyQuantizableLinear in spec.types:
        forms.allow(NonDynamicallyQuantizableLinear)
    for base, config in spec.types.items():
        if config is None:
            continue
        check_dtype(forms.of(base)[1], config.dtype, f"{argument}[{describe(base)}]")
    plan = Plan(modules, lambda name: spec.match(name, modules), forms, products)
    plan.warn_of_requests_without_form(modules, spec, forms)
    return plan


def _names_of_products(spec, modules, forms):
    """By the whole name of each product that an entry may name: (module, product)."""
    outer = modules if spec.patterns else {name.rpartition(".")[0] for name in spec.names}
    names = {}
    for name in outer:
        module = modules.get(name)
        for form in () if module is None else forms.of(type(module))[1]:
            if getattr(form, "MIXED", None):
                with in_eval_mode(module):
                    products = form.products_of(module)
                names |= {f"{name}.{one}".lstrip("."): (name, one) for one in products}
    return names


def _taken_products(spec, names):
    """Takes the products out of a spec: their configs, a dict for each module's name."""
    taken = {}
    for name, (outer, product) in names.items():
        if found := spec.match_product(name):
            taken.setdefault(outer, {})[product] = found.qconfig
    for name in names:
        spec.names.pop(name, None)
    return taken


def _is_product(name, products):
    outer, _, product = name.rpartition(".")
    return product in products.get(outer, {})


def _mixed(module, forms, qconfig, configs):
    """The form whose products may differ, or None where all stay in float, and their configs."""
    form = next(one for one in forms if getattr(one, "MIXED", None))
    each = {name: configs.get(name, qconfig) for name in form.products_of(module)}
    return (None if set(each.values()) == {None} else form), each


def _titled_part(item, product):
    return _titled(".".join(filter(None, (item.name, product))), item.module)


def default_spec(qconfig, convolutions=False):
    """The qconfig_spec that quantizes what None does, with a QConfig for all of it.

    convolutions: what is quantized on request alone as well.
    """
    bases = Forms(None).default_types(qconfig.dtype)
    spec = {base: qconfig for base in bases if base is not NonDynamicallyQuantizableLinear}
    return spec | dict.fromkeys(ON_REQUEST, qconfig) if convolutions else spec


@on_own_thread
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
        # Those of torch are handed on from a module to all that it holds.
        is_handed_on = type(config).__module__.startswith("torch.") and any(
            getattr(modules[outer], "qconfig", None) is not None for outer in lineage_of(name)[1:]
        )
        if config is not None and forms.of(type(module))[1]:
            config = parse_qconfig(config, name=f"{name or 'model'}.qconfig")
            check_dtype(forms.of(type(module))[1], config.dtype, f"{name or 'model'}.qconfig")
        return Match(config, False, not is_handed_on)

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


def _can_be_asked_for(module, dtype, forms):
    """Whether an entry for the module itself would quantize one that is otherwise left in float."""
    base, candidates = forms.of(type(module))
    form = form_for(candidates, dtype) if forms.is_on_request(base) else None
    return form is not None and not _obstacle(module, base, form, ())


def _candidates(name, module, found, forms):
    """(base type, its quantized forms), without forms where the module is not asked for.

    Raises:
        ValueError: where the module's own name asks for a dtype that none of its forms serves.
    """
    if found is None:
        return None, ()
    base, candidates = forms.of(type(module))
    if forms.is_on_request(base) and not found.is_asked and found.qconfig is not None:
        return base, ()
    if base is NonDynamicallyQuantizableLinear and found.by_name:
        candidates = candidates or forms.of(nn.Linear)[1]
    # A name or type that covers the module among others may ask for a dtype of those.
    if found.by_name and found.qconfig is not None:
        check_dtype(candidates, found.qconfig.dtype, _titled(name, module))
    return base, candidates


def _places(modules):
    """By id(module): each (parent module, key in its _modules)."""
    places = defaultdict(list)
    for parent in modules.values():
        for key, child in parent._modules.items():
            places[id(child)].append((parent, key))
    return places


def _computed(module):
    """The first parameter that a hook computes, as weight_norm and pruning do, or None.

    Such a hook keeps the parameter under another name and sets a plain tensor as an attribute.
    """
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            is_parameter = key.startswith(
                ("weight", "bias", "in_proj_", "q_proj_", "k_proj_", "v_proj_")
            )
            if is_parameter and isinstance(value, torch.Tensor) and child._forward_pre_hooks:
                return f"{name}.{key}".lstrip(".")
    return None


def _obstacle(module, base, form, parents):
    """Why a module of a type with a quantized form has none itself, or None."""
    if "forward" in vars(module) or not _keeps_forward(type(module), base):
        return f"has a forward other than {base.__name__}'s"
    if base is FloatExperts:
        return unlike_experts(module)
    if issubclass(base, nn.Linear):
        for parent in parents:
            if isinstance(parent, nn.MultiheadAttention):
                return "belongs to an nn.MultiheadAttention, which computes with its weight"
    if computed := _computed(module):
        return f"has a {computed} that a hook computes, as weight_norm's does: remove that first"
    return form.unlike(module) if hasattr(form, "unlike") else None


def _keeps_forward(module_type, base):
    return is_experts(module_type) if base is FloatExperts else module_type.forward is base.forward


def _titled(name, module):
    return f"{name or 'the model'} ({type(module).__name__})"
