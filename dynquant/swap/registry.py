"""The quantized forms of every type of module."""

import sys
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dynquant import nn as quantized
from dynquant.nn.experts import FloatExperts
from dynquant.qconfig import one_of
from dynquant.stubs import DeQuantStub, QuantStub
from dynquant.swap.selection import bases_of, describe

# The quantized forms of each float type, of which the config's dtype chooses one; None for a type
# that has none although its base type has.
_FORMS = {
    nn.Linear: (quantized.Linear, quantized.Linear16bit),
    # Code that makes one computes with its weight; it is quantized where it is named itself.
    NonDynamicallyQuantizableLinear: None,
    nn.MultiheadAttention: quantized.MultiheadAttention,
    nn.LSTM: (quantized.LSTM, quantized.LSTM16bit),
    nn.GRU: (quantized.GRU, quantized.GRU16bit),
    nn.RNN: (quantized.RNN, quantized.RNN16bit),
    nn.LSTMCell: (quantized.LSTMCell, quantized.LSTMCell16bit),
    nn.GRUCell: (quantized.GRUCell, quantized.GRUCell16bit),
    nn.RNNCell: (quantized.RNNCell, quantized.RNNCell16bit),
    nn.Conv1d: quantized.Conv1d,
    nn.ConvTranspose1d: quantized.ConvTranspose1d,
    nn.Embedding: quantized.Embedding,
    nn.EmbeddingBag: quantized.EmbeddingBag,
    FloatExperts: (quantized.Experts, quantized.Experts16bit),
    QuantStub: quantized.Quantize,
    DeQuantStub: quantized.DeQuantize,
}
STUBS = (QuantStub, DeQuantStub)
# What has a form and is quantized only where an entry asks for it and not for what it lies within:
# torch.ao leaves it in float. What is called convolutions in configs.
ON_REQUEST = (nn.Conv1d, nn.ConvTranspose1d)


# Types of modules that dynquant does not import: where they are defined, and the quantized forms.
_FOREIGN_FORMS = (
    ("transformers.pytorch_utils", "Conv1D", (quantized.Conv1D, quantized.Conv1D16bit)),
    ("torch.ao.nn.qat.dynamic.modules.linear", "Linear", _FORMS[nn.Linear]),
    # Its own forward rounds once more between product and bias, where it is in 16 bits.
    ("transformers.models.falcon.modeling_falcon", "FalconLinear", _FORMS[nn.Linear]),
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
    quantized: dynquant's own forms are used instead.

    Attributes:
        relatives: types made of linear layers, which an entry for nn.Linear covers as well.
        on_request: the names of the types that are quantized only where they are asked for by
            themselves.
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
        self.relatives = (nn.MultiheadAttention, FloatExperts, *foreign)
        self._on_request = [base for base in ON_REQUEST if base not in mapping]
        self.on_request = [base.__name__ for base in self._on_request]
        mapping = {base: form for base, form in mapping.items() if not _is_of_torch_ao(form)}
        self._forms = {**_FORMS, **foreign, **mapping}
        self._quantized = tuple({form for forms in self._forms.values() for form in _each(forms)})

    def allow(self, base):
        """Quantizes a type of linear layer that is otherwise left in float."""
        self._forms[base] = self._forms[base] or self._forms[nn.Linear]

    def of(self, module_type):
        """The nearest base type that has an entry, and its forms: (None, ()) without one."""
        base = next((base for base in bases_of(module_type) if base in self._forms), None)
        return base, _each(self._forms.get(base))

    def is_on_request(self, base):
        """Whether a type is quantized only where it is asked for by itself, as `mapping` does."""
        return base in self._on_request

    def is_quantized(self, module_type):
        return issubclass(module_type, self._quantized)

    def is_own(self, module_type):
        """Whether a type is itself a quantized form, and none that derives from one."""
        return module_type in self._quantized

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
        served = not forms or form_for(forms, dtype) is not None
        return base not in STUBS and not self.is_on_request(base) and served


def _each(forms):
    """The entry of a type as a tuple."""
    if forms is None:
        return ()
    return forms if isinstance(forms, tuple) else (forms,)


def form_for(forms, dtype):
    """That of the forms that serves the dtype, or None. One without DTYPES serves them all."""
    return next((form for form in forms if dtype in getattr(form, "DTYPES", (dtype,))), None)


def check_dtype(forms, dtype, subject):
    """Raises ValueError where none of the forms serves the dtype."""
    if forms and form_for(forms, dtype) is None:
        one_of(f"{subject}: dtype", dtype, [one for form in forms for one in form.DTYPES])


def _is_of_torch_ao(form):
    return getattr(form, "__module__", "").startswith("torch.ao.")
