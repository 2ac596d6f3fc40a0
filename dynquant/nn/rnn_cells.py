"""nn.LSTMCell, nn.GRUCell and nn.RNNCell with int8 weights: one step of a recurrence."""

from functools import partial

import torch
from torch import nn

from dynquant.nn._fx import as_one_call
from dynquant.nn._recurrent import Int8Scheme, Recurrent, check_states
from dynquant.nn._script import no_script
from dynquant.nn._torch_ao import plain_linear, with_plain_entries


class RecurrentCell(Recurrent):
    """One step of a recurrence: the layers' op over a sequence of length 1.

    TorchScript reads no dict of buffers and unpacks tuples alone. For it _tuple_of_states,
    _tuple_of_weights, _tuple_of_more and _tuple_of_scheme give the arguments of the op.
    """

    COPIED = ("input_size", "hidden_size", "bias")
    STATES = 1
    __constants__ = (*COPIED, "STATES")

    def __init_subclass__(cls, **arguments):
        super().__init_subclass__(**arguments)
        if cls.OP is not None:
            cls._scripted_step = _scripted_step_of(cls.OP)

    @staticmethod
    def _suffixes_of(mod):
        return [""]

    def forward(self, input: torch.Tensor, hx: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles conditions whole)
            if not isinstance(input, torch.Tensor):
                return as_one_call(self, input, hx)
        states: list[torch.Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_states(self, hx, 1)
            states = [hx]
        return self._step(input, states)[0]

    def _step(self, input, states: list[torch.Tensor] | None) -> list[torch.Tensor]:
        if not torch.jit.is_scripting():
            self._check_dimensions(input, states)
        is_batched = input.dim() == 2
        x = input if is_batched else input.unsqueeze(0)
        if states is None:
            states = [x.new_zeros(x.shape[0], self.hidden_size)] * self.STATES
        elif not is_batched:
            states = [state.unsqueeze(0) for state in states]
        self._check_sizes(x, states)
        if torch.jit.is_scripting():
            states = self._scripted_step(x.unsqueeze(0), states)
        else:
            _, states = self._direction(x.unsqueeze(0), states, 0)
        return states if is_batched else [state.squeeze(0) for state in states]

    def __prepare_scriptable__(self):
        if self._is_mixed:
            raise no_script(self, "has products of several formats")
        return self

    def _tuple_of_states(self, states: list[torch.Tensor]):
        return (states[0],)

    def _tuple_of_more(self):
        return ()

    def _check_dimensions(self, input, states):
        name = self._get_name()
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for place, state in enumerate(states or ()):
            if state.dim() not in (1, 2):
                what = f"hx[{place}]" if self.STATES > 1 else "hidden"
                raise ValueError(
                    f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead"
                )

    def _check_sizes(self, x, states: list[torch.Tensor]):
        if x.shape[1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[1]} expected {self.input_size}"
            )
        for place, state in enumerate(states):
            if state.dim() != 2 or state.shape[0] != x.shape[0]:
                shape = f"of the shape {list(state.shape)}"
                rows = f"{state.shape[0]}" if state.dim() == 2 else shape
                raise RuntimeError(
                    f"Input batch size {x.shape[0]} doesn't match hidden{place} batch size {rows}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{place} has inconsistent hidden_size: got {state.shape[1]}, "
                    f"expected {self.hidden_size}"
                )

    def _translated(self, state_dict, prefix):
        readers = {
            f"{prefix}_packed_weight_{part}": partial(_plain_part, prefix, part)
            for part in ("ih", "hh")
        }
        return with_plain_entries(state_dict, readers)

    def extra_repr(self) -> str:
        return nn.RNNCellBase.extra_repr(self) + self._format_repr()


class LSTMStep(RecurrentCell):
    FLOAT = "nn.LSTMCell"
    STATES = 2

    def forward(
        self, input: torch.Tensor, hx: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.jit.is_scripting():  # noqa: SIM102 (TorchScript compiles conditions whole)
            if not isinstance(input, torch.Tensor):
                return as_one_call(self, input, hx)
        states: list[torch.Tensor] | None = None
        if hx is not None:
            if not torch.jit.is_scripting():
                check_states(self, hx, 2)
            states = [hx[0], hx[1]]
        states = self._step(input, states)
        return states[0], states[1]

    def _more_arguments(self, suffix):
        return self._arguments("weight_hr")

    def _tuple_of_states(self, states: list[torch.Tensor]):
        return states[0], states[1]

    def _tuple_of_more(self):
        return self._tuple_of_no_projection()


class GRUStep(RecurrentCell):
    FLOAT = "nn.GRUCell"


class RNNStep(RecurrentCell):
    FLOAT = "nn.RNNCell"
    COPIED = (*RecurrentCell.COPIED, "nonlinearity")
    __constants__ = (*RecurrentCell.__constants__, "nonlinearity")

    def _more_arguments(self, suffix):
        return (self.nonlinearity == "relu",)

    def _tuple_of_more(self):
        return (self.nonlinearity == "relu",)


def _scripted_step_of(op):
    """The method that calls the op under TorchScript, which finds it in the method's closure."""

    def _scripted_step(self, x, states: list[torch.Tensor]) -> list[torch.Tensor]:
        """x: [1, B, K]."""
        _, *after = op(
            x,
            *self._tuple_of_states(states),
            *self._tuple_of_weights(),
            *self._tuple_of_more(),
            None,
            False,
            *self._tuple_of_scheme(),
        )
        return [state for state in after]  # noqa: C416 (TorchScript makes no list of a tuple)

    return _scripted_step


class _Int8Cell(Int8Scheme):
    """Made by from_float, which quantize_dynamic calls. Takes and gives what the float module does:
    fp32, bf16 or fp16 [B, input_size] or [input_size], and states of that dtype, [B, hidden_size]
    or [hidden_size].

    The state dict has weight_ih_int8 and weight_hh_int8 (int8 [N, K]), weight_ih_scale and
    weight_hh_scale (fp32 [N] or [1]), the biases, and version (int64). load_state_dict also takes
    what the float module has, what torch.ao's dynamic quantization saves, and version 1, in which
    the weights were int8.

    Attributes:
        those of the float module; its weights are QuantizedWeights of its shapes and dtype, the
        biases parameters without gradient, or None.
        per_token, symmetric, activation_bits: how the input and the states are quantized.
    """

    def _tuple_of_weights(self):
        return (
            self.packed_ih,
            self.weight_ih_scale,
            self.bias_ih,
            self.packed_hh,
            self.weight_hh_scale,
            self.bias_hh,
        )

    def _tuple_of_no_projection(self):
        return None, None

    def _tuple_of_scheme(self):
        return self.per_token, self.symmetric, self.activation_bits


class LSTMCell(_Int8Cell, LSTMStep):
    __doc__ = f"nn.LSTMCell.\n\n{_Int8Cell.__doc__}"

    OP = torch.ops.dynquant.lstm_dynamic
    MIXED = torch.ops.dynquant.lstm_mixed


class GRUCell(_Int8Cell, GRUStep):
    __doc__ = f"nn.GRUCell.\n\n{_Int8Cell.__doc__}"

    OP = torch.ops.dynquant.gru_dynamic
    MIXED = torch.ops.dynquant.gru_mixed


class RNNCell(_Int8Cell, RNNStep):
    __doc__ = f"nn.RNNCell, with tanh or relu.\n\n{_Int8Cell.__doc__}"

    OP = torch.ops.dynquant.rnn_dynamic
    MIXED = torch.ops.dynquant.rnn_mixed


def _plain_part(prefix, part, packed_params):
    """The entries of this module for one weight, "ih" or "hh", of a torch.ao cell."""
    result = {}
    for name, value in plain_linear(packed_params).items():
        stem, _, end = name.partition("_")
        plain = name if name == "version" else f"{stem}_{part}{'_' if end else ''}{end}"
        result[prefix + plain] = value
    return result
