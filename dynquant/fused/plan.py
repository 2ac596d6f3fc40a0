"""What the ops of a block are called with, kept for as long as its modules are as they were.

At one short text, finding it out anew at each call takes as long as the ops.
"""

from dynquant import _C
from dynquant.fused import calls
from dynquant.fused.parts import numbers_of
from dynquant.fused.places import place_of


class Watched:
    """Entries of dicts and types of modules that a plan depends on.

    Modules are watched for being the same, of the same class, in eval mode, without hooks and
    without a forward of their own.
    """

    def __init__(self):
        self._lists = self._same, self._empty, self._absent, self._types = [], [], [], []

    def child(self, parent, key, module):
        """The module as a child."""
        self.entries(parent._modules, {key: module})
        self._types += (module, type(module))
        own = module.__dict__
        self.entries(own, {"training": False})
        self._empty += (own, "_forward_hooks", own, "_forward_pre_hooks")
        self._absent += (own, "forward")

    def entries(self, table, entries):
        """That a dict has these entries."""
        for key, value in entries.items():
            self._same += (table, key, value)

    def attributes(self, module, *names):
        """That the module's own attributes of these names are as they are, or are not there."""
        own = module.__dict__
        for name in names:
            if name in own:
                self._same += (own, name, own[name])
            else:
                self._absent += (own, name)

    def norm(self, norm):
        """That a Norm has the same parameters and epsilon."""
        self.entries(norm.module._parameters, norm.module._parameters)
        self.attributes(norm.module, "eps", "variance_epsilon")

    def update(self, fixed):
        """All of what another one gave."""
        for own, more in zip(self._lists, fixed, strict=True):
            own += more

    def fixed(self):
        """What `holds` takes, faster than this."""
        return tuple(map(tuple, self._lists))

    def hold(self):
        return holds(self.fixed())


def holds(fixed):
    """Whether all is as it was when a Watched gave `fixed`, in one call."""
    return _C.unchanged(*fixed)


class Plan:
    """The arguments of a block's ops that a call does not bring.

    Attributes:
        attention, relative, token, reusing, cross, feed_forward, linear_block: what the functions
            of that name in calls take as `arguments`, None where they are not called. token and
            cross go with a cache, relative takes the place of attention, reusing that of token.
        fixed: what has to hold for that, for `holds`; None where it cannot be kept.
    """

    def __init__(self, module, parts):
        first = parts.adapter.norm_first
        self._norm_first = getattr(module, first) if isinstance(first, str) else first

        def ends(norm, result_norm=None):
            before, after = self.around(norm)
            return before, result_norm or after, parts.scheme

        self.attention = self.relative = self.token = self.reusing = self.cross = None
        self.feed_forward = self.linear_block = self.fixed = None
        if parts.attention is not None:
            numbers = numbers_of(module, parts)
            around = numbers, *ends(parts.attention.norm, parts.attention.result_norm)
            if parts.attention.relative is not None:
                self.relative = calls.relative_arguments(parts, *around[1:])
            elif parts.attention.output is not None and parts.runs_without_cache:
                self.attention = calls.attention_arguments(parts, *around)
            if parts.attention.groups is not None:
                self.reusing = calls.reusing_arguments(parts, *around)
            elif parts.adapter.cache is not None or not parts.runs_without_cache:
                self.token = calls.token_arguments(parts, *around)
            if parts.adapter.cross is not None:
                self.cross = calls.cross_arguments(parts, *around)
        if parts.feed_forward is not None:
            *layers, split, norm, activation, _, result_norm = parts.feed_forward
            self.feed_forward = calls.feed_forward_arguments(
                *layers, activation, split, *ends(norm, result_norm)
            )
        if parts.linear_block is not None:
            linear, norm, activation, _ = parts.linear_block
            self.linear_block = calls.linear_block_arguments(linear, activation, *ends(norm))

    def around(self, norm):
        """The norms before and behind what has this one."""
        return (norm, None) if self._norm_first else (None, norm)

    def keep(self, module, parts):
        """Watches what the arguments were taken from."""
        if any(one._forward_hooks or one._forward_pre_hooks for _, _, one in parts.children()):
            return  # whether they do anything is asked at each call
        watched = Watched()
        for parent, key, child in parts.children():
            watched.child(parent, key, child)
        for linear in parts.linears.values():
            watched.entries(linear._buffers, linear._buffers)
            watched.entries(linear._parameters, linear._parameters)
        for norm in parts.norms():
            watched.norm(norm)
        if isinstance(parts.adapter.norm_first, str):
            watched.attributes(module, parts.adapter.norm_first)
        if self.token is not None or self.reusing is not None:
            names = parts.adapter.attention
            given = names.scale, names.index, names.rotates, names.softcap
            for name in filter(None, given):
                watched.attributes(*place_of(module, name))
            if names.sinks:
                holder, own = place_of(module, names.sinks)
                watched.entries(holder._parameters, {own: holder._parameters.get(own)})
        self.fixed = watched.fixed()
