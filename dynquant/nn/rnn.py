"""nn.LSTM, nn.GRU and nn.RNN with int8 weights, whose inputs and states are quantized at each step.

The semantics are torch's: shapes, the order of gates, packed sequences, initial states, messages.
"""

from functools import partial

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from dynquant.nn._fx import as_one_call
from dynquant.nn._recurrent import Int8Scheme, Recurrent, check_states
from dynquant.nn._script import no_script
from dynquant.nn._torch_ao import plain_cell, with_plain_entries


class RecurrentLayers(Recurrent):
    """Layers and directions of a recurrence over a whole sequence; each of them is one op."""

    COPIED = tuple(nn.RNNBase.__constants__)

    check_hidden_size = nn.RNNBase.check_hidden_size
    get_expected_hidden_size = nn.RNNBase.get_expected_hidden_size
    check_forward_args = nn.RNNBase.check_forward_args

    @staticmethod
    def _suffixes_of(mod):
        directions = ["", "_reverse"] if mod.bidirectional else [""]
        return [f"_l{layer}{end}" for layer in range(mod.num_layers) for end in directions]

    def check_input(self, input: torch.Tensor, batch_sizes: torch.Tensor | None) -> None:
        dimensions = 3 if batch_sizes is None else 2
        if input.dim() != dimensions:
            raise RuntimeError(f"input must have {dimensions} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {self.input_size}, got {input.size(-1)}"
            )

    def __prepare_scriptable__(self):
        raise no_script(self, "takes packed sequences and names its weights by layer")

    def flatten_parameters(self) -> None:
        """Does nothing: the weights lie as the kernels read them."""

    @property
    def all_weights(self) -> list[list[torch.Tensor]]:
        """The parameters of each layer and direction in torch's order."""
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        kinds += ["weight_hr"] if self.proj_size else []
        return [[getattr(self, kind + suffix) for kind in kinds] for suffix in self._suffixes]

    def forward(
        self,
        input: torch.Tensor | PackedSequence,
        hx: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor | PackedSequence, torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
        if not isinstance(input, (torch.Tensor, PackedSequence)):
            return as_one_call(self, input, hx)
        if isinstance(input, PackedSequence):
            return self._of_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(
                f"{self._get_name()}: Expected input to be 2D or 3D, got {input.dim()}D instead"
            )
        is_batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        x = input if is_batched else input.unsqueeze(batch_dim)
        states = None if hx is None else self._as_states(hx)
        if states is not None:
            self._check_dimensions(states, is_batched)
            states = states if is_batched else [state.unsqueeze(1) for state in states]
        states = self._checked(x, states, None)
        y, states = self._layers(x.transpose(0, 1) if self.batch_first else x, states)
        y = y.transpose(0, 1) if self.batch_first else y
        if not is_batched:
            y, states = y.squeeze(batch_dim), [state.squeeze(1) for state in states]
        return y, self._as_hx(states)

    def _of_packed(self, input, hx):
        x, batch_sizes, sorted_indices, unsorted_indices = input
        states = None if hx is None else _permuted(self._as_states(hx), sorted_indices)
        states = self._checked(x, states, batch_sizes)
        y, states = self._layers(x, states, batch_sizes)
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        return output, self._as_hx(_permuted(states, unsorted_indices))

    def _layers(self, x, states, batch_sizes=None):
        directions = 2 if self.bidirectional else 1
        last_states = []
        for layer in range(self.num_layers):
            outputs = []
            for place in range(layer * directions, (layer + 1) * directions):
                before = [state[place] for state in states]
                output, after = self._direction(x, before, place, batch_sizes)
                outputs.append(output)
                last_states.append(after)
            x = torch.cat(outputs, -1) if self.bidirectional else outputs[0]
            if self.dropout and self.training and layer + 1 < self.num_layers:
                x = nn.functional.dropout(x, self.dropout)
        return x, [torch.stack(states) for states in zip(*last_states, strict=True)]

    def _checked(self, x, states, batch_sizes):
        """The states, zeros where None, after torch's checks of shapes."""
        if states is None:
            self.check_input(x, batch_sizes)
            states = [x.new_zeros(shape) for shape in self._state_shapes(x, batch_sizes)]
        self.check_forward_args(x, self._as_hx(states), batch_sizes)
        return states

    def _state_shapes(self, x, batch_sizes):
        return [self.get_expected_hidden_size(x, batch_sizes)]

    def _check_dimensions(self, states, is_batched):
        dimensions = 3 if is_batched else 2
        if any(state.dim() != dimensions for state in states):
            given = ", ".join(f"{state.dim()}-D" for state in states)
            given = f"({given}) tensors" if len(states) > 1 else f"{given} tensor"
            raise RuntimeError(
                f"For {'batched' if is_batched else 'unbatched'} {dimensions}-D input, "
                f"{' and '.join(('hx', 'cx')[: len(states)])} should also be {dimensions}-D "
                f"but got {given}"
            )

    def _as_states(self, hx):
        check_states(self, hx, 1)
        return [hx]

    def _as_hx(self, states):
        return states[0]

    def _translated(self, state_dict, prefix):
        readers = {
            f"{prefix}_all_weight_values.{place}.param": partial(_plain_cell, prefix, suffix)
            for place, suffix in enumerate(self._suffixes)
        }
        return with_plain_entries(state_dict, readers)

    def extra_repr(self) -> str:
        return nn.RNNBase.extra_repr(self) + self._format_repr()


class LSTMLayers(RecurrentLayers):
    FLOAT = "nn.LSTM"

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args

    def _state_shapes(self, x, batch_sizes):
        return [
            self.get_expected_hidden_size(x, batch_sizes),
            self.get_expected_cell_size(x, batch_sizes),
        ]

    def _as_states(self, hx):
        check_states(self, hx, 2)
        return list(hx)

    def _as_hx(self, states):
        return tuple(states)

    def _more_arguments(self, suffix):
        return self._arguments(f"weight_hr{suffix}")


class GRULayers(RecurrentLayers):
    FLOAT = "nn.GRU"


class RNNLayers(RecurrentLayers):
    FLOAT = "nn.RNN"
    COPIED = (*RecurrentLayers.COPIED, "nonlinearity")

    def _more_arguments(self, suffix):
        return (self.nonlinearity == "relu",)


class _Int8Layers(Int8Scheme):
    """Made by from_float, which quantize_dynamic calls. Takes and gives what the float module does:
    a PackedSequence, or fp32, bf16 or fp16 [T, B, input_size], with batch_first [B, T, input_size],
    or [T, input_size]; the states have the dtype of the input. Each layer and direction is one op.
    dropout acts in training mode alone.

    The weights are held once, packed for the machine. The state dict has, for each weight of the
    float module, that name with _int8 (int8 [N, K]) and with _scale (fp32 [N] or [1]), the biases,
    and version (int64). load_state_dict also takes what the float module has, what torch.ao's
    dynamic quantization saves, and version 1, in which the weights were int8.

    Attributes:
        those of the float module; its weights are QuantizedWeights of its shapes and dtype, the
        biases parameters without gradient, or None.
        per_token, symmetric, activation_bits: how the input and the states are quantized.
    """


class LSTM(_Int8Layers, LSTMLayers):
    __doc__ = f"nn.LSTM, proj_size included.\n\n{_Int8Layers.__doc__}"

    OP = torch.ops.dynquant.lstm_dynamic
    MIXED = torch.ops.dynquant.lstm_mixed


class GRU(_Int8Layers, GRULayers):
    __doc__ = f"nn.GRU.\n\n{_Int8Layers.__doc__}"

    OP = torch.ops.dynquant.gru_dynamic
    MIXED = torch.ops.dynquant.gru_mixed


class RNN(_Int8Layers, RNNLayers):
    __doc__ = f"nn.RNN, with tanh or relu.\n\n{_Int8Layers.__doc__}"

    OP = torch.ops.dynquant.rnn_dynamic
    MIXED = torch.ops.dynquant.rnn_mixed


def _permuted(states, permutation):
    if permutation is None:
        return states
    return [state.index_select(1, permutation) for state in states]


def _plain_cell(prefix, suffix, param):
    """The entries of this module for one layer and direction of a torch.ao LSTM or GRU."""
    cell = plain_cell(param)
    result = {f"{prefix}version": torch.tensor(2)} if "weight_ih_scale" in cell else {}
    for name, value in cell.items():
        kind = next((end for end in ("_int8", "_scale") if name.endswith(end)), "")
        result[f"{prefix}{name.removesuffix(kind)}{suffix}{kind}"] = value
    return result
