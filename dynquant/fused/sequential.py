"""nn.Sequential: a linear layer runs as one op with the norm and the activation beside it."""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from dynquant.fused import calls
from dynquant.fused.classes import Swapped, base_of
from dynquant.fused.functions import Norm, activation_of, norm_of, runs_as_op
from dynquant.fused.hooks import first_disturbance
from dynquant.fused.parts import LINEAR, dtype_of, parameters_of, scheme_of

_ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
_NORMS = (nn.LayerNorm, nn.RMSNorm)
_IDLE = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class Run(NamedTuple):
    """Modules that follow each other and are one op: after(down(activation(linear(before(x))))).

    Attributes:
        modules: (name, module) of all of them, those that do nothing in eval mode included.
        down: a second linear layer, or None.
        before, after: a Norm or None.
        activation: its name, "none" where there is none.
        function: the module of the activation, or None.
        scheme: how the linear layers quantize their inputs.
    """

    modules: tuple
    linear: nn.Module
    before: Norm | None
    activation: str
    function: nn.Module | None
    down: nn.Module | None
    after: Norm | None
    scheme: tuple

    def __call__(self, x):
        if self._fits(x):
            return self.compute(x)
        for _, module in self.modules:
            x = module(x)
        return x

    def compute(self, x):
        ends = self.before, self.after, self.scheme
        if self.down is None:
            arguments = calls.linear_block_arguments(self.linear, self.activation, *ends)
            return calls.linear_block(arguments, x)
        arguments = calls.feed_forward_arguments(
            self.linear, None, self.down, self.activation, None, *ends
        )
        return calls.feed_forward(arguments, x)

    def norms(self):
        return [norm for norm in (self.before, self.after) if norm is not None]

    def dtype(self):
        """That of the input."""
        return dtype_of([*(norm.module for norm in self.norms()), self.linear])

    def why_not(self):
        """What stands against running as one op, or ""."""
        return first_disturbance(self.modules)

    def _fits(self, x):
        if not isinstance(x, torch.Tensor) or first_disturbance(self.modules):
            return False
        return runs_as_op(x, lambda: parameters_of(self.norms()))


class Chain:
    """What an nn.Sequential is made of now.

    Args:
        module: the nn.Sequential.
        fused: whether norms and activations have to be ops already, as those of one that is fused
            are: what took the place of one since then is called as it is.

    Attributes:
        steps: what its forward calls in turn: Runs, and modules as they are.
        runs: the Runs among them.
    """

    def __init__(self, module, fused):
        self._children = [(child, type(child)) for child in module._modules.values()]
        self.steps, left = [], list(module._modules.items())
        while left:
            run = _run_at(left, fused)
            self.steps.append(left[0][1] if run is None else run)
            del left[: 1 if run is None else len(run.modules)]
        self.runs = [step for step in self.steps if isinstance(step, Run)]

    def hold(self, module):
        """Whether the module still has the same children, of the same types."""
        children = module._modules
        if len(children) != len(self._children):
            return False
        for child, (known, kind) in zip(children.values(), self._children, strict=True):
            if child is not known or child.__class__ is not kind:
                return False
        return True

    def norms(self):
        return [norm for run in self.runs for norm in run.norms()]

    def activations(self):
        """(function, the name of what it computes) of each."""
        return [(run.function, run.activation) for run in self.runs]

    def why_not(self):
        """What stands against running as ops, or ""."""
        if not self.runs:
            return "no linear layer of type dynquant.nn.Linear is beside an activation or a norm"
        return next(filter(None, (run.why_not() for run in self.runs)), "")


def chain_of(module):
    """The Chain of an nn.Sequential with something to run as one op, or that is fused; or None."""
    kind = base_of(type(module))
    if not issubclass(kind, nn.Sequential) or kind.forward is not nn.Sequential.forward:
        return None
    chain = Chain(module, fused=False)
    return chain if chain.runs or isinstance(module, Swapped) else None


def _run_at(modules, fused):
    """The Run that begins there, or None.

    Args:
        modules: (name, module) in turn.
        fused: as Chain has it.
    """

    def norm(module):
        kind = norm_of(module) if _is_one_of(module, _NORMS, fused) else None
        return Norm(kind, module) if kind else None

    def activation(module):
        return activation_of(module) and module if _is_one_of(module, _ACTIVATIONS, fused) else None

    def linear(module):
        return module if type(module) in LINEAR else None

    found = _Reader(modules)
    before, first = found.take(norm), found.take(linear)
    if first is None:
        return None
    function, down = found.take(activation), None
    if function is not None:
        begin, down = found.taken, found.take(linear)
        # One with an activation of its own begins the next run.
        if down is not None and (
            scheme_of(down) != scheme_of(first) or found.take(activation) is not None
        ):
            found.taken, down = begin, None
    after = found.take(norm)
    if function is None and before is None and after is None:
        return None
    name = "none" if function is None else activation_of(function)
    taken = tuple(modules[: found.taken])
    return Run(taken, first, before, name, function, down, after, scheme_of(first))


def _is_one_of(module, types, fused):
    return base_of(type(module)) in types and (isinstance(module, Swapped) or not fused)


class _Reader:
    """Takes modules one after the other, past those that do nothing in eval mode."""

    def __init__(self, modules):
        self._modules = modules
        self.taken = 0

    def take(self, recognized):
        """What recognized gives for the next module; where that is None, nothing is taken."""
        at = self.taken
        while at < len(self._modules) and type(self._modules[at][1]) in _IDLE:
            at += 1
        found = recognized(self._modules[at][1]) if at < len(self._modules) else None
        if found is not None:
            self.taken = at + 1
        return found


class FusedSequential(Swapped):
    """An nn.Sequential of which some modules that follow each other run as one op."""

    def forward(self, input):
        if self.training or _has_any_global_hook():
            return super().forward(input)
        for step in self._chain().steps:
            input = step(input)
        return input

    def why_not(self):
        """What stands against running fused now, or ""."""
        return "it is in training mode" if self.training else self._chain().why_not()

    def _chain(self):
        chain = self.__dict__.get("_parts")
        if chain is None or not chain.hold(self):
            chain = self.__dict__["_parts"] = Chain(self, fused=True)
        return chain
