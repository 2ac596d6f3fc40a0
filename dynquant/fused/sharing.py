"""Keys and values that layers of a decoder take from one before them."""

from collections.abc import MutableMapping

from dynquant.fused.arguments import are_heads_for
from dynquant.fused.places import part_of, place_of


def groups_of(module, names):
    """How many heads of the query take one head of an earlier layer's keys; None where it has own.

    Args:
        names: SharedKeys.
    """
    return part_of(module, names.groups) if part_of(module, names.reuses) else None


class Sharing:
    """What one attention takes from an earlier layer, or keeps for later ones.

    Args:
        module: the block.
        names: SharedKeys.
    """

    def __init__(self, module, names):
        self._states = names.states
        self._entry, self._stores, self._reuses = (
            place_of(module, name) for name in (names.entry, names.stores, names.reuses)
        )

    def read(self, call, states, parts):
        """The Call with what it shares; None where that is not what its ops take.

        Args:
            states: the mapping, or None.
            parts: the Parts of the block.
        """
        entry, stores, reuses = (
            getattr(*place, None) for place in (self._entry, self._stores, self._reuses)
        )
        if bool(reuses) != (parts.attention.groups is not None):
            return None
        if not stores and not reuses:
            return call
        if not isinstance(states, MutableMapping):
            return None
        if not reuses:
            return call._replace(stored=(states, entry))
        found = states.get(entry, ())
        dim, heads = parts.attention.head_dim, parts.kv_heads
        fits = len(found) == 2 and all(are_heads_for(one, call.x, dim, heads) for one in found)
        return call._replace(reused=tuple(found)) if fits else None

    def sample(self, random):
        """The argument that has it, for a call that is tried.

        Args:
            random: gives keys, and values, [batch, heads, tokens, features].
        """
        reuses = getattr(*self._reuses)
        found = {getattr(*self._entry): (random(), random())} if reuses else {}
        return {self._states: found}
